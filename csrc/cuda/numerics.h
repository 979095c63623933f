// Small functions that several kernels share: interpolation, reading x, activations and their derivatives.
#pragma once

#include <float.h>
#include <math.h>

#include "layout.h"

namespace moe::cuda {

// Where index t of the target falls in the source under align_corners=True: t (s - 1) / (T - 1), split by integer
// division, so that the index is exact and the weight of the upper neighbour correctly rounded. Sides are at most
// 65,535 pixels. At the last index the weight is 0, and nobody reads a neighbour beyond the edge.
struct SourcePosition {
  int lower;
  float upper_weight;
};

MOE_DEVICE SourcePosition source_position(int target, int source_size, int target_size) {
  const uint32_t span = target_size > 1 ? target_size - 1 : 1;
  const uint32_t numerator = static_cast<uint32_t>(target) * static_cast<uint32_t>(source_size - 1);
  return {static_cast<int>(numerator / span), static_cast<float>(numerator % span) / static_cast<float>(span)};
}

// The weight of a source index in a target index, 0 where it has none: the same table read the other way.
MOE_DEVICE float source_weight(int source, int target, int source_size, int target_size) {
  const uint32_t span = target_size > 1 ? target_size - 1 : 1;
  const uint32_t at = static_cast<uint32_t>(target) * static_cast<uint32_t>(source_size - 1);
  const uint32_t centre = static_cast<uint32_t>(source) * span;
  const uint32_t distance = at > centre ? at - centre : centre - at;
  return distance < span ? static_cast<float>(span - distance) / static_cast<float>(span) : 0.f;
}

// The first target index in which a source index may have weight.
MOE_DEVICE int first_target(int source, int source_size, int target_size) {
  const uint32_t span = source_size > 1 ? source_size - 1 : 1;
  const uint32_t before = source > 0 ? source - 1 : 0;
  return static_cast<int>(before * static_cast<uint32_t>(target_size - 1) / span);
}

MOE_DEVICE float relu(float value) { return value <= 0.f ? 0.f : value; }  // keeps NaN
MOE_DEVICE bool is_finite(float value) { return fabsf(value) <= FLT_MAX; }
MOE_DEVICE float sigmoid(float value) { return 1.f / (1.f + expf(-value)); }
MOE_DEVICE float inv_log(float value) { return copysignf(expm1f(fabsf(value)), value); }

constexpr float kSmallestNorm = 1e-8f;  // VGGT's clamp in norm_exp; keeps NaN

// The prediction's activation on one expert's raw outputs. `Raw` maps a channel to its raw value. What the channels
// share is computed once: the norm, or inv_log of the last channel.
template <class Raw>
struct Activated {
  Activation kind;
  int channels;
  Raw raw;
  float shared;

  MOE_DEVICE Activated(Activation kind, int channels, Raw raw) : kind(kind), channels(channels), raw(raw), shared(0) {
    if (kind == Activation::xy_inv_log) shared = inv_log(raw(2));
    if (kind != Activation::norm && kind != Activation::norm_exp) return;
    for (int c = 0; c < channels; ++c) shared = fused(raw(c), raw(c), shared);
    shared = sqrtf(shared);
    if (kind == Activation::norm_exp && shared < kSmallestNorm) shared = kSmallestNorm;
  }

  MOE_DEVICE float value(int c) const {
    const float z = raw(c);
    switch (kind) {
      case Activation::exp: return expf(z);
      case Activation::relu: return relu(z);
      case Activation::sigmoid: return sigmoid(z);
      case Activation::linear: return z;
      case Activation::inv_log: return inv_log(z);
      case Activation::xy_inv_log: return c == 2 ? shared : z * shared;
      case Activation::norm: return z / shared;
      case Activation::norm_exp: return z / shared * expm1f(shared);
    }
    return z;
  }

  // The gradient to raw output c; `grad` maps a channel to the gradient of its activated value, and `along` is what
  // gradients have in common: see common().
  template <class Grad>
  MOE_DEVICE float gradient(int c, Grad grad, float along) const {
    const float z = raw(c), g = grad(c);
    switch (kind) {
      case Activation::exp: return g * expf(z);
      case Activation::relu: return z <= 0.f ? 0.f : g;
      case Activation::sigmoid: return g * sigmoid(z) * (1.f - sigmoid(z));
      case Activation::linear: return g;
      case Activation::inv_log: return g * expf(fabsf(z));
      case Activation::xy_inv_log: return c == 2 ? along * expf(fabsf(z)) : g * shared;
      case Activation::norm: return (g - z / shared * along) / shared;
      case Activation::norm_exp: {
        const float radial = z / shared * along;
        return expm1f(shared) / shared * (g - radial) + expf(shared) * radial;
      }
    }
    return g;
  }

  template <class Grad>
  MOE_DEVICE float common(Grad grad) const {
    float sum = 0.f;
    if (kind == Activation::xy_inv_log) return fused(grad(0), raw(0), fused(grad(1), raw(1), grad(2)));
    if (kind != Activation::norm && kind != Activation::norm_exp) return sum;
    for (int c = 0; c < channels; ++c) sum = fused(raw(c) / shared, grad(c), sum);
    return sum;
  }
};

MOE_DEVICE float confidence_of(ConfActivation kind, float z) {
  switch (kind) {
    case ConfActivation::expp1: return 1.f + expf(z);
    case ConfActivation::expp0: return expf(z);
    case ConfActivation::sigmoid: return sigmoid(z);
    case ConfActivation::none: break;
  }
  return 0.f;
}

MOE_DEVICE float confidence_gradient(ConfActivation kind, float z, float grad) {
  if (kind == ConfActivation::sigmoid) return grad * sigmoid(z) * (1.f - sigmoid(z));
  return grad * expf(z);
}

}  // namespace moe::cuda

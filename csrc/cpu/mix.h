// The per-pixel half of the operation, forward and backward, as moe3d/ops/mixture.py and activations.py define it.
// A block of pixels lies in planes: value v of the block's pixel i is plane(v)[i].
#pragma once

#include <float.h>

#include "elementary.h"

namespace moe::cpu {
namespace {

constexpr float kSwitchMinWeight = 0.01f;
constexpr float kSmallestNorm = 1e-8f;

inline float sign(float y) { return y > 0.f ? 1.f : (y < 0.f ? -1.f : y); }  // NaN stays NaN
inline float inv_log(float y) { return sign(y) * expm1f(fabsf(y)); }

inline float norm_of(const float* y, int64_t channels, int64_t i) {
  float sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += y[c * kTileWidth + i] * y[c * kTileWidth + i];
  return sqrtf(sum);
}

inline float at_least(float value, float floor) { return value < floor ? floor : value; }

// d = act(y), `channels` planes each.
void activate(Activation kind, const float* y, int64_t channels, int64_t count, float* d) {
  const auto each = [&](auto f) {
    for (int64_t c = 0; c < channels; ++c)
      each_pixel(count, [=](int64_t i) { d[c * kTileWidth + i] = f(y[c * kTileWidth + i]); });
  };
  switch (kind) {
    case Activation::exp: return each([](float v) { return fast_exp(v); });
    case Activation::relu: return each([](float v) { return v < 0.f ? 0.f : v; });
    case Activation::sigmoid: return each([](float v) { return fast_sigmoid(v); });
    case Activation::linear: return each([](float v) { return v; });
    case Activation::inv_log: return each([](float v) { return inv_log(v); });
    case Activation::xy_inv_log:
      each_pixel(count, [=](int64_t i) {
        const float z = inv_log(y[2 * kTileWidth + i]);
        d[i] = y[i] * z;
        d[kTileWidth + i] = y[kTileWidth + i] * z;
        d[2 * kTileWidth + i] = z;
      });
      return;
    case Activation::norm:
    case Activation::norm_exp:
      each_pixel(count, [=](int64_t i) {
        float length = norm_of(y, channels, i);
        float factor = 1.f;
        if (kind == Activation::norm_exp) factor = expm1f(length = at_least(length, kSmallestNorm));
        for (int64_t c = 0; c < channels; ++c) d[c * kTileWidth + i] = y[c * kTileWidth + i] / length * factor;
      });
  }
}

void activate_confidence(ConfActivation kind, const float* y, int64_t count, float* c) {
  switch (kind) {
    case ConfActivation::none: return;
    case ConfActivation::expp1:
      each_pixel(count, [=](int64_t i) { c[i] = 1.f + fast_exp(y[i]); });
      return;
    case ConfActivation::expp0:
      each_pixel(count, [=](int64_t i) { c[i] = fast_exp(y[i]); });
      return;
    case ConfActivation::sigmoid:
      each_pixel(count, [=](int64_t i) { c[i] = fast_sigmoid(y[i]); });
      return;
  }
}

// The planes of one block, carved out of the scratch memory.
struct Planes {
  float* z;          // [K][O]
  float* activated;  // [K][O]: hypotheses, then the confidence
  float* gradient;   // [K][O]: of the activated values, then of z
  float* logits;     // [K], later s = (logit - largest) / T
  float* weights;    // [K]
  float* log_weights;
  float* decode;     // [K]: the weights of the decoded value: `weights`, or one-hot where an expert was chosen
  float* grad_weights;
  float* grad_logits;
  float *largest, *sum, *entropy, *scale;  // [1]
  float* chosen;  // [1]: the index of the chosen expert, or -1
  float* spare;   // [1]
};

Planes carve(const Problem& p, float* scratch) {
  Planes planes;
  const auto take = [&](int64_t count) {
    float* at = scratch;
    scratch += count * kTileWidth;
    return at;
  };
  planes.z = take(p.experts * p.outputs);
  planes.activated = take(p.experts * p.outputs);
  planes.gradient = take(p.experts * p.outputs);
  planes.logits = take(p.experts);
  planes.weights = take(p.experts);
  planes.log_weights = take(p.experts);
  planes.decode = take(p.experts);
  planes.grad_weights = take(p.experts);
  planes.grad_logits = take(p.experts);
  planes.largest = take(1);
  planes.sum = take(1);
  planes.entropy = take(1);
  planes.scale = take(1);
  planes.chosen = take(1);
  planes.spare = take(1);
  return planes;
}

inline bool is_kept(const MixBlock& block, int64_t k) { return !block.kept || block.kept[k]; }

void load_outputs(const Problem& p, const MixBlock& block, const Planes& planes) {
  for (int64_t k = 0; k < p.experts; ++k) {
    if (!is_kept(block, k)) continue;
    for (int64_t o = 0; o < p.outputs; ++o)
      each_pixel(block.count, [=](int64_t i) { planes.z[(k * p.outputs + o) * kTileWidth + i] = block.z[k][i * block.z_pixel + o]; });
  }
}

void load_logits(const Problem& p, const MixBlock& block, const Planes& planes) {
  for (int64_t k = 0; k < p.experts; ++k) {
    float* logits = planes.logits + k * kTileWidth;
    each_pixel(block.count, [=](int64_t i) { logits[i] = block.gate[i * block.gate_pixel + k]; });
    if (block.gate_logits)
      each_pixel(block.count, [=](int64_t i) { logits[i] += block.gate_logits[k * block.plane + i]; });
  }
}

// weights, log weights and entropy from the logits; NaN anywhere in a pixel's logits gives NaN in all of them.
void gate_softmax(const Problem& p, const MixBlock& block, const Planes& planes) {
  const int64_t n = block.count, K = p.experts;
  each_pixel(n, [=](int64_t i) {
    planes.largest[i] = planes.logits[i];
    planes.chosen[i] = 0;
  });
  for (int64_t k = 1; k < K; ++k)
    each_pixel(n, [=](int64_t i) {
      const float logit = planes.logits[k * kTileWidth + i];
      const bool larger = logit > planes.largest[i] || logit != logit;
      planes.largest[i] = larger ? logit : planes.largest[i];
      planes.chosen[i] = larger ? static_cast<float>(k) : planes.chosen[i];
    });
  // The shift comes before the division, so that a small temperature overflows towards weight 0 and not to NaN.
  const float temperature = at_least(p.temperature, FLT_MIN);
  each_pixel(n, [=](int64_t i) { planes.sum[i] = planes.spare[i] = 0; });
  for (int64_t k = 0; k < K; ++k)
    each_pixel(n, [=](int64_t i) {
      const float s = (planes.logits[k * kTileWidth + i] - planes.largest[i]) / temperature;
      const float e = fast_exp(s);
      planes.logits[k * kTileWidth + i] = s;
      planes.weights[k * kTileWidth + i] = e;
      planes.sum[i] += e;
      planes.spare[i] += static_cast<float>(k) == planes.chosen[i] ? 0.f : e;
    });
  // log(sum) through log1p of what the largest leaves over: exact where one expert has nearly everything.
  each_pixel(n, [=](int64_t i) {
    planes.spare[i] = log1pf(planes.spare[i]);
    planes.entropy[i] = 0;
  });
  for (int64_t k = 0; k < K; ++k)
    each_pixel(n, [=](int64_t i) {
      const float w = planes.weights[k * kTileWidth + i] / planes.sum[i];
      const float log_w = planes.logits[k * kTileWidth + i] - planes.spare[i];
      planes.weights[k * kTileWidth + i] = w;
      planes.log_weights[k * kTileWidth + i] = log_w;
      planes.entropy[i] -= w == 0.f ? 0.f : w * log_w;
    });
  const float most = logf(static_cast<float>(K));
  each_pixel(n, [=](int64_t i) {
    const float h = planes.entropy[i];
    planes.entropy[i] = h < 0.f ? 0.f : (h > most ? most : h);
  });
}

void single_expert(const MixBlock& block, const Planes& planes) {
  each_pixel(block.count, [=](int64_t i) {
    planes.weights[i] = 1.f;
    planes.log_weights[i] = 0.f;
    planes.entropy[i] = 0.f;
  });
}

void evaluate_gate(const Problem& p, const MixBlock& block, const Planes& planes) {
  if (!block.gate) return single_expert(block, planes);
  load_logits(p, block, planes);
  gate_softmax(p, block, planes);
}

// An expert whose weight stays below skip_below may be left out, unless it is the most probable one somewhere, or has a
// say in "switch"; with a logit that is not finite none may.
void find_kept(const Problem& p, const MixBlock& block, uint8_t* kept) {
  const Planes planes = carve(p, block.scratch);
  evaluate_gate(p, block, planes);
  const bool switching = p.mode == Mode::switch_ && p.skip_below > kSwitchMinWeight;
  const float threshold = switching ? kSwitchMinWeight : p.skip_below;
  for (int64_t k = 0; k < p.experts; ++k)
    for (int64_t i = 0; i < block.count; ++i) {
      const float w = planes.weights[k * kTileWidth + i], s = planes.logits[k * kTileWidth + i];
      const bool finite = s - s == 0.f;  // s is the logit's distance from the largest, so one bad logit shows in it
      if (!finite) {
        memset(kept, 1, p.experts);
        return;
      }
      kept[k] |= w >= threshold || static_cast<float>(k) == planes.chosen[i];
    }
}

void activate_experts(const Problem& p, const MixBlock& block, const Planes& planes) {
  const int64_t predicted = p.prediction_channels();
  for (int64_t k = 0; k < p.experts; ++k) {
    if (!is_kept(block, k)) continue;
    const float* z = planes.z + k * p.outputs * kTileWidth;
    float* activated = planes.activated + k * p.outputs * kTileWidth;
    activate(p.activation, z, predicted, block.count, activated);
    activate_confidence(p.conf_activation, z + predicted * kTileWidth, block.count,
                        activated + predicted * kTileWidth);
  }
}

// A gap beyond the range of float32 means the same as the largest factor in it.
inline float gap_factor(float gap) {
  const float factor = expf(gap);
  return factor > FLT_MAX ? FLT_MAX : factor;
}

// "switch": do the hypotheses of the experts that have a say differ by more than a factor exp(gap), in any channel?
bool hypotheses_disagree(const Problem& p, const MixBlock& block, const Planes& planes, float factor, int64_t i) {
  for (int64_t c = 0; c < p.prediction_channels(); ++c) {
    float largest = -INFINITY, smallest = INFINITY;
    bool nan = false;
    for (int64_t k = 0; k < p.experts; ++k) {
      if (!is_kept(block, k) || !(planes.weights[k * kTileWidth + i] > kSwitchMinWeight)) continue;
      const float d = planes.activated[(k * p.outputs + c) * kTileWidth + i];
      nan |= d != d;
      largest = d > largest ? d : largest;
      smallest = d < smallest ? d : smallest;
    }
    if (!nan && largest > factor * smallest) return true;
  }
  return false;
}

// Sets `decode`, and `chosen` to -1 where nothing was chosen.
void choose(const Problem& p, const MixBlock& block, const Planes& planes) {
  const bool may_choose = p.mode != Mode::mean && block.gate;
  const float factor = gap_factor(p.gap);
  each_pixel(block.count, [=](int64_t i) {
    const bool here =
        may_choose && (p.mode == Mode::argmax || hypotheses_disagree(p, block, planes, factor, i));
    if (!here) planes.chosen[i] = -1.f;
    float kept = 0;
    for (int64_t k = 0; k < p.experts; ++k)
      if (is_kept(block, k)) kept += planes.weights[k * kTileWidth + i];
    planes.scale[i] = block.kept && !here ? 1.f / kept : 1.f;  // what is left of a mean sums to one again
  });
  for (int64_t k = 0; k < p.experts; ++k)
    each_pixel(block.count, [=](int64_t i) {
      const float w = planes.weights[k * kTileWidth + i];
      const float one_hot = w != w ? w : (static_cast<float>(k) == planes.chosen[i] ? 1.f : 0.f);
      planes.decode[k * kTileWidth + i] = planes.chosen[i] < 0.f ? w * planes.scale[i] : one_hot;
    });
}

// Everything both directions need.
Planes evaluate(const Problem& p, const MixBlock& block) {
  const Planes planes = carve(p, block.scratch);
  load_outputs(p, block, planes);
  evaluate_gate(p, block, planes);
  activate_experts(p, block, planes);
  choose(p, block, planes);
  return planes;
}

// out = sum over experts of decode * value; what was not chosen may overflow unnoticed.
void decode_channel(const Problem& p, const MixBlock& block, const Planes& planes, int64_t channel, float* out) {
  each_pixel(block.count, [=](int64_t i) { planes.spare[i] = 0; });
  for (int64_t k = 0; k < p.experts; ++k) {
    if (!is_kept(block, k)) continue;
    const float* value = planes.activated + (k * p.outputs + channel) * kTileWidth;
    const float* decode = planes.decode + k * kTileWidth;
    each_pixel(block.count, [=](int64_t i) {
      const float term = decode[i] * value[i];
      planes.spare[i] += planes.chosen[i] >= 0.f && decode[i] == 0.f ? 0.f : term;
    });
  }
  memcpy(out, planes.spare, block.count * sizeof(float));
}

void mix(const Problem& p, const MixBlock& block, const Outputs& outputs) {
  const Planes planes = evaluate(p, block);
  const int64_t predicted = p.prediction_channels(), bytes = block.count * sizeof(float);
  for (int64_t c = 0; c < predicted; ++c) decode_channel(p, block, planes, c, outputs.prediction + c * block.plane);
  if (p.has_confidence()) decode_channel(p, block, planes, predicted, outputs.confidence);
  memcpy(outputs.entropy, planes.entropy, bytes);
  for (int64_t k = 0; k < p.experts; ++k) {
    if (outputs.weights) memcpy(outputs.weights + k * block.plane, planes.weights + k * kTileWidth, bytes);
    for (int64_t c = 0; outputs.hypotheses && c < predicted; ++c)
      memcpy(outputs.hypotheses + (k * predicted + c) * block.plane,
             planes.activated + (k * p.outputs + c) * kTileWidth, bytes);
  }
}

// --- backward ---

// grad *= act'(y), in place; `channels` planes. No gradient in, none out: an expert that overflows where another one
// was chosen must not turn 0 into NaN.
void activation_vjp(Activation kind, const float* y, int64_t channels, int64_t count, float* grad) {
  const auto each = [&](auto f) {
    for (int64_t c = 0; c < channels; ++c)
      each_pixel(count, [=](int64_t i) {
        const int64_t at = c * kTileWidth + i;
        grad[at] = grad[at] == 0.f ? 0.f : f(y[at], grad[at]);
      });
  };
  switch (kind) {
    case Activation::exp: return each([](float v, float g) { return g * fast_exp(v); });
    case Activation::relu: return each([](float v, float g) { return v <= 0.f ? 0.f : g; });
    case Activation::linear: return;
    case Activation::inv_log: return each([](float v, float g) { return g * fast_exp(fabsf(v)); });
    case Activation::sigmoid:
      return each([](float v, float g) {
        const float s = fast_sigmoid(v);
        return g * s * (1.f - s);
      });
    case Activation::xy_inv_log:
      each_pixel(count, [=](int64_t i) {
        const float log_z = y[2 * kTileWidth + i], z = inv_log(log_z);
        float& gx = grad[i];
        float& gy = grad[kTileWidth + i];
        float& gz = grad[2 * kTileWidth + i];
        if (gx == 0.f && gy == 0.f && gz == 0.f) return;
        gz = (gz + gx * y[i] + gy * y[kTileWidth + i]) * fast_exp(fabsf(log_z));
        gx *= z;
        gy *= z;
      });
      return;
    case Activation::norm:
    case Activation::norm_exp:
      each_pixel(count, [=](int64_t i) {
        const bool exponential = kind == Activation::norm_exp;
        float length = norm_of(y, channels, i);
        if (exponential) length = at_least(length, kSmallestNorm);
        bool none = true;
        for (int64_t c = 0; c < channels; ++c) none &= grad[c * kTileWidth + i] == 0.f;
        if (none) return;
        float along = 0;  // the gradient's component along the unit vector
        for (int64_t c = 0; c < channels; ++c) along += y[c * kTileWidth + i] / length * grad[c * kTileWidth + i];
        const float across_factor = exponential ? expm1f(length) / length : 1.f / length;
        const float along_factor = exponential ? fast_exp(length) : 0.f;
        for (int64_t c = 0; c < channels; ++c) {
          const float radial = y[c * kTileWidth + i] / length * along;
          float& g = grad[c * kTileWidth + i];
          g = across_factor * (g - radial) + along_factor * radial;
        }
      });
  }
}

void confidence_vjp(ConfActivation kind, const float* y, int64_t count, float* grad) {
  const Activation same_slope = kind == ConfActivation::sigmoid ? Activation::sigmoid : Activation::exp;
  activation_vjp(same_slope, y, 1, count, grad);
}

// Gradients of the activated values (into planes.gradient) and of the decode weights (into planes.grad_weights).
void decode_vjp(const Problem& p, const MixBlock& block, const Cotangents& given, const Planes& planes) {
  const int64_t predicted = p.prediction_channels();
  for (int64_t k = 0; k < p.experts; ++k) {
    float* grad_weight = planes.grad_weights + k * kTileWidth;
    const float* decode = planes.decode + k * kTileWidth;
    each_pixel(block.count, [=](int64_t i) { grad_weight[i] = 0; });
    for (int64_t o = 0; o < p.outputs; ++o) {
      const float* value = planes.activated + (k * p.outputs + o) * kTileWidth;
      float* grad = planes.gradient + (k * p.outputs + o) * kTileWidth;
      const float* out = o < predicted ? (given.prediction ? given.prediction + o * block.plane : nullptr)
                                       : given.confidence;
      each_pixel(block.count, [=](int64_t i) { grad[i] = out ? decode[i] * out[i] : 0.f; });
      if (out)
        each_pixel(block.count, [=](int64_t i) { grad_weight[i] += value[i] * out[i]; });
      if (o < predicted && given.hypotheses) {
        const float* direct = given.hypotheses + (k * predicted + o) * block.plane;
        each_pixel(block.count, [=](int64_t i) { grad[i] += direct[i]; });
      }
    }
    // a choice has no slope: there the gate learns from entropy and weights alone
    each_pixel(block.count, [=](int64_t i) { grad_weight[i] = planes.chosen[i] >= 0.f ? 0.f : grad_weight[i]; });
    if (given.weights)
      each_pixel(block.count, [=](int64_t i) { grad_weight[i] += given.weights[k * block.plane + i]; });
  }
}

// Through softmax and entropy, with s = logits / T:
//   grad s_k = w_k sum_j w_j ((grad w_k - grad w_j) - grad H (s_k - s_j)),
// pair by pair, because in the usual form, w_k (grad w_k - sum_j w_j grad w_j), what matters cancels where one expert
// has nearly everything. Finite where a weight underflows, whatever its logit.
void softmax_vjp(const Problem& p, const MixBlock& block, const float* grad_entropy, const Planes& planes) {
  const float temperature = at_least(p.temperature, FLT_MIN);
  for (int64_t k = 0; k < p.experts; ++k) {
    const float *w_k = planes.weights + k * kTileWidth, *s_k = planes.logits + k * kTileWidth;
    const float* grad_k = planes.grad_weights + k * kTileWidth;
    float* out = planes.grad_logits + k * kTileWidth;
    each_pixel(block.count, [=](int64_t i) { out[i] = 0; });
    for (int64_t j = 0; j < p.experts; ++j) {
      const float *w_j = planes.weights + j * kTileWidth, *s_j = planes.logits + j * kTileWidth;
      const float* grad_j = planes.grad_weights + j * kTileWidth;
      each_pixel(block.count, [=](int64_t i) {
        const float both = w_k[i] * w_j[i], entropy = grad_entropy ? grad_entropy[i] : 0.f;
        const float term = both * ((grad_k[i] - grad_j[i]) - entropy * (s_k[i] - s_j[i]));
        out[i] += both == 0.f ? 0.f : term;
      });
    }
    each_pixel(block.count, [=](int64_t i) { out[i] /= temperature; });
  }
}

void mix_backward(const Problem& p, const MixBlock& block, const Cotangents& given, const MixGradients& out) {
  const Planes planes = evaluate(p, block);
  const int64_t predicted = p.prediction_channels();
  decode_vjp(p, block, given, planes);
  if (block.gate) softmax_vjp(p, block, given.entropy, planes);
  for (int64_t k = 0; k < p.experts; ++k) {
    const float* z = planes.z + k * p.outputs * kTileWidth;
    float* grad = planes.gradient + k * p.outputs * kTileWidth;
    activation_vjp(p.activation, z, predicted, block.count, grad);
    if (p.has_confidence())
      confidence_vjp(p.conf_activation, z + predicted * kTileWidth, block.count, grad + predicted * kTileWidth);
    for (int64_t o = 0; o < p.outputs; ++o)
      each_pixel(block.count, [=](int64_t i) { out.z[k][i * block.z_pixel + o] = grad[o * kTileWidth + i]; });
    if (block.gate) each_pixel(block.count, [=](int64_t i) { out.gate[i * block.gate_pixel + k] = planes.grad_logits[k * kTileWidth + i]; });
  }
}

}  // namespace
}  // namespace moe::cpu

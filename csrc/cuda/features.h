// From x to a band of upsampled features, the parameters in the order of the convolution, and the upsampling's adjoint.
#pragma once

#include <string.h>

#include "numerics.h"

namespace moe::cuda {

MOE_DEVICE float element_at(const void* values, Element element, int64_t index) {
  switch (element) {
    case Element::float32: return static_cast<const float*>(values)[index];
    case Element::bfloat16: return to_float(static_cast<const Bf16*>(values)[index]);
    case Element::float16: return to_float(static_cast<const Half*>(values)[index]);
  }
  return 0.f;
}

// F = upsample(x) + pos as operands, and zeros outside the image and the channels; a thread makes 16 bytes of a pixel.
template <class Arithmetic>
struct Upsample {
  static constexpr int kThreads = 256;
  static constexpr int kCount = 16 / sizeof(Operand<Arithmetic>);

  struct Params {
    Problem problem;
    Band band;
    Operand<Arithmetic>* features;
    bool wide;  // x's channels lie side by side, in aligned chunks of 16 bytes
  };

  static Grid grid(const Params& p) {
    return {divide_up(p.band.pitch * (p.band.channels / kCount), kThreads), p.band.rows, p.band.frames};
  }

  MOE_DEVICE static void run(const Params& p) {
    const Problem& problem = p.problem;
    const int chunks = p.band.channels / kCount;
    const int index = block_index().x * kThreads + thread_index();
    if (index >= p.band.pitch * chunks) return;
    const int first = index % chunks * kCount;
    const int row = p.band.first_row + block_index().y, column = index / chunks - 1;
    const int64_t pixel = p.band.pixel(block_index().z, block_index().y, column + 1);

    float values[kCount] = {};
    if (row >= 0 && row < problem.height && column >= 0 && column < problem.width && first < problem.channels) {
      const auto y = source_position(row, static_cast<int>(problem.in_height), static_cast<int>(problem.height));
      const auto x = source_position(column, static_cast<int>(problem.in_width), static_cast<int>(problem.width));
      const int64_t* strides = problem.x_strides;
      const int64_t frame = p.band.first_frame + block_index().z;
      const int64_t corner = frame * strides[0] + first * strides[1] + y.lower * strides[2] + x.lower * strides[3];
      blend(p, values, corner, x.upper_weight, first);
      if (y.upper_weight > 0.f) {  // a neighbour of weight 0 is not read: it may lie outside, or be NaN
        float below[kCount];
        blend(p, below, corner + strides[2], x.upper_weight, first);
        MOE_UNROLL
        for (int i = 0; i < kCount; ++i)
          values[i] = fused(below[i], y.upper_weight, values[i] * (1.f - y.upper_weight));
      }
      if (problem.pos_x) add_position(problem, values, row, column, first);
    }
    Operand<Arithmetic> operands[kCount];
    MOE_UNROLL
    for (int i = 0; i < kCount; ++i) operands[i] = to_operand<Arithmetic>(values[i]);
    Chunk chunk;
    memcpy(&chunk, operands, sizeof chunk);
    *reinterpret_cast<Chunk*>(p.features + pixel * p.band.channels + first) = chunk;
  }

 private:
  MOE_DEVICE static void blend(const Params& p, float (&values)[kCount], int64_t left, float weight, int first) {
    load(p, values, left, first);
    if (weight == 0.f) return;
    float right[kCount];
    load(p, right, left + p.problem.x_strides[3], first);
    MOE_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = fused(right[i], weight, values[i] * (1.f - weight));
  }

  MOE_DEVICE static void load(const Params& p, float (&values)[kCount], int64_t at, int first) {
    const void* x = p.problem.x;
    if (!p.wide) {
      MOE_UNROLL
      for (int i = 0; i < kCount; ++i)
        values[i] = first + i < p.problem.channels
                        ? element_at(x, p.problem.x_element, at + i * p.problem.x_strides[1])
                        : 0.f;
    } else if (p.problem.x_element == Element::float32) {
      MOE_UNROLL
      for (int i = 0; i < kCount / 4; ++i) {
        const Chunk chunk = *reinterpret_cast<const Chunk*>(static_cast<const float*>(x) + at + 4 * i);
        MOE_UNROLL
        for (int e = 0; e < 4; ++e) values[4 * i + e] = as_float(chunk.words[e]);
      }
    } else {
      MOE_UNROLL
      for (int i = 0; i < kCount / 4; ++i) {
        const uint64_t four = *reinterpret_cast<const uint64_t*>(static_cast<const uint16_t*>(x) + at + 4 * i);
        MOE_UNROLL
        for (int e = 0; e < 4; ++e) {
          const auto bits = static_cast<uint16_t>(four >> (16 * e));
          values[4 * i + e] = p.problem.x_element == Element::bfloat16 ? to_float(Bf16{bits}) : to_float(Half{bits});
        }
      }
    }
  }

  MOE_DEVICE static void add_position(const Problem& p, float (&values)[kCount], int64_t row, int64_t column,
                                      int first) {
    const int half = static_cast<int>(p.channels / 2);
    MOE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int c = first + i;
      if (c < half) values[i] += p.pos_x[column * half + c];
      else if (c < p.channels) values[i] += p.pos_y[row * half + c - half];
    }
  }
};

// The 3x3 weight from a channel to a column; 0 in the padding.
MOE_DEVICE float first_weight(const Problem& p, const Columns& layout, int column, int channel, int tap) {
  const int owner = layout.owner(column);
  if (owner < 0 || channel >= p.channels) return 0.f;
  const int local = column - layout.first(owner);
  const bool gate = owner == layout.experts;
  const int64_t row = gate ? local : static_cast<int64_t>(owner) * layout.hidden + local;
  return (gate ? p.gate_w1 : p.expert_w1)[(row * p.channels + channel) * kTaps + tap];
}

// The 3x3 weights as the convolution reads them, [blocks of channels][taps][columns][channels of a block]; forward, or
// with taps flipped and channels exchanged for its adjoint. A thread makes one operand.
template <class Arithmetic>
struct PackWeights {
  static constexpr int kThreads = 256;

  struct Params {
    Problem problem;
    Columns layout;
    bool adjoint;
    int columns, channels;  // of the packed weights, padded
    Operand<Arithmetic>* packed;
  };

  static Grid grid(const Params& p) {
    return {divide_up(static_cast<int64_t>(p.columns) * p.channels * kTaps, kThreads)};
  }

  MOE_DEVICE static void run(const Params& p) {
    const int index = block_index().x * kThreads + thread_index(), row = index / kStep<Arithmetic>;
    if (index >= p.columns * p.channels * kTaps) return;
    const int column = row % p.columns, tap = row / p.columns % kTaps;
    const int channel = row / p.columns / kTaps * kStep<Arithmetic> + index % kStep<Arithmetic>;
    const float value = p.adjoint ? first_weight(p.problem, p.layout, channel, column, kTaps - 1 - tap)
                                  : first_weight(p.problem, p.layout, column, channel, tap);
    p.packed[index] = to_operand<Arithmetic>(value);
  }
};

// First biases and second weights by column: bias [columns], weights [most outputs][columns], 0 in the padding.
struct PackColumns {
  static constexpr int kThreads = 256;

  struct Params {
    Problem problem;
    Columns layout;
    float *bias, *weights;
  };

  static Grid grid(const Params& p) {
    return {divide_up(p.layout.total, kThreads), p.layout.most_outputs() + 1};
  }

  MOE_DEVICE static void run(const Params& p) {
    const int column = block_index().x * kThreads + thread_index(), output = block_index().y - 1;
    if (column >= p.layout.total) return;
    const int owner = p.layout.owner(column), local = owner < 0 ? 0 : column - p.layout.first(owner);
    const bool gate = owner == p.layout.experts;
    const int64_t channels = gate ? p.layout.gate_hidden : p.layout.hidden;
    if (output < 0) {
      const float* from = gate ? p.problem.gate_b1 : p.problem.expert_b1 + owner * channels;
      p.bias[column] = owner < 0 ? 0.f : from[local];
      return;
    }
    const bool real = owner >= 0 && output < p.layout.outputs_of(owner);
    const float* from = gate ? p.problem.gate_w2 : p.problem.expert_w2 + owner * p.layout.outputs * channels;
    p.weights[static_cast<int64_t>(output) * p.layout.total + column] = real ? from[output * channels + local] : 0.f;
  }
};

// The upsampling's adjoint, a gather: adds what a band's gradients give to a source pixel's channel, or starts with it.
struct Downsample {
  static constexpr int kThreads = 256;

  struct Params {
    Problem problem;
    const float* gradients;  // [rows of the planes][pitch][channels]
    Planes planes;           // one frame
    int channels;            // padded
    bool first;              // of the frame's bands
    float* x;                // this frame's [h, w, C]
  };

  static Grid grid(const Params& p) {
    return {divide_up(p.problem.in_width * p.problem.channels, kThreads), p.problem.in_height};
  }

  MOE_DEVICE static void run(const Params& p) {
    const Problem& problem = p.problem;
    const int channels = static_cast<int>(problem.channels), within = block_index().x * kThreads + thread_index();
    if (within >= problem.in_width * channels) return;
    const int source_row = block_index().y, source_column = within / channels, channel = within % channels;
    const int64_t index = source_row * (problem.in_width * channels) + within;
    const int in_height = static_cast<int>(problem.in_height), in_width = static_cast<int>(problem.in_width);
    const int height = static_cast<int>(problem.height), width = static_cast<int>(problem.width);
    const int left = first_target(source_column, in_width, width);
    const int top = first_target(source_row, in_height, height);
    const int last = p.planes.first_row + p.planes.rows;
    float sum = p.first ? 0.f : p.x[index];
    for (int row = top > p.planes.first_row ? top : p.planes.first_row; row < last; ++row) {
      const float row_weight = source_weight(source_row, row, in_height, height);
      if (row_weight == 0.f && row > top + 1) break;
      if (row_weight == 0.f) continue;
      for (int column = left; column < width; ++column) {
        const float weight = row_weight * source_weight(source_column, column, in_width, width);
        if (weight == 0.f && column > left + 1) break;
        if (weight == 0.f) continue;
        const int64_t at = p.planes.pixel(0, row - p.planes.first_row, column) * p.channels + channel;
        sum = fused(weight, p.gradients[at], sum);
      }
    }
    p.x[index] = sum;
  }
};

}  // namespace moe::cuda

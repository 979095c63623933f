// The backward pass behind the recomputed hidden activations: the gradient before their ReLU, and the sums over pixels
// that are the parameters' gradients. Every partial sum has one writer, and all are added up in a fixed order.
#pragma once

#include "convolution.h"
#include "numerics.h"

namespace moe::cuda {

// In place, from hidden activations to the gradient before their ReLU; zeros outside the image. A block is a row of the
// band, a thread a column of hidden channels; on the way it sums, over the row's own pixels, what the second weights
// and the first biases get.
template <class Arithmetic>
struct HiddenGradient {
  static constexpr int kThreads = 128;
  static constexpr int kTogether = 4;  // outputs of the second layer that one pass over the row serves

  struct Params {
    Columns layout;
    const float* weights;        // [most outputs][columns]
    const float* raw_gradients;  // planes of raw outputs; row 0 is the band's
    Planes planes;
    Operand<Arithmetic>* hidden;
    Band band;
    int height, width;           // of the image
    int own_first, own_last;     // rows that no other band sums
    bool first;                  // start the sums, or add to them
    float* sum_weights;          // [band rows][most outputs][columns], or null
    float* sum_bias;             // [band rows][columns], or null
  };

  static Grid grid(const Params& p) { return {divide_up(p.layout.total, kThreads), p.band.rows}; }

  MOE_DEVICE static void run(const Params& p) {
    const int column = block_index().x * kThreads + thread_index(), band_row = block_index().y;
    if (column >= p.layout.total) return;
    const int row = p.band.first_row + band_row, owner = p.layout.owner(column);
    const int64_t pitch = p.band.channels;
    Operand<Arithmetic>* hidden = p.hidden + p.band.pixel(0, band_row, 1) * pitch + column;
    const bool inside = row >= 0 && row < p.height && owner >= 0 && band_row < p.planes.rows;
    const int visible = inside ? p.width : 0, owned = row >= p.own_first && row < p.own_last ? visible : 0;
    const int outputs = inside ? p.layout.outputs_of(owner) : 0;
    const float* raw = p.raw_gradients + p.planes.pixel(0, band_row, 0);
    if (owner >= 0) raw += p.layout.raw_output(owner, 0) * p.planes.size();

    if (p.sum_weights) {
      for (int first = 0; first < p.layout.most_outputs(); first += kTogether)
        add_weights(p, hidden, raw, first, outputs, owned, band_row, column);
    }
    float sum = 0.f;
    for (int x = 0; x < visible; ++x) {
      float back = 0.f;
      for (int o = 0; o < outputs; ++o)
        back = fused(raw[o * p.planes.size() + x], p.weights[static_cast<int64_t>(o) * p.layout.total + column], back);
      if (to_float(hidden[x * pitch]) <= 0.f) back = 0.f;  // NaN passes, as through ReLU
      hidden[x * pitch] = to_operand<Arithmetic>(back);
      if (x < owned) sum += back;
    }
    for (int x = visible; x < p.band.pitch - 1; ++x) hidden[x * pitch] = to_operand<Arithmetic>(0.f);
    hidden[-pitch] = to_operand<Arithmetic>(0.f);
    if (!p.sum_bias) return;
    float& slot = p.sum_bias[static_cast<int64_t>(band_row) * p.layout.total + column];
    slot = p.first ? sum : slot + sum;
  }

 private:
  MOE_DEVICE static void add_weights(const Params& p, const Operand<Arithmetic>* hidden, const float* raw, int first,
                                     int outputs, int owned, int band_row, int column) {
    float sums[kTogether] = {};
    for (int x = 0; x < owned && first < outputs; ++x) {
      const float h = to_float(hidden[static_cast<int64_t>(x) * p.band.channels]);
      MOE_UNROLL
      for (int i = 0; i < kTogether; ++i)
        if (first + i < outputs) sums[i] = fused(h, raw[(first + i) * p.planes.size() + x], sums[i]);
    }
    float* slots = p.sum_weights + static_cast<int64_t>(band_row) * p.layout.most_outputs() * p.layout.total + column;
    MOE_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= p.layout.most_outputs()) continue;
      float& slot = slots[static_cast<int64_t>(first + i) * p.layout.total];
      slot = p.first ? sums[i] : slot + sums[i];
    }
  }
};

// The second biases' gradients: a warp sums one row of one plane.
struct RowSums {
  static constexpr int kThreads = kWarp;

  struct Params {
    const float* planes_of_raw;
    Planes planes;
    int raw_outputs, width;
    int own_first, own_last;
    bool first;
    float* sums;  // [rows][raw outputs]
  };

  static Grid grid(const Params& p) { return {p.raw_outputs, p.planes.rows}; }

  MOE_DEVICE static void run(const Params& p) {
    const int output = block_index().x, band_row = block_index().y, row = p.planes.first_row + band_row;
    const int owned = row >= p.own_first && row < p.own_last ? p.width : 0;
    const float* from = p.planes_of_raw + output * p.planes.size() + p.planes.pixel(0, band_row, 0);
    float sum = 0.f;
    for (int x = lane_index(); x < owned; x += kWarp) sum += from[x];
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() > 0) return;
    float& slot = p.sums[static_cast<int64_t>(band_row) * p.raw_outputs + output];
    slot = p.first ? sum : slot + sum;
  }
};

// The 3x3 weights' gradient: for each tap, features transposed times hidden gradients, summed over pixels. A block has
// 64 channels of one tap x a group of columns, over the rows of its split: split, split + splits, ...
template <class Arithmetic, int kWidth>
struct WeightGradient {
  static constexpr int kThreads = 256;
  static constexpr int kStages = 3;
  static constexpr int kPixels = 32;    // of a row, in one step
  static constexpr int kChannels = 64;  // of the features
  static constexpr int kWarpsM = kWidth == kWide ? 2 : 4, kWarpsN = kThreads / kWarp / kWarpsM;
  static constexpr int kMTiles = kChannels / kWarpsM / 16, kNTiles = kWidth / kWarpsN / 8;
  static constexpr int kSize = static_cast<int>(sizeof(Operand<Arithmetic>));
  static constexpr int kFeatureRow = kChannels * kSize, kHiddenRow = kWidth * kSize;  // bytes of one pixel
  static constexpr int kStageBytes = kPixels * (kFeatureRow + kHiddenRow);
  static constexpr size_t kSharedBytes = kStages * kStageBytes;
  using Sums = float[kMTiles][kNTiles][4];

  struct Params {
    const Operand<Arithmetic>*features, *hidden;
    Band feature_band, hidden_band;
    int feature_row, hidden_row;  // of the bands: that of the first pixel summed, under the first tap and under none
    int rows, chunks;             // rows summed, and kPixels of each
    int splits;
    bool first;
    float* sums;                  // [splits][taps][channels][columns]
  };

  static Grid grid(const Params& p) {
    return {kTaps * divide_up(p.feature_band.channels, kChannels), divide_up(p.hidden_band.channels, kWidth), p.splits};
  }

  MOE_DEVICE static void run(const Params& p) {
    const int blocks = (p.feature_band.channels + kChannels - 1) / kChannels;
    const int tap = block_index().x / blocks, split = block_index().z;
    const int first_channel = block_index().x % blocks * kChannels, first_column = block_index().y * kWidth;
    const uint32_t ring = shared_address(shared_memory());
    const int steps = split < p.rows ? ((p.rows - split - 1) / p.splits + 1) * p.chunks : 0;

    const auto copy = [&](int step) {
      const int row = split + step / p.chunks * p.splits, column = step % p.chunks * kPixels;
      const uint32_t to = ring + step % kStages * kStageBytes;
      const auto* features = p.features + first_channel +
                             p.feature_band.pixel(0, p.feature_row + row + tap / 3, column + tap % 3) *
                                 p.feature_band.channels;
      constexpr int kFeatureChunks = kFeatureRow / 16, kHiddenChunks = kHiddenRow / 16;
      for (int i = thread_index(); i < kPixels * kFeatureChunks; i += kThreads) {
        const int pixel = i / kFeatureChunks, chunk = i % kFeatureChunks;
        const bool real = first_channel + chunk * (16 / kSize) < p.feature_band.channels;
        copy_async(to + feature_chunk(pixel, chunk),
                   features + (real ? pixel * p.feature_band.channels + chunk * (16 / kSize) : 0), real);
      }
      const auto* hidden =
          p.hidden + first_column + p.hidden_band.pixel(0, p.hidden_row + row, column + 1) * p.hidden_band.channels;
      for (int i = thread_index(); i < kPixels * kHiddenChunks; i += kThreads) {
        const int pixel = i / kHiddenChunks, chunk = i % kHiddenChunks;
        copy_async(to + kPixels * kFeatureRow + hidden_chunk(pixel, chunk),
                   hidden + pixel * p.hidden_band.channels + chunk * (16 / kSize), true);
      }
    };

    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copy(step);
      commit_copies();
    }
    Sums sums;
    MOE_UNROLL
    for (int i = 0; i < kMTiles; ++i) {
      MOE_UNROLL
      for (int j = 0; j < kNTiles; ++j) {
        MOE_UNROLL
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.f;
      }
    }
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      sync_block();
      if (step + kStages - 1 < steps) copy(step + kStages - 1);
      commit_copies();
      const uint32_t stage = ring + step % kStages * kStageBytes;
      if constexpr (sizeof(Operand<Arithmetic>) == 2)
        multiply_matrices(sums, stage, stage + kPixels * kFeatureRow);
      else
        multiply_words(sums, step % kStages * kStageBytes);
    }
    wait_for_copies<0>();
    store(p, sums, tap, split, first_channel, first_column);
  }

 private:
  // Swizzles: 16-bit rows are read eight pixels x 16 bytes at a time, 32-bit ones four pixels x 8 numbers.
  MOE_DEVICE static uint32_t feature_chunk(int pixel, int chunk) {
    return pixel * kFeatureRow + ((kSize == 2 ? chunk ^ (pixel & 7) : chunk ^ (pixel & 3) << 1) << 4);
  }
  MOE_DEVICE static uint32_t hidden_chunk(int pixel, int chunk) {
    const int turn = kSize == 4 ? (pixel & 3) << 1 : kWidth == kWide ? pixel & 7 : pixel >> 1 & 3;
    return pixel * kHiddenRow + ((chunk ^ turn) << 4);
  }

  MOE_DEVICE static void multiply_matrices(Sums& sums, uint32_t features, uint32_t hidden) {
    const int lane = lane_index(), matrix = lane / 8;
    const int first_channel = warp_index() % kWarpsM * kMTiles * 16, first_column = warp_index() / kWarpsM * kNTiles * 8;
    MOE_UNROLL
    for (int k = 0; k < kPixels; k += 16) {
      uint32_t a[kMTiles][4], b[kNTiles / 2][4];
      MOE_UNROLL
      for (int i = 0; i < kMTiles; ++i) {
        const int pixel = k + matrix / 2 * 8 + lane % 8, chunk = (first_channel + i * 16) / 8 + matrix % 2;
        load_matrices_transposed(a[i], features + feature_chunk(pixel, chunk));
      }
      MOE_UNROLL
      for (int j = 0; j < kNTiles / 2; ++j) {
        const int pixel = k + matrix % 2 * 8 + lane % 8, chunk = (first_column + j * 16) / 8 + matrix / 2;
        load_matrices_transposed(b[j], hidden + hidden_chunk(pixel, chunk));
      }
      MOE_UNROLL
      for (int i = 0; i < kMTiles; ++i) {
        MOE_UNROLL
        for (int j = 0; j < kNTiles; ++j) {
          const uint32_t operand[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply(Arithmetic{}, sums[i][j], a[i], operand);
        }
      }
    }
  }

  // 32-bit operands cannot be transposed on loading: every lane reads its own numbers.
  MOE_DEVICE static void multiply_words(Sums& sums, int stage) {
    const char* features = shared_memory() + stage;
    const char* hidden = features + kPixels * kFeatureRow;
    const int group = lane_index() / 4, member = lane_index() % 4;
    const int first_channel = warp_index() % kWarpsM * kMTiles * 16, first_column = warp_index() / kWarpsM * kNTiles * 8;
    const auto feature = [&](int pixel, int channel) {
      return *reinterpret_cast<const float*>(features + feature_chunk(pixel, channel / 4) + channel % 4 * 4);
    };
    const auto gradient = [&](int pixel, int column) {
      return *reinterpret_cast<const float*>(hidden + hidden_chunk(pixel, column / 4) + column % 4 * 4);
    };
    if constexpr (std::is_same_v<Arithmetic, Tf32>) {
      for (int k = 0; k < kPixels; k += 8) {
        uint32_t a[kMTiles][4], b[kNTiles][2];
        MOE_UNROLL
        for (int i = 0; i < kMTiles; ++i) {
          MOE_UNROLL
          for (int e = 0; e < 4; ++e)
            a[i][e] = as_bits(feature(k + member + e / 2 * 4, first_channel + i * 16 + group + e % 2 * 8));
        }
        MOE_UNROLL
        for (int j = 0; j < kNTiles; ++j) {
          MOE_UNROLL
          for (int e = 0; e < 2; ++e) b[j][e] = as_bits(gradient(k + member + e * 4, first_column + j * 8 + group));
        }
        MOE_UNROLL
        for (int i = 0; i < kMTiles; ++i) {
          MOE_UNROLL
          for (int j = 0; j < kNTiles; ++j) multiply(Tf32{}, sums[i][j], a[i], b[j]);
        }
      }
    } else {
      for (int pixel = 0; pixel < kPixels; ++pixel) {
        MOE_UNROLL
        for (int i = 0; i < kMTiles; ++i) {
          MOE_UNROLL
          for (int j = 0; j < kNTiles; ++j) {
            MOE_UNROLL
            for (int e = 0; e < 4; ++e)
              sums[i][j][e] = fused(feature(pixel, first_channel + i * 16 + group + e / 2 * 8),
                                    gradient(pixel, first_column + j * 8 + 2 * member + e % 2), sums[i][j][e]);
          }
        }
      }
    }
  }

  MOE_DEVICE static void store(const Params& p, const Sums& sums, int tap, int split, int first_channel,
                               int first_column) {
    const int group = lane_index() / 4, member = lane_index() % 4;
    MOE_UNROLL
    for (int i = 0; i < kMTiles; ++i) {
      MOE_UNROLL
      for (int j = 0; j < kNTiles; ++j) {
        MOE_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int channel = first_channel + (warp_index() % kWarpsM * kMTiles + i) * 16 + group + e / 2 * 8;
          const int column = first_column + (warp_index() / kWarpsM * kNTiles + j) * 8 + 2 * member + e % 2;
          if (channel >= p.feature_band.channels) continue;
          float& slot = p.sums[((static_cast<int64_t>(split) * kTaps + tap) * p.feature_band.channels + channel) *
                                   p.hidden_band.channels + column];
          slot = p.first ? sums[i][j][e] : slot + sums[i][j][e];
        }
      }
    }
  }
};

// Partial sums, added up in order and put into the parameters' own shapes. A thread makes one number.
struct CollectWeights {
  static constexpr int kThreads = 256;

  struct Params {
    Columns layout;
    const float* sums;  // [splits][taps][channels of the band][columns]
    int splits, band_channels, channels;
    float *expert_w1, *gate_w1;  // or null
  };

  static Grid grid(const Params& p) { return {divide_up(p.layout.total, kThreads), p.channels, kTaps}; }

  MOE_DEVICE static void run(const Params& p) {
    const int column = block_index().x * kThreads + thread_index();
    const int channel = block_index().y, tap = block_index().z;
    const int owner = column < p.layout.total ? p.layout.owner(column) : -1;
    if (owner < 0) return;
    const bool gate = owner == p.layout.experts;
    float* to = gate ? p.gate_w1 : p.expert_w1;
    if (!to) return;
    float sum = 0.f;
    for (int split = 0; split < p.splits; ++split)
      sum += p.sums[((static_cast<int64_t>(split) * kTaps + tap) * p.band_channels + channel) * p.layout.total + column];
    const int64_t row = (gate ? 0 : static_cast<int64_t>(owner) * p.layout.hidden) + column - p.layout.first(owner);
    to[(row * p.channels + channel) * kTaps + tap] = sum;
  }
};

struct CollectColumns {
  static constexpr int kThreads = 128;

  struct Params {
    Columns layout;
    int rows;
    const float *sum_weights, *sum_bias;  // [rows][most outputs][columns], [rows][columns]
    float *expert_b1, *expert_w2, *gate_b1, *gate_w2;  // or null
  };

  static Grid grid(const Params& p) {
    return {divide_up(p.layout.total, kThreads), p.layout.most_outputs() + 1};
  }

  MOE_DEVICE static void run(const Params& p) {
    const int column = block_index().x * kThreads + thread_index(), output = block_index().y - 1;
    const int owner = column < p.layout.total ? p.layout.owner(column) : -1;
    if (owner < 0 || output >= p.layout.outputs_of(owner)) return;
    const bool gate = owner == p.layout.experts;
    const int channels = p.layout.channels(owner), local = column - p.layout.first(owner);
    if (output < 0) {
      float* to = gate ? p.gate_b1 : p.expert_b1;
      if (to) to[(gate ? 0 : owner * channels) + local] = sum(p.sum_bias + column, p.rows, p.layout.total);
      return;
    }
    float* to = gate ? p.gate_w2 : p.expert_w2;
    const int64_t row = (gate ? 0 : static_cast<int64_t>(owner) * p.layout.outputs) + output;
    const int64_t pitch = static_cast<int64_t>(p.layout.most_outputs()) * p.layout.total;
    const float* from = p.sum_weights + static_cast<int64_t>(output) * p.layout.total + column;
    if (to) to[row * channels + local] = sum(from, p.rows, pitch);
  }

  MOE_DEVICE static float sum(const float* from, int rows, int64_t pitch) {
    float total = 0.f;
    for (int row = 0; row < rows; ++row) total += from[row * pitch];
    return total;
  }
};

struct CollectBiases {
  static constexpr int kThreads = 128;

  struct Params {
    Columns layout;
    int rows;
    const float* sums;             // [rows][raw outputs]
    float *expert_b2, *gate_b2;  // or null
  };

  static Grid grid(const Params& p) { return {divide_up(p.layout.raw_outputs(), kThreads)}; }

  MOE_DEVICE static void run(const Params& p) {
    const int output = block_index().x * kThreads + thread_index(), count = p.layout.raw_outputs();
    if (output >= count) return;
    const int of_experts = p.layout.experts * p.layout.outputs;
    float* to = output < of_experts ? p.expert_b2 : p.gate_b2;
    if (to) to[output < of_experts ? output : output - of_experts] = CollectColumns::sum(p.sums + output, p.rows, count);
  }
};

}  // namespace moe::cuda

// Interpolation and the 1x1 layers, forward and adjoint.
#pragma once

#include "simd.h"

namespace moe::cpu {
namespace {

void blend_columns(const float* products, const ColumnBlend* blends, int64_t begin, int64_t end, const float* start,
                   float* out, int64_t out_plane) {
  for (int64_t X = begin; X < end; ++X) {
    const float* column[kBlend];  // read before the first store, which the compiler must think may change them
    Vec weight[kBlend];
    for (int t = 0; t < kBlend; ++t) {
      column[t] = products + blends[X].offset[t];
      weight[t] = broadcast(blends[X].weight[t]);
    }
    for (int v = 0; v < kGroupVecs; ++v)
      for (int dy = 0; dy < 3; ++dy) {
        const int64_t at = dy * kRowTap + v * kLanes, to = dy * out_plane + X * kGroup + v * kLanes;
        Vec sum = start ? load(start + to) : Vec{};
        for (int t = 0; t < kBlend; ++t) sum += weight[t] * load(column[t] + at);
        store(out + to, sum);
      }
  }
}

template <bool Relu, bool Sums>
void blend_pixels(const RowBlend& blend_in_memory, const float* base, int64_t begin, int64_t end, int64_t width,
                  float* hidden, float* sum) {
  const RowBlend blend = blend_in_memory;  // a copy that stores to hidden cannot change
  Vec total[kGroupVecs] = {};
  for (int64_t X = begin; X < end; ++X)
    for (int v = 0; v < kGroupVecs; ++v) {
      Vec value = load(base + edge_kind(X, width) * kGroup + v * kLanes);
      for (int t = 0; t < kBlend; ++t) value += blend.weight[t] * load(blend.row[t] + X * kGroup + v * kLanes);
      if (Sums) total[v] += value;
      store(hidden + (X - begin) * kGroup + v * kLanes, Relu ? relu(value) : value);
    }
  if (Sums)
    for (int v = 0; v < kGroupVecs; ++v) store(sum + v * kLanes, load(sum + v * kLanes) + total[v]);
}

void blend_rows(const RowBlend& blend, const float* base, int64_t begin, int64_t end, int64_t width, float* hidden,
                float* sum) {
  if (sum)
    blend_pixels<true, true>(blend, base, begin, end, width, hidden, sum);
  else
    blend_pixels<true, false>(blend, base, begin, end, width, hidden, sum);
}

void blend_rows_linear(const RowBlend& blend, const float* base, int64_t begin, int64_t end, int64_t width,
                       float* out) {
  blend_pixels<false, false>(blend, base, begin, end, width, out, nullptr);
}

void blend_corners(const float* const* corners, const float* weights, int64_t channels, float* out) {
  const float *c0 = corners[0], *c1 = corners[1], *c2 = corners[2], *c3 = corners[3];
  const Vec w0 = broadcast(weights[0]), w1 = broadcast(weights[1]);
  const Vec w2 = broadcast(weights[2]), w3 = broadcast(weights[3]);
  for (int64_t c = 0; c < channels; c += kLanes)
    store(out + c, w0 * load(c0 + c) + w1 * load(c1 + c) + w2 * load(c2 + c) + w3 * load(c3 + c));
}

constexpr int kPixelsAtOnce = 6;  // independent sums, so that the multiply-add's latency is hidden; a tile's width
static_assert(kPixelsAtOnce == kHeadTile);

template <int Pixels>
inline void second_layer_pixels(const float* hidden, const float* w2, int64_t padded, const float* start, float* z,
                                int64_t z_pixel) {
  for (int64_t o = 0; o < padded; o += kSecondAlign) {
    Vec4 sum[Pixels];
    for (int i = 0; i < Pixels; ++i) sum[i] = load4(start ? start + o : z + i * z_pixel + o);
    for (int n = 0; n < kGroup; ++n) {
      const Vec4 weight = load4(w2 + n * padded + o);
      for (int i = 0; i < Pixels; ++i) sum[i] += hidden[i * kGroup + n] * weight;
    }
    for (int i = 0; i < Pixels; ++i) store4(z + i * z_pixel + o, sum[i]);
  }
}

void second_layer(const float* hidden, int64_t count, const float* w2, int64_t padded, const float* start, float* z,
                  int64_t z_pixel) {
  int64_t i = 0;
  for (; i + kPixelsAtOnce <= count; i += kPixelsAtOnce)
    second_layer_pixels<kPixelsAtOnce>(hidden + i * kGroup, w2, padded, start, z + i * z_pixel, z_pixel);
  for (; i + 2 <= count; i += 2)
    second_layer_pixels<2>(hidden + i * kGroup, w2, padded, start, z + i * z_pixel, z_pixel);
  for (; i < count; ++i) second_layer_pixels<1>(hidden + i * kGroup, w2, padded, start, z + i * z_pixel, z_pixel);
}

void second_layer_backward(float* hidden, int64_t count, const float* w2, int64_t outputs,
                           const float* grad_z, int64_t z_pixel) {
  const Vec zero = {};
  for (int64_t i = 0; i < count; ++i)
    for (int v = 0; v < kGroupVecs; ++v) {
      float* at = hidden + i * kGroup + v * kLanes;
      Vec sum = {};
      for (int64_t o = 0; o < outputs; ++o)
        sum += grad_z[i * z_pixel + o] * load(w2 + o * kGroup + v * kLanes);
      store(at, load(at) <= zero ? zero : sum);  // NaN passes, as through relu
    }
}

void second_layer_weights(const float* hidden, int64_t count, const float* grad_z, int64_t z_pixel, int64_t outputs,
                          float* grad_w2) {
  for (int64_t o = 0; o < outputs; ++o)
    for (int v = 0; v < kGroupVecs; ++v) {
      float* at = grad_w2 + o * kGroup + v * kLanes;
      Vec sum = {};
      for (int64_t i = 0; i < count; ++i) sum += grad_z[i * z_pixel + o] * load(hidden + i * kGroup + v * kLanes);
      store(at, load(at) + sum);
    }
}

void add_row(const float* row, float weight, int64_t count, bool accumulate, float* out) {
  if (accumulate)
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, load(out + i) + weight * load(row + i));
  else
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, weight * load(row + i));
}

void sum_pixels(const float* row, int64_t count, double* total) {
  double sum[kGroup] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int n = 0; n < kGroup; ++n) sum[n] += static_cast<double>(row[i * kGroup + n]);
  for (int n = 0; n < kGroup; ++n) total[n] += sum[n];
}

void scatter_columns(const float* rows, int64_t row_plane, const ColumnBlend* blends, int64_t width, float* products) {
  for (int64_t X = 0; X < width; ++X) {
    const ColumnBlend blend = blends[X];  // a copy, which stores to `products` cannot change
    for (int v = 0; v < kGroupVecs; ++v)
      for (int dy = 0; dy < 3; ++dy) {
        const Vec row = load(rows + dy * row_plane + X * kGroup + v * kLanes);
        for (int t = 0; t < kBlend; ++t) {
          float* out = products + blend.offset[t] + dy * kRowTap + v * kLanes;
          store(out, load(out) + blend.weight[t] * row);
        }
      }
  }
}

}  // namespace
}  // namespace moe::cpu

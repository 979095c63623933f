// The weighted median over a window, for neighbouring pixels in the lanes of a vector: see ../sharpen.h.
#pragma once

#include "elementary.h"

namespace moe::cpu {
namespace {

constexpr int kColours = 3;
constexpr int kCandidates = 5;  // sums that do not wait for each other

typedef float UnalignedVec __attribute__((vector_size(MOE_VECTOR_BYTES), may_alias, aligned(4)));
inline Vec load_anywhere(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

// The rows that a row's windows reach, each with the border's pixels repeated beyond it: planes of depth, of what is
// valid (0 or 1) and of the colours, of `window` rows.
struct WindowRows {
  WindowRows(const Sharpening& p, int64_t frame, int64_t row, float* scratch)
      : window(p.window), stride(sharpen_row_floats(p)), rows(scratch) {
    const int64_t plane = p.height * p.width, reach = window / 2;
    for (int64_t i = 0; i < window; ++i) {
      const int64_t y = row + i - reach, at = (y < 0 ? 0 : y < p.height ? y : p.height - 1) * p.width;
      fill(depth(i), p.width, [=](int64_t x) { return p.depth[frame * plane + at + x]; });
      fill(known(i), p.width, [=](int64_t x) { return !p.valid || p.valid[frame * plane + at + x] ? 1.f : 0.f; });
      for (int64_t c = 0; c < kColours; ++c)
        fill(colour(c, i), p.width, [=](int64_t x) { return p.image[(frame * kColours + c) * plane + at + x]; });
    }
  }

  // Column x of the map is column x + window / 2 of a row.
  float* depth(int64_t row) const { return rows + row * stride; }
  float* known(int64_t row) const { return rows + (window + row) * stride; }
  float* colour(int64_t c, int64_t row) const { return rows + ((2 + c) * window + row) * stride; }

  int64_t window, stride;
  float* rows;

 private:
  template <typename Function>
  void fill(float* to, int64_t width, Function pixel) const {
    const int64_t reach = window / 2;
    each_pixel(width, [=](int64_t x) { to[reach + x] = pixel(x); });
    for (int64_t x = 0; x < reach; ++x) to[x] = to[reach];
    for (int64_t x = reach + width; x < stride; ++x) to[x] = to[reach + width - 1];
  }
};

// edges[x] = whether the window around column x holds an edge, as 0 or 1, and 0 behind the last column.
void find_edges(const Sharpening& p, const WindowRows& rows, float* high, float* low, float* edges) {
  const int64_t stride = rows.stride, reach = rows.window / 2;
  float *largest = high + stride, *least = low + stride;
  each_pixel(2 * stride, [=](int64_t x) { high[x] = -INFINITY, low[x] = INFINITY; });
  for (int64_t i = 0; i < rows.window; ++i) {
    const float *depth = rows.depth(i), *known = rows.known(i);
    each_pixel(stride, [=](int64_t x) {
      const float above = known[x] > 0 ? depth[x] : -INFINITY, below = known[x] > 0 ? depth[x] : INFINITY;
      high[x] = above > high[x] ? above : high[x];
      low[x] = below < low[x] ? below : low[x];
    });
  }
  for (int64_t i = 0; i < rows.window; ++i)
    each_pixel(p.width, [=](int64_t x) {
      largest[x] = high[x + i] > largest[x] ? high[x + i] : largest[x];
      least[x] = low[x + i] < least[x] ? low[x + i] : least[x];
    });
  const float* known = rows.known(reach) + reach;
  each_pixel(p.width, [=](int64_t x) { edges[x] = known[x] > 0 && largest[x] > p.edge_ratio * least[x] ? 1.f : 0.f; });
  for (int64_t x = p.width; x < stride; ++x) edges[x] = 0;
}

// f(n, row, column) for each pixel of a window, counted row by row.
template <typename Function>
inline __attribute__((always_inline)) void each_of_window(int64_t window, Function f) {
  int64_t n = 0;
  for (int64_t row = 0; row < window; ++row)
    for (int64_t column = 0; column < window; ++column) f(n++, row, column);
}

// The medians of kLanes neighbours from column `begin` on, by counting: of the depths that with all lesser ones have half
// of the weight, the least. For so few the square of their number is less work than sorting them.
Vec weighted_medians(const WindowRows rows, float steepness, int64_t begin, float* values, float* weights) {
  const int64_t window = rows.window, count = window * window, middle = window / 2;
  Vec centre[kColours];
  for (int c = 0; c < kColours; ++c) centre[c] = load_anywhere(rows.colour(c, middle) + begin + middle);
  each_of_window(window, [&](int64_t n, int64_t row, int64_t column) {
    Vec distance = {};
    for (int c = 0; c < kColours; ++c) {
      const Vec difference = load_anywhere(rows.colour(c, row) + begin + column) - centre[c];
      distance += difference * difference;
    }
    store(weights + n * kLanes, distance);
    store(values + n * kLanes, load_anywhere(rows.depth(row) + begin + column));
  });
  each_pixel(count * kLanes, [=](int64_t i) { weights[i] = fast_exp(-steepness * weights[i]); });
  const Vec zero = {};
  Vec half = {};
  auto no_number = zero != zero;
  each_of_window(window, [&](int64_t n, int64_t row, int64_t column) {
    const Vec known = load_anywhere(rows.known(row) + begin + column);
    const Vec value = load(values + n * kLanes), weight = known * load(weights + n * kLanes);
    no_number |= (known > zero) & (value != value);
    store(weights + n * kLanes, weight);
    half += .5f * weight;
  });
  no_number |= half != half;
  Vec median = broadcast(INFINITY);
  for (int64_t i = 0; i < count; i += kCandidates) {
    Vec candidate[kCandidates], below[kCandidates] = {};
    for (int c = 0; c < kCandidates; ++c) candidate[c] = load(values + (i + c < count ? i + c : i) * kLanes);
    for (int64_t n = 0; n < count; ++n) {
      const Vec value = load(values + n * kLanes), weight = load(weights + n * kLanes);
      for (int c = 0; c < kCandidates; ++c) below[c] += value <= candidate[c] ? weight : zero;
    }
    for (int c = 0; c < kCandidates; ++c) {
      const Vec lesser = candidate[c] < median ? candidate[c] : median;
      median = below[c] >= half ? lesser : median;
    }
  }
  return no_number ? load_anywhere(rows.depth(middle) + begin + middle) : median;
}

void sharpen_row(const Sharpening& p, int64_t frame, int64_t row, float* scratch) {
  const WindowRows rows(p, frame, row, scratch);
  const int64_t stride = rows.stride, reach = p.window / 2;
  float* high = scratch + (2 + kColours) * p.window * stride;
  float *low = high + 2 * stride, *edges = low + 2 * stride, *values = edges + stride;
  float* weights = values + p.window * p.window * kLanes;
  find_edges(p, rows, high, low, edges);
  float* sharp = p.sharp + (frame * p.height + row) * p.width;
  memcpy(sharp, rows.depth(reach) + reach, static_cast<size_t>(p.width) * sizeof(float));
  for (int64_t begin = 0; begin < p.width; begin += kLanes) {
    bool any = false;
    for (int64_t x = begin; x < begin + kLanes; ++x) any |= edges[x] > 0;
    if (!any) continue;
    const Vec medians = weighted_medians(rows, p.steepness, begin, values, weights);
    const int64_t end = begin + kLanes < p.width ? begin + kLanes : p.width;
    for (int64_t x = begin; x < end; ++x)
      if (edges[x] > 0) sharp[x] = medians[x - begin];
  }
}

}  // namespace
}  // namespace moe::cpu

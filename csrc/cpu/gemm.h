// The matrix product: where four fifths of the time goes. A block of c stays in registers over the whole depth.
#pragma once

#include "simd.h"

namespace moe::cpu {
namespace {

constexpr int64_t kLine = 16;  // floats of a cache line

// c (+)= a b over `depth`. With Ahead, every step fetches a line, from `ahead` on, into the second cache.
template <int Rows, int Vecs, bool Ahead>
inline __attribute__((always_inline)) void gemm_tile(const Gemm& g, int64_t depth, bool accumulate, const float* a,
                                                     const float* b, float* c, const float* ahead) {
  Vec sum[Rows][Vecs];
  unrolled<Rows>([&](int i) { unrolled<Vecs>([&](int j) { sum[i][j] = Vec{}; }); });
  const float* row[Rows];
  unrolled<Rows>([&](int i) { row[i] = a + i * g.a_row; });
  const int64_t a_depth = g.a_depth, b_depth = g.b_depth, c_row = g.c_row;
  for (int64_t k = 0, at = 0; k < depth; ++k, at += a_depth, b += b_depth) {
    if (Ahead) __builtin_prefetch(ahead + k * kLine, 0, 2);
    Vec right[Vecs];
    unrolled<Vecs>([&](int j) { right[j] = load(b + j * kLanes); });
    unrolled<Rows>([&](int i) {
      const float left = row[i][at];
      unrolled<Vecs>([&](int j) { sum[i][j] += left * right[j]; });
    });
  }
  const auto place = [&](int i, int j) { return c + i * c_row + j * kLanes; };
  if (accumulate)
    unrolled<Rows>([&](int i) { unrolled<Vecs>([&](int j) { sum[i][j] += load(place(i, j)); }); });
  unrolled<Rows>([&](int i) { unrolled<Vecs>([&](int j) { store(place(i, j), sum[i][j]); }); });
}

// Panels outside, blocks of rows inside: a panel of b stays in L1 while the rows of a, fewer, come from L2. Where b goes
// on, the first blocks of rows fetch the next panel between them.
template <int Rows, int Vecs>
inline __attribute__((always_inline)) void gemm_by_parts(const Gemm& g, int64_t most) {
  constexpr int64_t kPanel = Vecs * kLanes, kBlocksAhead = kPanel > kLine ? kPanel / kLine : 1;
  for (int64_t panel = 0; panel < g.panels; ++panel)
    for (int64_t block = 0; block < g.row_blocks; ++block)
      for (int64_t begin = 0; begin < g.depth; begin += most) {
        const int64_t depth = g.depth - begin < most ? g.depth - begin : most;
        const bool accumulate = g.accumulate || begin > 0;
        const float* a = g.a + block * Rows * g.a_row + begin * g.a_depth;
        const float *next = g.b + (panel + 1) * g.b_panel, *b = next - g.b_panel + begin * g.b_depth;
        float* c = g.c + block * Rows * g.c_row + panel * kPanel;
        if (g.goes_on && block < kBlocksAhead)
          gemm_tile<Rows, Vecs, true>(g, depth, accumulate, a, b, c, next + (block * g.depth + begin) * kLine);
        else
          gemm_tile<Rows, Vecs, false>(g, depth, accumulate, a, b, c, nullptr);
      }
}

template <int Rows, int Vecs>
void gemm(const Gemm& g) {
  gemm_by_parts<Rows, Vecs>(g, g.depth);
}

template <int Rows, int Vecs>
void gemm_in_parts(const Gemm& g) {
  constexpr int64_t kPart = 64;
  gemm_by_parts<Rows, Vecs>(g, kPart);
}

}  // namespace
}  // namespace moe::cpu

// The matrix product: where four fifths of the time goes. A block of c stays in registers over the whole depth.
#pragma once

#include "simd.h"

namespace moe::cpu {
namespace {

template <int Rows, int Vecs>
inline void gemm_tile(const Gemm& g, const float* a, const float* b, float* c) {
  Vec sum[Rows][Vecs] = {};
  const float* row[Rows];
  for (int i = 0; i < Rows; ++i) row[i] = a + i * g.a_row;
  const int64_t a_depth = g.a_depth, b_depth = g.b_depth;
  int64_t at = 0;
  for (int64_t k = 0; k < g.depth; ++k, at += a_depth, b += b_depth) {
    Vec right[Vecs];
    for (int j = 0; j < Vecs; ++j) right[j] = load(b + j * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const float left = row[i][at];
      for (int j = 0; j < Vecs; ++j) sum[i][j] += left * right[j];
    }
  }
  if (g.accumulate)
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vecs; ++j) sum[i][j] += load(c + i * g.c_row + j * kLanes);
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vecs; ++j) store(c + i * g.c_row + j * kLanes, sum[i][j]);
}

// Panels outside, blocks of rows inside: a panel of b stays in L1 while the rows of a, fewer, come from L2.
template <int Rows, int Vecs>
void gemm(const Gemm& g) {
  for (int64_t panel = 0; panel < g.panels; ++panel)
    for (int64_t block = 0; block < g.row_blocks; ++block)
      gemm_tile<Rows, Vecs>(g, g.a + block * Rows * g.a_row, g.b + panel * g.b_panel,
                            g.c + block * Rows * g.c_row + panel * Vecs * kLanes);
}

template <int Rows, int Vecs>
void gemm_in_parts(const Gemm& g) {
  constexpr int64_t kPart = 64;
  for (int64_t panel = 0; panel < g.panels; ++panel)
    for (int64_t block = 0; block < g.row_blocks; ++block) {
      Gemm part = g;
      for (int64_t begin = 0; begin < g.depth; begin += kPart) {
        part.depth = g.depth - begin < kPart ? g.depth - begin : kPart;
        gemm_tile<Rows, Vecs>(part, g.a + block * Rows * g.a_row + begin * g.a_depth,
                              g.b + panel * g.b_panel + begin * g.b_depth,
                              g.c + block * Rows * g.c_row + panel * Vecs * kLanes);
        part.accumulate = true;
      }
    }
}

}  // namespace
}  // namespace moe::cpu

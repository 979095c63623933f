// The matrix product in bfloat16 pairs with float32 sums: twice the multiplications per instruction.
#include <immintrin.h>
#include <string.h>

#include "bf16.h"

namespace moe::cpu {
namespace {

constexpr int kRows = 8, kLanes = 16, kVecs = kBf16Panel / kLanes;

inline __m512bh as_bf16(__m512i bits) {
  __m512bh pairs;
  memcpy(&pairs, &bits, sizeof pairs);
  return pairs;
}

inline void tile(const Gemm& g, const float* a, const float* b, float* c) {
  __m512 sum[kRows][kVecs];
  for (auto& row : sum)
    for (auto& v : row) v = _mm512_setzero_ps();
  for (int64_t k = 0; k < g.depth; ++k) {
    __m512bh right[kVecs];
    for (int j = 0; j < kVecs; ++j) right[j] = as_bf16(_mm512_loadu_si512(b + k * g.b_depth + j * kLanes));
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      memcpy(&pair, a + i * g.a_row + k * g.a_depth, sizeof pair);
      const __m512bh left = as_bf16(_mm512_set1_epi32(pair));
      for (int j = 0; j < kVecs; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) {
      float* out = c + i * g.c_row + j * kLanes;
      _mm512_storeu_ps(out, g.accumulate ? _mm512_add_ps(_mm512_loadu_ps(out), sum[i][j]) : sum[i][j]);
    }
}

void gemm(const Gemm& g) {
  for (int64_t panel = 0; panel < g.panels; ++panel)
    for (int64_t block = 0; block < g.row_blocks; ++block)
      tile(g, g.a + block * kRows * g.a_row, g.b + panel * g.b_panel,
           g.c + block * kRows * g.c_row + panel * kVecs * kLanes);
}

void gemm_x3(const Gemm& g) {
  Gemm part = g;
  part.b = g.b + g.b_low;
  gemm(part);
  part.accumulate = true;
  part.b = g.b;
  gemm(part);
  part.a = g.a + g.a_low;
  gemm(part);
}

}  // namespace

Bf16Products avx512_bf16() {
  if (!__builtin_cpu_supports("avx512bf16")) return {};
  constexpr double kX3Cost = 3;  // where an instruction takes as long as one of float32: half of that otherwise
  return {gemm, gemm_x3, kRows, 32, kX3Cost};
}

}  // namespace moe::cpu

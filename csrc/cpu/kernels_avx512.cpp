#define MOE_VECTOR_BYTES 64
#include "kernel_table.h"

namespace moe::cpu {

void gemm_avx512_bf16(const Gemm&);  // kernels_avx512_bf16.cpp

const Kernels& avx512_kernels() {
  static constexpr int kRows = 8, kVecs = 3, kNarrowVecs = 2;  // 24 sums of 32 registers
  static const Kernels kernels = make_kernels<kRows, kVecs, kNarrowVecs>("avx512", gemm_avx512_bf16);
  return kernels;
}

}  // namespace moe::cpu

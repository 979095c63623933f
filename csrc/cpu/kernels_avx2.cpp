#define MOE_VECTOR_BYTES 32
#include "kernel_table.h"

namespace moe::cpu {

const Kernels& avx2_kernels() {
  static constexpr int kRows = 6, kVecs = 2, kNarrowVecs = 2;  // 12 sums, 2 operands and a broadcast of 16 registers
  static const Kernels kernels = make_kernels<kRows, kVecs, kNarrowVecs>("avx2");
  return kernels;
}

}  // namespace moe::cpu

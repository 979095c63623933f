// 128-bit vectors: SSE2 on every x86-64, NEON on aarch64, whatever the compiler makes of them elsewhere.
#define MOE_VECTOR_BYTES 16
#include "kernel_table.h"

namespace moe::cpu {

const Kernels& portable_kernels() {
  static constexpr int kRows = 4, kVecs = 3, kNarrowVecs = 2;
  static const Kernels kernels = make_kernels<kRows, kVecs, kNarrowVecs>("portable");
  return kernels;
}

}  // namespace moe::cpu

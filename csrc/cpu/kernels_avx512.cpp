#define MOE_VECTOR_BYTES 64
#include "kernel_table.h"

#include "bf16.h"

namespace moe::cpu {
namespace {

Kernels kernels_with(const char* isa, const Bf16Products& bf16) {
  static constexpr int kRows = 8, kVecs = 3, kNarrowVecs = 2;  // 24 sums of 32 registers
  static_assert(kVecs * kLanes == kBf16Panel);
  Kernels kernels = make_kernels<kRows, kVecs, kNarrowVecs>(isa);
  kernels.bf16 = bf16;
  return kernels;
}

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels kernels = kernels_with("avx512", avx512_bf16());
  return kernels;
}

const Kernels& amx_kernels() {
  static const Kernels kernels = kernels_with("amx", amx_bf16());
  return kernels;
}

}  // namespace moe::cpu

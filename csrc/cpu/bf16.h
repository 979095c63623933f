// Matrix products in pairs of bfloat16 with float32 sums, all on the same packed operands.
#pragma once

#include "kernels.h"

namespace moe::cpu {

constexpr int kBf16Panel = 48;  // columns

// Two multiplications a lane: vdpbf16ps. None where the processor lacks it.
Bf16Products avx512_bf16();
// Tile registers: see kernels_amx.cpp. None where the processor lacks them, or the system keeps them from this process.
Bf16Products amx_bf16();

}  // namespace moe::cpu

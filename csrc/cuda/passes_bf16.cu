#include "passes.h"

namespace moe::cuda {
MOE_INSTANTIATE(Bf16)
}  // namespace moe::cuda

#include "passes.h"

namespace moe::cuda {
MOE_INSTANTIATE(Tf32)
}  // namespace moe::cuda

#include "passes.h"

namespace moe::cuda {
MOE_INSTANTIATE(Half)
}  // namespace moe::cuda

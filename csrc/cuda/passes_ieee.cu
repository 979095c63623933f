#include "passes.h"

namespace moe::cuda {
MOE_INSTANTIATE(Ieee)
}  // namespace moe::cuda

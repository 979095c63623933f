#include "../sharpen.h"

#include <vector>

#include "memory.h"
#include "parallel.h"
#include "select.h"

namespace moe::cpu {

Status sharpen(const Sharpening& pass) {
  return with_kernels(pass.isa, [&](const Kernels& kernels) {
    std::vector<Buffer> scratch;
    for (int32_t slot = 0; slot < pass.threads; ++slot) scratch.emplace_back(sharpen_scratch_floats(pass));
    parallel_for(pass.batch * pass.height, pass.threads, [&](int64_t i, int slot) {
      kernels.sharpen_row(pass, i / pass.height, i % pass.height, scratch[slot].data());
    });
  });
}

}  // namespace moe::cpu

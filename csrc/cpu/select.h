#pragma once

#include "kernels.h"

namespace moe::cpu {

struct Selected {
  const Kernels* kernels;  // null unless status is ok
  Status status;
};

// "auto": the widest vectors that this processor has.
Selected select_kernels(const char* isa);

// The instruction sets that this build has and this processor can run, best first.
int supported_isas(const char* names[3]);

bool has_bf16_products();

}  // namespace moe::cpu

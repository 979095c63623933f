#pragma once

#include <new>

#include "kernels.h"

namespace moe::cpu {

struct Selected {
  const Kernels* kernels;  // null unless status is ok
  Status status;
};

// "auto": the widest vectors that this processor has.
Selected select_kernels(const char* isa);

// Runs function(kernels), and gives what became of it.
template <typename Function>
Status with_kernels(const char* isa, Function function) {
  const Selected selected = select_kernels(isa);
  if (selected.status != Status::ok) return selected.status;
  try {
    function(*selected.kernels);
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
  return Status::ok;
}

// The instruction sets that this build has and this processor can run, best first.
int supported_isas(const char* names[3]);

bool has_bf16_products();

}  // namespace moe::cpu

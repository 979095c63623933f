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
constexpr int kMostIsas = 4;
int supported_isas(const char* names[kMostIsas]);

// With an instruction set, on this processor.
bool has_bf16_products(const char* isa);

}  // namespace moe::cpu

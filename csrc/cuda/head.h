// moe::cuda of moe_head.h: the choice of the arithmetic.
#pragma once

#include "passes.h"

namespace moe::cuda {

MOE_COMMON_KERNELS()

// The result of a member of Passes<>, for the arithmetic that is asked for.
#define MOE_WITH(arithmetic, call)                                \
  switch (arithmetic) {                                           \
    case Arithmetic::ieee: return Passes<Ieee>::call;             \
    case Arithmetic::tf32: return Passes<Tf32>::call;             \
    case Arithmetic::bf16: return Passes<Bf16>::call;             \
    case Arithmetic::fp16: return Passes<Half>::call;             \
  }                                                               \
  return {}

Formulation formulation(const Problem& problem, Arithmetic arithmetic) { MOE_WITH(arithmetic, formulation(problem)); }

int64_t forward_workspace(const Problem& problem, Arithmetic arithmetic) {
  MOE_WITH(arithmetic, forward_bytes(problem));
}

int64_t backward_workspace(const Problem& problem, Arithmetic arithmetic) {
  MOE_WITH(arithmetic, backward_bytes(problem));
}

Status forward(const Problem& problem, const Outputs& outputs, const Execution& execution) {
  MOE_TRY(enter(execution));
  if (execution.workspace_bytes < forward_workspace(problem, execution.arithmetic)) return Status::workspace_too_small;
  MOE_WITH(execution.arithmetic, forward(problem, outputs, execution));
}

Status backward(const Problem& problem, const Cotangents& cotangents, const Gradients& gradients,
                const Execution& execution) {
  MOE_TRY(enter(execution));
  if (execution.workspace_bytes < backward_workspace(problem, execution.arithmetic)) return Status::workspace_too_small;
  MOE_WITH(execution.arithmetic, backward(problem, cotangents, gradients, execution));
}

}  // namespace moe::cuda

#include <cuda_runtime.h>

#include "device.h"

namespace moe::cuda {

// The runtime in this module has a current device of its own, beside that of PyTorch's runtime.
inline Status enter(const Execution& execution) { return cuda_status(cudaSetDevice(execution.device)); }

const char* message(Status status) {
  if (status == Status::workspace_too_small) return "its workspace is too small";
  return cudaGetErrorString(static_cast<cudaError_t>(static_cast<int>(status) - static_cast<int>(Status::cuda_error)));
}

}  // namespace moe::cuda

#include "head.h"

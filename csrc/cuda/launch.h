// The host's side of a launch: calls of the CUDA runtime and no device code, so that any compiler can build it against
// a runtime that is made up (../test/launches.cpp).
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "../moe_head.h"

namespace moe::cuda {

inline Status cuda_status(cudaError_t error) {
  return error == cudaSuccess ? Status::ok
                              : static_cast<Status>(static_cast<int32_t>(Status::cuda_error) + error);
}

// One for each kernel, for all threads and devices.
class Launcher {
 public:
  explicit Launcher(const void* kernel) : kernel_(kernel) {}

  // Enqueues the kernel on the current device; `shared_bytes` may pass 48 KB.
  Status launch(dim3 blocks, int threads, const void* params, size_t shared_bytes, void* stream) {
    if (shared_bytes > 48 << 10)
      if (const cudaError_t error = allow_shared_memory(); error != cudaSuccess) return cuda_status(error);
    void* arguments[] = {const_cast<void*>(params)};
    // cudaGetLastError() would tell of this thread's earlier failures, too
    return cuda_status(cudaLaunchKernel(kernel_, blocks, dim3(static_cast<unsigned>(threads)), arguments, shared_bytes,
                                        static_cast<cudaStream_t>(stream)));
  }

 private:
  // The limit belongs to the kernel and the device. If each launch set it to what it needs, one thread would lower it
  // between another's setting and its launch: so it is all that a block may have, and set once.
  cudaError_t allow_shared_memory() {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;  // devices beyond are set at each launch
    if (error != cudaSuccess || (allowed_ & bit)) return error;
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel_, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error == cudaSuccess) allowed_ |= bit;
    return error;
  }

  const void* kernel_;
  std::atomic<uint64_t> allowed_{0};  // a bit for each device
};

}  // namespace moe::cuda

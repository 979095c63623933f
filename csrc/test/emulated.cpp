// The CUDA kernels and their host side on the emulator, as a library for tests/native/test_native_cuda.py.
#include "../cuda/passes.h"

namespace moe::cuda {

inline Status enter(const Execution&) { return Status::ok; }

MOE_INSTANTIATE(Bf16)
MOE_INSTANTIATE(Half)
MOE_INSTANTIATE(Tf32)
MOE_INSTANTIATE(Ieee)

}  // namespace moe::cuda

#include "../cuda/head.h"

extern "C" {

// As ctypes declares them; the test compares.
int64_t moe_size_of_problem() { return sizeof(moe::Problem); }
int64_t moe_size_of_execution() { return sizeof(moe::cuda::Execution); }

void moe_policy(int order, bool late_copies) { moe::cuda::emulator().policy = {order, late_copies}; }

void moe_band_bytes(int64_t forward, int64_t backward) {
  moe::cuda::BandBytes::forward = forward;
  moe::cuda::BandBytes::backward = backward;
}

int moe_cuda_formulation(const moe::Problem* p, int arithmetic) {
  return static_cast<int>(moe::cuda::formulation(*p, static_cast<moe::cuda::Arithmetic>(arithmetic)));
}
int64_t moe_cuda_forward_workspace(const moe::Problem* p, int arithmetic) {
  return moe::cuda::forward_workspace(*p, static_cast<moe::cuda::Arithmetic>(arithmetic));
}
int64_t moe_cuda_backward_workspace(const moe::Problem* p, int arithmetic) {
  return moe::cuda::backward_workspace(*p, static_cast<moe::cuda::Arithmetic>(arithmetic));
}
int moe_cuda_forward(const moe::Problem* p, const moe::Outputs* outputs, const moe::cuda::Execution* e) {
  return static_cast<int>(moe::cuda::forward(*p, *outputs, *e));
}
int moe_cuda_backward(const moe::Problem* p, const moe::Cotangents* given, const moe::Gradients* wanted,
                      const moe::cuda::Execution* e) {
  return static_cast<int>(moe::cuda::backward(*p, *given, *wanted, *e));
}
}

// The primitives of device.h as instructions of sm_80 and newer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "device.h"
#include "launch.h"

namespace moe::cuda {

MOE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MOE_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
MOE_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
MOE_DEVICE Index3 block_index() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}

MOE_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char moe_shared_memory[];
  return moe_shared_memory;
}
MOE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

MOE_DEVICE void copy_async(uint32_t to, const void* from, bool real) {
  const int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
MOE_DEVICE void load_shared(float (&v)[4], uint32_t from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(from)
               : "memory");
}
MOE_DEVICE void store_shared(uint32_t to, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(first), "f"(second) : "memory");
}
MOE_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
MOE_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

MOE_DEVICE void sync_block() { __syncthreads(); }
MOE_DEVICE void sync_warp() { __syncwarp(); }
MOE_DEVICE void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
MOE_DEVICE void arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

MOE_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
MOE_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

#define MOE_MULTIPLY(Type, shape)                                                                                    \
  MOE_DEVICE void multiply(Type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                     \
    asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                 \
  }
MOE_MULTIPLY(Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
MOE_MULTIPLY(Half, "m16n8k16.row.col.f32.f16.f16.f32")
MOE_MULTIPLY(Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef MOE_MULTIPLY

template <typename T>
MOE_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <typename T>
MOE_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
MOE_DEVICE bool any(bool value) { return __any_sync(0xffffffffu, value); }

MOE_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MOE_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
MOE_DEVICE float to_float(Bf16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }
MOE_DEVICE float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }

template <typename Type>
MOE_DEVICE auto rounded(float value) {
  if constexpr (std::is_same_v<Type, Bf16>) {
    return Bf16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else if constexpr (std::is_same_v<Type, Half>) {
    return Half{__half_as_ushort(__float2half_rn(value))};
  } else {
    uint32_t bits;  // the matrix units would truncate; .rna keeps what is not finite
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return as_float(bits);
  }
}

MOE_DEVICE int computed_anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
MOE_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }

inline Device current_device() {
  int device = 0, processors = 0, shared = 0, block_shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {processors, shared, block_shared};
}

template <class Kernel, class = void>
constexpr int kBlocksOfProcessor = 0;  // the compiler's choice; or Kernel::kBlocks, for which registers must suffice
template <class Kernel>
constexpr int kBlocksOfProcessor<Kernel, std::void_t<decltype(Kernel::kBlocks)>> = Kernel::kBlocks;

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, kBlocksOfProcessor<Kernel>) entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

template <class Kernel>
Status launch(const typename Kernel::Params& params, Grid grid, size_t shared_bytes, void* stream) {
  static Launcher kernel(reinterpret_cast<const void*>(entry<Kernel>));
  if (grid.x * grid.y * grid.z == 0) return Status::ok;
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  return kernel.launch(blocks, Kernel::kThreads, &params, shared_bytes, stream);
}

}  // namespace moe::cuda

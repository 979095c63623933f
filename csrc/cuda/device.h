// What a kernel may use of the device it runs on, under one set of names.
//
// nvcc compiles a kernel to the GPU's instructions (device_gpu.h). A host compiler compiles the very same source against
// an emulator (../test/device_host.h), which runs its threads as fibres: so that kernels are tested for their numbers,
// their barriers and their bounds on machines without a GPU. A kernel is therefore a struct:
//
//   struct Kernel {
//     static constexpr int kThreads = 256;
//     struct Params { ... };                                      // plain data, by value, at most 4 KB
//     MOE_DEVICE static void run(const Params& params) { ... }    // one thread's work
//   };
//   launch<Kernel>(params, grid, shared_bytes, stream);
//
// Collective operations (those of a warp or a barrier) must be reached by all their threads, as on the GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../moe_head.h"

#ifdef __CUDACC__
#define MOE_DEVICE __device__ __forceinline__
#define MOE_BOTH __host__ __device__ __forceinline__
#define MOE_UNROLL _Pragma("unroll")
#define MOE_KEEP_LOOP _Pragma("unroll 1")
#else
#define MOE_DEVICE inline
#define MOE_BOTH inline
#define MOE_UNROLL
#define MOE_KEEP_LOOP
#endif

namespace moe::cuda {

constexpr int kWarp = 32;

// 16-bit floating-point numbers as they lie in memory.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

struct alignas(16) Chunk {  // what one asynchronous copy, or one lane of a wide load, moves
  uint32_t words[4];
};

struct Grid {  // blocks along each axis; y and z at most 65,535
  int64_t x = 1, y = 1, z = 1;
};

struct Index3 {
  int x, y, z;
};

struct Device {
  int processors;
  int64_t shared_bytes, block_shared_bytes;  // of a processor, and what one block may have of them
};
constexpr Device kLargestDevice = {132, 228 << 10, 227 << 10};  // sm_90

// The primitives, in both versions (`Type` is Bf16, Half or Tf32):
//
//   int thread_index(), lane_index(), warp_index();  Index3 block_index();
//   char* shared_memory();                       the block's dynamic shared memory, aligned to 128 bytes
//   uint32_t shared_address(const void*);        its address for the operations that take one:
//   void copy_async(uint32_t to, const void* from, bool real);   16 bytes, zeros where not `real` (never read then)
//   void load_matrices(uint32_t (&r)[4], uint32_t row);          ldmatrix.x4: lane l names row l % 8 of matrix l / 8
//   void load_matrices_transposed(uint32_t (&r)[4], uint32_t row);
//   void load_shared(float (&v)[4], uint32_t from);              16 bytes
//   void store_shared(uint32_t to, float, float);                8 bytes
//   void commit_copies();  template <int kPending> void wait_for_copies();
//   void sync_block();  void sync_warp();
//   void sync_some(int barrier, int threads);    named barrier 1..15: wait for `threads` to have come
//   void arrive(int barrier, int threads);       the same without waiting
//   void multiply(Type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);   d += a b:
//       m16n8k16 for Bf16 and Half, m16n8k8 for Tf32 (operands already rounded), fragments as in the PTX manual
//   T shuffle(T, int lane);  T shuffle_xor(T, int mask);  bool any(bool);   of a warp; T is float, int or uint32_t
//   float to_float(Bf16 | Half);  float as_float(uint32_t);  uint32_t as_bits(float);
//   Bf16, Half or float (a tf32 in its bits) rounded<Type>(float);   to the nearest
//   float fused(float a, float b, float c);              a * b + c, rounded once
//   int computed_anew(int);    its argument; the compiler keeps in no register across a loop what follows from it
// and on the host:
//   Device current_device();
struct Tf32 {
  float value;
};

}  // namespace moe::cuda

#ifdef __CUDACC__
#include "device_gpu.h"
#else
#include "../test/device_host.h"
#endif

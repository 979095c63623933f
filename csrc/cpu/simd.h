// A vector of floats in the compiler's own vector extension, as wide as this translation unit's instruction set.
//
// Everything here and in the files included after it lies in an unnamed namespace and uses no C++ library template:
// a function that the linker could merge with one of another translation unit would carry its instructions elsewhere.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels.h"

#ifndef MOE_VECTOR_BYTES
#error "define MOE_VECTOR_BYTES before including simd.h"
#endif

namespace moe::cpu {
namespace {

typedef float Vec __attribute__((vector_size(MOE_VECTOR_BYTES), may_alias));
typedef float Vec4 __attribute__((vector_size(16), may_alias));

constexpr int kLanes = MOE_VECTOR_BYTES / 4;
constexpr int kGroupVecs = kGroup / kLanes;

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec4 load4(const float* p) { return *reinterpret_cast<const Vec4*>(p); }
inline void store4(float* p, Vec4 v) { *reinterpret_cast<Vec4*>(p) = v; }

inline Vec broadcast(float value) { return value - Vec{}; }

// f(i) for i in [0, Count), unrolled: what f indexes with i can live in registers.
template <int Count, typename Function>
inline __attribute__((always_inline)) void unrolled(Function f) {
#pragma GCC unroll 32
  for (int i = 0; i < Count; ++i) f(i);
}

// f(i) for i in [0, count): independent of each other, whatever memory f writes, so that the loop vectorises.
template <typename Function>
inline __attribute__((always_inline)) void each_pixel(int64_t count, Function f) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) f(i);
}

// relu that keeps NaN, as PyTorch's does
inline Vec relu(Vec v) {
  const Vec zero = {};
  return v < zero ? zero : v;
}

}  // namespace
}  // namespace moe::cpu

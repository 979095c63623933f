// Floats as bits, and numbers of 16 bits, one at a time.
//
// In an unnamed namespace, as simd.h, for the same reason.
#pragma once

#include <stdint.h>
#include <string.h>

namespace moe::cpu {
namespace {

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }

struct Bfloat16 {
  uint16_t bits;
};
inline float widen(Bfloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

struct Float16 {
  uint16_t bits;
};
inline float widen(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
  // The exponents' difference, 112, as a factor: exact, and right for denormals too.
  return from_bits(sign | bits_of(from_bits(magnitude << 13) * 0x1p112f));
}

inline Bfloat16 to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // NaN stays one
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};  // to nearest, ties to even
}

// The high part of bf16x3 to `at`, and the low one `low` places behind, unless that is 0.
inline void put(Bfloat16* at, int64_t low, float value) {
  *at = to_bf16(value);
  if (low) at[low] = to_bf16(value - widen(*at));
}

}  // namespace
}  // namespace moe::cpu

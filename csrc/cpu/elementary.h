// exp in plain arithmetic, so that loops over a block of pixels vectorise; within 1 ulp or so of the true value.
#pragma once

#include "numbers.h"
#include "simd.h"

namespace moe::cpu {
namespace {

// e^x = 2^n e^r with |r| <= ln 2 / 2. NaN stays NaN, overflow gives infinity, underflow passes through denormals to 0.
inline float fast_exp(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  float clamped = x < -104.f ? -104.f : x;
  clamped = clamped > 89.f ? 89.f : clamped;
  const float shifted = clamped * kLog2E + kRound;
  const auto n = static_cast<int32_t>(bits_of(shifted) - bits_of(kRound));
  const float whole = shifted - kRound;
  const float r = clamped - whole * kLn2High - whole * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t half = n >> 1;  // 2^n in two steps: n may lie outside the exponent's range
  const auto power = [](int32_t exponent) { return from_bits(static_cast<uint32_t>(exponent + 127) << 23); };
  return p * power(half) * power(n - half);
}

inline float fast_sigmoid(float x) { return 1.f / (1.f + fast_exp(-x)); }

}  // namespace
}  // namespace moe::cpu

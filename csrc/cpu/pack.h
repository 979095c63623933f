// A row's pixels in the order in which the products read them, whatever their element type and strides.
#pragma once

#include "numbers.h"
#include "simd.h"

namespace moe::cpu {
namespace {

typedef uint32_t Bits __attribute__((vector_size(MOE_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(MOE_VECTOR_BYTES / 2)));

inline HalfBits half_bits_at(const void* at) {
  HalfBits bits;
  memcpy(&bits, at, sizeof bits);
  return bits;
}

// kLanes neighbours, which need not be aligned, as in widen().
inline Vec widen_at(const float* at) {
  Vec values;
  memcpy(&values, at, sizeof values);
  return values;
}
inline Vec widen_at(const Bfloat16* at) { return (Vec)(__builtin_convertvector(half_bits_at(at), Bits) << 16); }
inline Vec widen_at(const Float16* at) {
  const Bits bits = __builtin_convertvector(half_bits_at(at), Bits);
  const Bits sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  const Bits finite = (Bits)((Vec)(magnitude << 13) * 0x1p112f), other = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  return (Vec)(sign | (magnitude >= 0x7c00u ? other : finite));
}

// At most kLanes neighbours, then zeros.
template <typename In>
inline Vec widen_some(const In* at, int64_t count) {
  if (count >= kLanes) return widen_at(at);
  In some[kLanes] = {};
  if (count > 0) memcpy(some, at, count * sizeof(In));
  return widen_at(some);
}

template <typename Lanes>
inline void put_some(void* at, Lanes lanes, int64_t count) {
  if (count >= kLanes)
    memcpy(at, &lanes, sizeof lanes);
  else
    memcpy(at, &lanes, count * sizeof lanes[0]);
}

// As to_bf16, on top of 16 zeros.
inline Bits rounded(Vec values) {
  const Bits bits = (Bits)values;
  return ((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
}

// What a place of a packed pixel holds.
enum class Part { whole, high, low };  // a float32, or the bfloat16 parts of bf16x3 (of bfloat16: the high one)

template <Part P>
inline Bits part_of(Vec values) {
  if (P == Part::whole) return (Bits)values;
  const Bits high = rounded(values);
  return P == Part::high ? high : rounded(values - (Vec)high);
}

#if MOE_VECTOR_BYTES == 64
#define MOE_EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif MOE_VECTOR_BYTES == 32
#define MOE_EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
#define MOE_EACH_LANE(f) f(0), f(1), f(2), f(3)
#endif
#ifdef __clang__
#define MOE_LANES(a, b, lane) __builtin_shufflevector(a, b, MOE_EACH_LANE(lane))
#else
#define MOE_LANES(a, b, lane) __builtin_shuffle(a, b, Bits{MOE_EACH_LANE(lane)})
#endif
#define MOE_FRONT(j) ((j) & D ? kLanes + (j) - D : (j))
#define MOE_BACK(j) ((j) & D ? kLanes + (j) : (j) + D)

// Of every 2 D x 2 D numbers the two D x D off the diagonal change places.
template <int D>
inline __attribute__((always_inline)) void exchange(Bits rows[kLanes]) {
  if constexpr (D < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & D) continue;
      const Bits front = MOE_LANES(rows[i], rows[i + D], MOE_FRONT);
      rows[i + D] = MOE_LANES(rows[i], rows[i + D], MOE_BACK);
      rows[i] = front;
    }
    exchange<2 * D>(rows);
  }
}

// rows[i][j] becomes rows[j][i].
inline void transpose(Bits rows[kLanes]) { exchange<1>(rows); }

// kLanes pixels that are neighbours in memory, and as many floats of each; unless `Full`, no more than there are.
template <Part P, bool Full, typename In>
inline void pack_block(const In* in, int64_t channel, int64_t channels, int64_t pixels, float* out, int64_t out_pixel) {
  constexpr int kInFloat = P == Part::whole ? 1 : 2;  // channels
  Bits rows[kLanes];
#pragma GCC unroll 16
  for (int n = 0; n < kLanes; ++n) {
    const auto at = [&](int64_t c) {
      if (Full) return part_of<P>(widen_at(in + c * channel));
      return c < channels ? part_of<P>(widen_some(in + c * channel, pixels)) : Bits{};
    };
    rows[n] = P == Part::whole ? at(n) : at(2 * n) >> 16 | at(2 * n + 1);
  }
  transpose(rows);
  const int64_t floats = Full ? kLanes : (channels + kInFloat - 1) / kInFloat;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (Full || i < pixels) put_some(out + i * out_pixel, rows[i], floats);
}

// A pixel whose channels are neighbours in memory.
template <Part P, typename In>
inline void pack_pixel(const In* in, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Bits part = part_of<P>(widen_some(in + c, channels - c));
    if (P == Part::whole)
      put_some(out + c, part, channels - c);
    else
      put_some(reinterpret_cast<Bfloat16*>(out) + c, __builtin_convertvector(part >> 16, HalfBits), channels - c);
  }
}

template <Part P, typename In>
inline void pack_part(const PixelRow& r, const In* in, int64_t channels, float* out) {
  constexpr int kInFloat = P == Part::whole ? 1 : 2, kStep = kLanes * kInFloat;
  constexpr int64_t kBlock = 16;  // pixels at a time, so that neither side's lines are fetched twice
  if (r.pixel == 1) {
    for (int64_t begin = 0; begin < r.count; begin += kBlock) {
      const int64_t end = begin + kBlock < r.count ? begin + kBlock : r.count;
      if (P != Part::low)
        for (int64_t c = 0; c < channels; ++c) __builtin_prefetch(in + c * r.channel + r.row + begin, 0, 2);  // next
      for (int64_t c = 0; c < channels; c += kStep)
        for (int64_t next = begin; next < end; next += kLanes) {
          // A row's last pixels together with some that are done, because a block that is not full takes many times as long.
          const int64_t i = next + kLanes <= r.count || r.count < kLanes ? next : r.count - kLanes, pixels = r.count - i;
          const bool full = pixels >= kLanes && c + kStep <= channels;
          (full ? pack_block<P, true, In> : pack_block<P, false, In>)(
              in + c * r.channel + i, r.channel, channels - c, pixels, out + i * r.out_pixel + c / kInFloat, r.out_pixel);
        }
    }
    return;
  }
  for (int64_t i = 0; i < r.count; ++i) {
    const In* pixel = in + i * r.pixel;
    if (r.channel == 1) {
      pack_pixel<P>(pixel, channels, out + i * r.out_pixel);
      continue;
    }
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t count = c + kLanes <= channels ? kLanes : channels - c;
      In together[kLanes] = {};
      for (int64_t n = 0; n < count; ++n) together[n] = pixel[(c + n) * r.channel];
      pack_pixel<P>(together, count, out + i * r.out_pixel + c / kInFloat);
    }
  }
}

template <typename In>
void pack_pixels_of(const PixelRow& r, float* out) {
  const In* in = static_cast<const In*>(r.first);
  const int64_t halves[2] = {r.half, r.rest};
  for (int h = 0; h < 2; ++h) {
    const In* half = in + (h ? r.half * r.channel : 0);
    float* to = out + (h ? r.half_floats : 0);
    if (!r.in_pairs) {
      pack_part<Part::whole>(r, half, halves[h], to);
      continue;
    }
    pack_part<Part::high>(r, half, halves[h], to);
    if (r.low) pack_part<Part::low>(r, half, halves[h], to + r.low);
  }
}

void pack_pixels(const PixelRow& row, float* out) {
  switch (row.element) {
    case Element::float32: return pack_pixels_of<float>(row, out);
    case Element::bfloat16: return pack_pixels_of<Bfloat16>(row, out);
    case Element::float16: return pack_pixels_of<Float16>(row, out);
  }
}

#undef MOE_FRONT
#undef MOE_BACK
#undef MOE_LANES
#undef MOE_EACH_LANE

}  // namespace
}  // namespace moe::cpu

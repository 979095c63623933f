// Winograd's transforms for the head's tiles, in vectors of channels: see tiles.h.
#pragma once

#include "simd.h"

namespace moe::cpu {
namespace {

// Results made at a time: their weights, of six sources (VGGT's ratio), stay in registers.
constexpr int kAtOnce = MOE_VECTOR_BYTES == 64 ? 4 : 2;

template <int64_t N>
struct Constant {
  constexpr operator int64_t() const { return N; }
};

// f(sources), compiled apart for the usual numbers of them, whose loops unroll.
template <typename Function>
inline __attribute__((always_inline)) void for_sources(int64_t sources, Function f) {
  switch (sources) {
    case 5: return f(Constant<5>{});
    case 6: return f(Constant<6>{});
    default: return f(sources);
  }
}

// kAtOnce of a transform's kHeadPatch results: weights times sources.
struct Combination {
  Vec weights[kMaxPatchSources][kAtOnce];

  template <typename Count>
  inline __attribute__((always_inline)) Combination(const float* of_first, Count sources) {
    for (int64_t s = 0; s < sources; ++s)
      unrolled<kAtOnce>([&](int i) { weights[s][i] = broadcast(of_first[s * kHeadPatch + i]); });
  }

  template <typename Count>
  inline __attribute__((always_inline)) void add(const float* in, int64_t stride, Count sources, Vec* sum) const {
    for (int64_t s = 0; s < sources; ++s) {
      const Vec value = load(in + s * stride);
      unrolled<kAtOnce>([&](int i) { sum[i] += weights[s][i] * value; });
    }
  }
};

void transform_rows(const float* pixels, int64_t row, int64_t rows, int64_t pixel, int64_t columns,
                    const float* weights, float* out) {
  for_sources(rows, [&](auto sources) __attribute__((always_inline)) {
    for (int first = 0; first < kHeadPatch; first += kAtOnce) {
      const Combination combination(weights + first, sources);
      for (int64_t column = 0; column < columns; ++column)
        for (int at = 0; at < kGroup; at += kLanes) {
          Vec sum[kAtOnce] = {};
          combination.add(pixels + column * pixel + at, row, sources, sum);
          for (int i = 0; i < kAtOnce; ++i) store(out + (column * kHeadPatch + first + i) * kGroup + at, sum[i]);
        }
    }
  });
}

void transform_columns(const float* rows, int64_t columns, const float* weights, const PatchPosition& given, float* v,
                       int64_t plane) {
  const PatchPosition position = given;  // a copy that stores to v cannot change
  const auto position_at = [&](int i, int j, int at) {
    if (!position.vectors) return Vec{};
    return load(position.vectors + (position.by_column ? j : i) * position.stride + at) *
           position.scalars[position.by_column ? i : j];
  };
  for_sources(columns, [&](auto sources) __attribute__((always_inline)) {
    for (int first = 0; first < kHeadPatch; first += kAtOnce) {
      const Combination combination(weights + first, sources);
      for (int i = 0; i < kHeadPatch; ++i)
        for (int at = 0; at < kGroup; at += kLanes) {
          Vec sum[kAtOnce];
          unrolled<kAtOnce>([&](int j) { sum[j] = position_at(i, first + j, at); });
          combination.add(rows + i * kGroup + at, kHeadPatch * kGroup, sources, sum);
          unrolled<kAtOnce>([&](int j) { store(v + (i * kHeadPatch + first + j) * plane + at, sum[j]); });
        }
    }
  });
}

// One axis of the products of a tile, of points 0, +-kP, +-kQ, +-kR and infinity.
inline void transform_products(const Vec m[kHeadPatch], Vec y[kHeadTile]) {
  constexpr float kP = kHeadPoints[1], kQ = kHeadPoints[3], kR = kHeadPoints[5];
  constexpr float kP2 = kP * kP, kQ2 = kQ * kQ, kR2 = kR * kR;
  const Vec even_p = m[1] + m[2], even_q = m[3] + m[4], even_r = m[5] + m[6];
  const Vec odd_p = kP * (m[1] - m[2]), odd_q = kQ * (m[3] - m[4]), odd_r = kR * (m[5] - m[6]);
  y[0] = m[0] + even_p + even_q + even_r;
  y[1] = odd_p + odd_q + odd_r;
  y[2] = kP2 * even_p + kQ2 * even_q + kR2 * even_r;
  y[3] = kP2 * odd_p + kQ2 * odd_q + kR2 * odd_r;
  y[4] = kP2 * kP2 * even_p + kQ2 * kQ2 * even_q + kR2 * kR2 * even_r;
  y[5] = kP2 * kP2 * odd_p + kQ2 * kQ2 * odd_q + kR2 * kR2 * odd_r + m[7];
}

void tile_hidden(const float* m, int64_t plane, const float* bias, float* hidden, float* sum) {
  for (int at = 0; at < kGroup; at += kLanes) {
    Vec columns[kHeadTile][kHeadPatch];  // [output row][column]
    for (int j = 0; j < kHeadPatch; ++j) {
      Vec column[kHeadPatch], out[kHeadTile];
      for (int i = 0; i < kHeadPatch; ++i) column[i] = load(m + (i * kHeadPatch + j) * plane + at);
      transform_products(column, out);
      for (int i = 0; i < kHeadTile; ++i) columns[i][j] = out[i];
    }
    const Vec constant = load(bias + at);
    Vec total = load(sum + at);
    for (int i = 0; i < kHeadTile; ++i) {
      Vec out[kHeadTile];
      transform_products(columns[i], out);
      for (int j = 0; j < kHeadTile; ++j) {
        total += out[j];
        store(hidden + (i * kHeadTile + j) * kGroup + at, relu(out[j] + constant));
      }
    }
    store(sum + at, total);
  }
}

}  // namespace
}  // namespace moe::cpu

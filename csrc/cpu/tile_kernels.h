// Winograd's transforms for the head's tiles, in vectors of channels: see tiles.h.
#pragma once

#include "simd.h"

namespace moe::cpu {
namespace {

void transform_rows(const float* pixels, int64_t row, int64_t rows, int64_t pixel, int64_t columns,
                    const float* weights, float* out) {
  for (int64_t column = 0; column < columns; ++column)
    for (int v = 0; v < kGroupVecs; ++v) {
      const float* in = pixels + column * pixel + v * kLanes;
      Vec sum[kHeadPatch] = {};
      for (int64_t r = 0; r < rows; ++r)
        for (int i = 0; i < kHeadPatch; ++i) sum[i] += weights[r * kHeadPatch + i] * load(in + r * row);
      for (int i = 0; i < kHeadPatch; ++i) store(out + (column * kHeadPatch + i) * kGroup + v * kLanes, sum[i]);
    }
}

void transform_columns(const float* rows, int64_t columns, const float* weights, const PatchPosition& given, float* v,
                       int64_t plane) {
  const PatchPosition position = given;  // a copy that stores to v cannot change
  for (int at = 0; at < kGroup; at += kLanes)
    for (int i = 0; i < kHeadPatch; ++i) {
      Vec sum[kHeadPatch] = {};
      if (position.vectors)
        for (int j = 0; j < kHeadPatch; ++j)
          sum[j] = load(position.vectors + (position.by_column ? j : i) * position.stride + at) *
                   position.scalars[position.by_column ? i : j];
      for (int64_t column = 0; column < columns; ++column) {
        const Vec value = load(rows + (column * kHeadPatch + i) * kGroup + at);
        for (int j = 0; j < kHeadPatch; ++j) sum[j] += weights[column * kHeadPatch + j] * value;
      }
      for (int j = 0; j < kHeadPatch; ++j) store(v + (i * kHeadPatch + j) * plane + at, sum[j]);
    }
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

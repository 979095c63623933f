// Winograd's F(4x4, 3x3) in vectors of channels: 36 products for 16 outputs instead of 144.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), with the points 0, +-3/4, +-3/2
// and infinity: at the same cost half the rounding error of the usual 0, +-1, +-2, and every coefficient of the transforms
// of maps is exact in float32.
#pragma once

#include "../decoder.h"
#include "simd.h"

namespace moe::cpu {
namespace {

static_assert(kChannelStep % kLanes == 0);

constexpr float kA = .75f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kProduct = kA2 * kB2, kSum = kA2 + kB2;

// B^T d
inline void transform_input(const Vec d[kPatch], Vec t[kPatch]) {
  const Vec u = d[4] - kB2 * d[2], v = kA * (d[3] - kB2 * d[1]);
  const Vec w = d[4] - kA2 * d[2], z = kB * (d[3] - kA2 * d[1]);
  t[0] = d[4] + kProduct * d[0] - kSum * d[2];
  t[1] = u + v;
  t[2] = u - v;
  t[3] = w + z;
  t[4] = w - z;
  t[5] = d[5] + kProduct * d[1] - kSum * d[3];
}

// A^T m
inline void transform_output(const Vec m[kPatch], Vec y[kTile]) {
  const Vec s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  y[0] = m[0] + s1 + s2;
  y[1] = kA * d1 + kB * d2;
  y[2] = kA2 * s1 + kB2 * s2;
  y[3] = kA * kA2 * d1 + kB * kB2 * d2 + m[5];
}

template <bool Relu>
void transform_patch(const WinogradPatch& p, const float* x, float* v) {
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    Vec columns[kPatch][kPatch];  // [column][transformed row]
    for (int j = 0; j < kPatch; ++j) {
      Vec d[kPatch] = {};
      if (p.columns_begin <= j && j < p.columns_end)
        for (int i = p.rows_begin; i < p.rows_end; ++i) {
          d[i] = load(x + i * p.row + j * p.pixel + c);
          if (Relu) d[i] = relu(d[i]);
        }
      transform_input(d, columns[j]);
    }
    for (int i = 0; i < kPatch; ++i) {
      Vec row[kPatch], t[kPatch];
      for (int j = 0; j < kPatch; ++j) row[j] = columns[j][i];
      transform_input(row, t);
      for (int j = 0; j < kPatch; ++j) store(v + (i * kPatch + j) * p.plane + c, t[j]);
    }
  }
}

void winograd_input(const WinogradPatch& patch, const float* x, bool relu_input, float* v) {
  if (relu_input)
    transform_patch<true>(patch, x, v);
  else
    transform_patch<false>(patch, x, v);
}

void winograd_output(const WinogradPatch& p, const float* m, const float* bias, const float* residual,
                     bool relu_residual, const float* added, float* y) {
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    Vec columns[kPatch][kTile];  // [column][output row]
    for (int j = 0; j < kPatch; ++j) {
      Vec column[kPatch];
      for (int i = 0; i < kPatch; ++i) column[i] = load(m + (i * kPatch + j) * p.plane + c);
      transform_output(column, columns[j]);
    }
    const Vec constant = bias ? load(bias + c) : Vec{};
    for (int i = 0; i < p.rows_end; ++i) {
      Vec row[kPatch], out[kTile];
      for (int j = 0; j < kPatch; ++j) row[j] = columns[j][i];
      transform_output(row, out);
      for (int j = 0; j < p.columns_end; ++j) {
        const int64_t at = i * p.row + j * p.pixel + c;
        Vec value = out[j] + constant;
        if (residual) value += relu_residual ? relu(load(residual + at)) : load(residual + at);
        if (added) value += load(added + at);
        store(y + at, value);
      }
    }
  }
}

}  // namespace
}  // namespace moe::cpu

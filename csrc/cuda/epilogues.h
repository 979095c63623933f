// What a convolution's block does with its sums, while they are in registers.
#pragma once

#include "convolution.h"
#include "numerics.h"

namespace moe::cuda {

// Bias, ReLU and the second layer, in float32: each raw output's part that this warp's columns make up goes to its own
// plane, so that every number has one writer, and what is not finite stays with its owner. With `hidden` (the backward
// pass) the activations themselves are kept, too.
template <class Arithmetic>
struct SecondLayer {
  Columns columns;
  const float* bias;         // [total]
  const float* weights;      // [most outputs][total], 0 where an owner has fewer
  float* slots;              // planes
  Planes planes;
  const uint8_t* reached;    // [frames][tile rows][tile columns][experts]: which are computed; or null
  int tile_rows, tile_columns;
  Operand<Arithmetic>* hidden;  // band, or null
  Band band;

  MOE_DEVICE bool wanted(int frame, int tile_row, int tile_column, int first_column) const {
    const int owner = columns.owner(first_column);  // with `reached`, a group has one owner
    if (!reached || owner == columns.experts || owner < 0) return true;
    return reached[((frame * tile_rows + tile_row) * tile_columns + tile_column) * columns.experts + owner];
  }

  template <class Same, class Kernel>
  MOE_DEVICE void run(typename Kernel::Sums& sums, int frame, int first_row, int first_pixel, int first_column) const {
    const int group = lane_index() / 4, member = lane_index() % 4;
    MOE_UNROLL
    for (int j = 0; j < Kernel::kNTiles; ++j) {
      MOE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = first_column + j * 8 + 2 * member + c;
        const bool real = columns.owner(column) >= 0;
        const float shift = bias[column];
        MOE_UNROLL
        for (int i = 0; i < Kernel::kMTiles; ++i) {
          MOE_UNROLL
          for (int r = 0; r < 2; ++r) {
            float& sum = sums[i][j][2 * r + c];
            sum = real ? relu(sum + shift) : 0.f;
          }
        }
      }
    }
    if (hidden) keep_hidden<Kernel>(sums, frame, first_row, first_pixel, first_column);

    for (int output = 0; output < columns.most_outputs(); ++output) {
      const float* row = weights + static_cast<int64_t>(output) * columns.total + first_column + 2 * member;
      float z[Kernel::kMTiles][2] = {};
      MOE_UNROLL
      for (int j = 0; j < Kernel::kNTiles; ++j) {
        const float w0 = row[j * 8], w1 = row[j * 8 + 1];
        MOE_UNROLL
        for (int i = 0; i < Kernel::kMTiles; ++i) {
          MOE_UNROLL
          for (int r = 0; r < 2; ++r)
            z[i][r] = fused(sums[i][j][2 * r], w0, fused(sums[i][j][2 * r + 1], w1, z[i][r]));
        }
        const int owner = columns.owner(first_column + j * 8);
        if (j + 1 < Kernel::kNTiles && columns.owner(first_column + j * 8 + 8) == owner) continue;
        flush<Kernel>(z, output, owner, first_column + j * 8, frame, first_row, first_pixel + group);
      }
    }
  }

 private:
  // Adds up the four lanes that share pixels, stores the sums and starts anew; owner, column and output are uniform.
  template <class Kernel>
  MOE_DEVICE void flush(float (&z)[Kernel::kMTiles][2], int output, int owner, int column, int frame, int first_row,
                        int first_pixel) const {
    const bool stored = owner >= 0 && output < columns.outputs_of(owner);
    float* plane = slots;
    if (stored) plane += columns.slot(owner, columns.part(owner, column), output) * planes.size();
    MOE_UNROLL
    for (int i = 0; i < Kernel::kMTiles; ++i) {
      MOE_UNROLL
      for (int r = 0; r < 2; ++r) {
        float sum = z[i][r] + shuffle_xor(z[i][r], 1);
        sum += shuffle_xor(sum, 2);
        if (stored && lane_index() % 4 == 0) plane[planes.pixel(frame, first_row + i, first_pixel + 8 * r)] = sum;
        z[i][r] = 0.f;
      }
    }
  }

  template <class Kernel>
  MOE_DEVICE void keep_hidden(const typename Kernel::Sums& sums, int frame, int first_row, int first_pixel,
                              int first_column) const {
    const int group = lane_index() / 4, member = lane_index() % 4;
    MOE_UNROLL
    for (int i = 0; i < Kernel::kMTiles; ++i) {
      MOE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t pixel = band.pixel(frame, first_row + i, first_pixel + group + 8 * r + 1);
        Operand<Arithmetic>* to = hidden + pixel * band.channels + first_column + 2 * member;
        MOE_UNROLL
        for (int j = 0; j < Kernel::kNTiles; ++j) {
          to[j * 8] = to_operand<Arithmetic>(sums[i][j][2 * r]);
          to[j * 8 + 1] = to_operand<Arithmetic>(sums[i][j][2 * r + 1]);
        }
      }
    }
  }
};

// The sums themselves, as float32 of `planes` x `columns` numbers.
struct Store {
  float* to;
  Planes planes;
  int columns;

  MOE_DEVICE bool wanted(int, int, int, int) const { return true; }

  template <class Arithmetic, class Kernel>
  MOE_DEVICE void run(const typename Kernel::Sums& sums, int frame, int first_row, int first_pixel,
                      int first_column) const {
    const int group = lane_index() / 4, member = lane_index() % 4;
    MOE_UNROLL
    for (int i = 0; i < Kernel::kMTiles; ++i) {
      MOE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t pixel = planes.pixel(frame, first_row + i, first_pixel + group + 8 * r);
        float* row = to + pixel * columns + first_column + 2 * member;
        MOE_UNROLL
        for (int j = 0; j < Kernel::kNTiles; ++j) {
          row[j * 8] = sums[i][j][2 * r];
          row[j * 8 + 1] = sums[i][j][2 * r + 1];
        }
      }
    }
  }
};

}  // namespace moe::cuda

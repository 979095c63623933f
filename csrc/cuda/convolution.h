// The 3x3 convolution as an implicit matrix product on the tensor cores: 256 pixels x a group of columns per block.
//
// A block walks over its input in steps: 64 bytes of channels of one tap. The pixels of its tile with their border lie
// in shared memory for all nine taps, so that activations cross the L2 cache once; every step brings 64 bytes of each
// column's weights. Both come by asynchronous copies, kStages - 1 steps ahead. Rows of 64 bytes are swizzled so that the
// eight rows of a matrix fall on different banks; any eight neighbouring pixels do.
//
// The accumulators stay in the registers of the mma fragments: lane 4 g + t holds pixels g and g + 8 of a tile's row,
// columns 2t and 2t + 1 of eight. What becomes of them is the Epilogue's matter.
#pragma once

#include "layout.h"

namespace moe::cuda {

// Where a chunk of 16 bytes lies in rows of 64.
MOE_DEVICE uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row >> 1 & 3)) << 4));
}

template <class Arithmetic, int kMTiles, int kNTiles>
struct Accumulators {
  float v[kMTiles][kNTiles][4];
};

template <class Arithmetic, int kWidth, class Epilogue>
struct Convolution {
  static constexpr int kThreads = 256;
  static constexpr int kStages = 4;
  static constexpr int kSide = kTile + 2;  // with the border
  static constexpr int kPixels = kSide * kSide;
  static constexpr int kWarpColumns = kWidth == kWide ? 64 : kNarrow;
  static constexpr int kWarpsN = kWidth / kWarpColumns;
  static constexpr int kWarpsM = kThreads / kWarp / kWarpsN;
  static constexpr int kMTiles = kTile / kWarpsM;  // rows of the tile that a warp computes
  static constexpr int kNTiles = kWarpColumns / 8;
  static constexpr int kWeightBytes = kWidth * kRowBytes;
  static constexpr int kPixelBytes = kPixels * kRowBytes;
  static constexpr size_t kSharedBytes = kStages * kWeightBytes + 2 * kPixelBytes;
  using Sums = float[kMTiles][kNTiles][4];

  struct Params {
    const Operand<Arithmetic>* input;  // `band`; tile row 0 starts at its row 0
    const Operand<Arithmetic>* weights;  // [steps][columns][64 bytes]
    Band band;
    int columns;      // of the weights
    Section section;  // those that are computed
    Epilogue epilogue;
  };

  static Grid grid(const Params& p, int output_rows, int output_columns) {
    return {divide_up(output_columns, kTile) * p.section.groups(), divide_up(output_rows, kTile), p.band.frames};
  }

  MOE_DEVICE static void run(const Params& p) {
    const Index3 block = block_index();
    const int groups = p.section.columns / kWidth;  // neighbours in the grid share a tile of pixels
    const int tile_column = block.x / groups, tile_row = block.y, frame = block.z;
    const int first_column = p.section.first + block.x % groups * kWidth;
    if (!p.epilogue.wanted(frame, tile_row, tile_column, first_column)) return;

    const char* pixels = reinterpret_cast<const char*>(
        p.input + p.band.pixel(frame, tile_row * kTile, tile_column * kTile) * p.band.channels);
    const char* weights = reinterpret_cast<const char*>(p.weights) + static_cast<int64_t>(first_column) * kRowBytes;
    const int blocks = p.band.channels / kStep<Arithmetic>, steps = blocks * kTaps;
    const uint32_t weight_ring = shared_address(shared_memory());
    const uint32_t pixel_ring = weight_ring + kStages * kWeightBytes;

    const auto copy_pixels = [&](int channel_block) {
      const int64_t row_pitch = static_cast<int64_t>(p.band.pitch) * p.band.channels * sizeof(Operand<Arithmetic>);
      const int pixel_pitch = p.band.channels * static_cast<int>(sizeof(Operand<Arithmetic>));
      const uint32_t to = pixel_ring + channel_block % 2 * kPixelBytes;
      const char* from = pixels + channel_block * kRowBytes;
      for (int i = thread_index(); i < kPixels * 4; i += kThreads) {
        const int pixel = i / 4, chunk = i % 4;
        copy_async(to + swizzled(pixel, chunk),
                   from + pixel / kSide * row_pitch + pixel % kSide * pixel_pitch + chunk * 16, true);
      }
    };
    const auto copy_weights = [&](int step) {
      const uint32_t to = weight_ring + step % kStages * kWeightBytes;
      const char* from = weights + static_cast<int64_t>(step) * p.columns * kRowBytes;
      MOE_UNROLL
      for (int i = thread_index(); i < kWidth * 4; i += kThreads)
        copy_async(to + swizzled(i / 4, i % 4), from + i * 16, true);
    };

    copy_pixels(0);
    for (int step = 0; step < kStages - 1; ++step) {
      copy_weights(step);  // there are at least nine
      commit_copies();
    }
    Sums sums;
    MOE_UNROLL
    for (int i = 0; i < kMTiles; ++i) {
      MOE_UNROLL
      for (int j = 0; j < kNTiles; ++j) {
        MOE_UNROLL
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.f;
      }
    }
    int tap_row = 0, tap_column = 0, channel_block = 0;
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      sync_block();  // this step's operands are there, and everybody has left the last step's
      if (step + kStages - 1 < steps) copy_weights(step + kStages - 1);
      if (tap_row + tap_column == 0 && channel_block + 1 < blocks) copy_pixels(channel_block + 1);
      commit_copies();
      multiply_step(sums, pixel_ring + channel_block % 2 * kPixelBytes, weight_ring + step % kStages * kWeightBytes,
                    tap_row * kSide + tap_column);
      if (++tap_column == 3) {
        tap_column = 0;
        if (++tap_row == 3) tap_row = 0, ++channel_block;
      }
    }
    const int warp = warp_index();
    p.epilogue.template run<Arithmetic, Convolution>(sums, frame, tile_row * kTile + warp % kWarpsM * kMTiles,
                                                     tile_column * kTile,
                                                     first_column + warp / kWarpsM * kWarpColumns);
  }

 private:
  // sums += 64 bytes of channels under one tap; `shift` is the tap's first pixel.
  MOE_DEVICE static void multiply_step(Sums& sums, uint32_t pixels, uint32_t weights, int shift) {
    const int first_pixel = warp_index() % kWarpsM * kMTiles * kSide + shift;
    const int first_column = warp_index() / kWarpsM * kWarpColumns;
    if constexpr (std::is_same_v<Arithmetic, Ieee>)
      multiply_scalars(sums, pixels, weights, first_pixel, first_column);
    else
      multiply_matrices(sums, pixels, weights, first_pixel, first_column);
  }

  MOE_DEVICE static void multiply_matrices(Sums& sums, uint32_t pixels, uint32_t weights, int first_pixel,
                                           int first_column) {
    const int lane = lane_index();
    const int row = lane % 16, chunk = lane / 16;                                  // of the pixels' four matrices
    const int column = first_column + lane % 8 + lane / 16 * 8, part = lane / 8 % 2;  // of the weights'
    const uint32_t weight_row = weights + swizzled(column, part);
    uint32_t pixel_row[kMTiles];
    MOE_UNROLL
    for (int i = 0; i < kMTiles; ++i) pixel_row[i] = pixels + swizzled(first_pixel + i * kSide + row, chunk);
    MOE_UNROLL
    for (int half = 0; half < 2; ++half) {  // 32 bytes of channels: bit 5 of every address
      uint32_t a[kMTiles][4], b[kNTiles / 2][4];
      MOE_UNROLL
      for (int i = 0; i < kMTiles; ++i) load_matrices(a[i], pixel_row[i] ^ (half * 32));
      MOE_UNROLL
      for (int j = 0; j < kNTiles / 2; ++j) load_matrices(b[j], (weight_row + j * 16 * kRowBytes) ^ (half * 32));
      MOE_UNROLL
      for (int i = 0; i < kMTiles; ++i) {
        MOE_UNROLL
        for (int j = 0; j < kNTiles; ++j) {
          const uint32_t operand[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply(Arithmetic{}, sums[i][j], a[i], operand);
        }
      }
    }
  }

  // The same on the vector units, four channels at a time.
  MOE_DEVICE static void multiply_scalars(Sums& sums, uint32_t pixels, uint32_t weights, int first_pixel,
                                          int first_column) {
    const int group = lane_index() / 4, member = lane_index() % 4;
    for (int chunk = 0; chunk < 4; ++chunk) {
      float a[kMTiles][2][4];
      MOE_UNROLL
      for (int i = 0; i < kMTiles; ++i) {
        MOE_UNROLL
        for (int r = 0; r < 2; ++r)
          load_shared(a[i][r], pixels + swizzled(first_pixel + i * kSide + group + r * 8, chunk));
      }
      MOE_UNROLL
      for (int j = 0; j < kNTiles; ++j) {
        MOE_UNROLL
        for (int c = 0; c < 2; ++c) {
          float b[4];
          load_shared(b, weights + swizzled(first_column + j * 8 + 2 * member + c, chunk));
          MOE_UNROLL
          for (int i = 0; i < kMTiles; ++i) {
            MOE_UNROLL
            for (int r = 0; r < 2; ++r) {
              MOE_UNROLL
              for (int k = 0; k < 4; ++k) sums[i][j][2 * r + c] = fused(a[i][r][k], b[k], sums[i][j][2 * r + c]);
            }
          }
        }
      }
    }
  }
};

}  // namespace moe::cuda

// The hidden activations by the low-resolution formulation, and the second layer, in one kernel on the tensor cores:
//
//   conv(U x)[n, Y, X] = sum_dy sum_jy Uy[Y + dy, jy] ( sum_dx sum_jx Ux[X + dx, jx] G[jy, jx, dy, dx, n] )
//   G[jy, jx, dy, dx, n] = W[n, :, dy, dx] . x[:, jy, jx]
//
// A block streams down the rows of x for a strip of columns and a group of 16 hidden channels. Its first warps make G of
// a row (each for one unit of 32 pixels and one dy) and combine it along the row while it is in registers: the inner sum
// above. What comes of it lies in shared memory, two rows at a time; the other warps combine rows into output rows, one
// thread a column, and run the 1x1 layer. While they do, the first warps multiply the next row: three named barriers.
// Neither G nor upsampled features reach global memory.
//
// An output pixel reads three upsampled ones along each axis, X - 1, X and X + 1. So both combinations run over upsampled
// positions in order, and carry two sums: p, to which the next position alone is missing, and q, to which two are.
// Neighbours of weight 0 are not read, and positions outside the image (the padding) add nothing.
#pragma once

#include "features.h"

namespace moe::cuda {

constexpr int kUnitPixels = 32;    // of a row of x, in the accumulators of a warp
constexpr int kUnitColumns = 64;   // output columns of a unit, at most
constexpr int kUnits = 2;          // side by side in a block

// Units share out the columns of the output: each has as many as need no more than its pixels, beginning with those that
// the column left of its first one reads. Upsampling only (or no resampling), so that a pixel has at least one column.
struct Unit {
  int first_column, end_column;  // of the output
  int first_pixel;
};

MOE_BOTH Unit unit_from(int first_column, int in_width, int width) {
  const int left = first_column > 0 ? first_column - 1 : 0, last_pixel = in_width - 1;
  const int base = width > 1 ? static_cast<int>(static_cast<int64_t>(left) * last_pixel / (width - 1)) : 0;
  int end = first_column + kUnitColumns;
  const int reach = base + kUnitPixels - 1;
  if (reach < last_pixel) {
    const int upsampled = static_cast<int>(static_cast<int64_t>(reach) * (width - 1) / last_pixel);  // the last one
    end = upsampled < end ? upsampled : end;
  }
  return {first_column, end < width ? end : width, base};
}

struct Strip {
  Unit units[kUnits];  // the later ones may be empty
  int first_column() const { return units[0].first_column; }
};

MOE_BOTH Strip strip_from(int first_column, int in_width, int width) {
  Strip strip;
  for (int u = 0; u < kUnits; ++u) {
    strip.units[u] = unit_from(first_column, in_width, width);
    if (first_column >= width) strip.units[u] = {width, width, strip.units[0].first_pixel};
    first_column = strip.units[u].end_column;
  }
  return strip;
}

// How the columns of an image fall into strips.
struct Strips {
  int count = 0, widest = 0;

  Strips(int in_width, int width) {
    for (int column = 0; column < width; ++count) {
      const int end = strip_from(column, in_width, width).units[kUnits - 1].end_column;
      widest = std::max(widest, end - column);
      column = end;
    }
  }
};

// The most upsampled columns between two pixels, the left one counted; one more closes the row (see Slot).
inline int64_t slots_per_pixel(int64_t in_width, int64_t width) {
  if (in_width == 1) return width + 1;
  return std::max<int64_t>(2, divide_up(width - 1, in_width - 1));
}

// What the embedding adds before the ReLU, by output column and by output row: its convolution, separated. Each in four
// kinds: the other axis lies inside the image, at its first index, at its last, or has only one. A thread has one hidden
// channel at a few neighbouring places of one axis.
struct PositionParts {
  static constexpr int kThreads = 128;
  static constexpr int kPlaces = 8;

  struct Params {
    Problem problem;
    Columns layout;
    float *columns, *rows;  // [4][width or height][total]; biases are in the former
  };

  static Grid grid(const Params& p) {
    return {divide_up(p.layout.total, kThreads), divide_up(std::max(p.problem.height, p.problem.width), kPlaces), 2};
  }

  MOE_DEVICE static void run(const Params& p) {
    const Problem& problem = p.problem;
    const bool rows = block_index().z == 1;
    const int length = static_cast<int>(rows ? problem.height : problem.width);
    const int column = block_index().x * kThreads + thread_index(), first = block_index().y * kPlaces;
    if (column >= p.layout.total || first >= length) return;
    const int owner = p.layout.owner(column), half = static_cast<int>(problem.channels / 2);
    float parts[kPlaces][3] = {};  // of the taps of the other axis
    if (owner >= 0 && !rows) {
      const int local = column - p.layout.first(owner);
      const float bias = owner == p.layout.experts ? problem.gate_b1[local]
                                                   : problem.expert_b1[owner * p.layout.hidden + local];
      MOE_UNROLL
      for (int i = 0; i < kPlaces; ++i) parts[i][1] = bias;
    }
    for (int c = 0; c < half && owner >= 0 && problem.pos_x; ++c) {
      const float* table = (rows ? problem.pos_y : problem.pos_x) + c;
      MOE_UNROLL
      for (int tap = 0; tap < 3; ++tap) {
        float weights[3];
        MOE_UNROLL
        for (int other = 0; other < 3; ++other)
          weights[other] = first_weight(problem, p.layout, column, rows ? half + c : c,
                                        rows ? 3 * tap + other : 3 * other + tap);
        MOE_UNROLL
        for (int i = 0; i < kPlaces; ++i) {
          const int at = first + i + tap - 1;
          if (at < 0 || at >= length) continue;
          const float value = table[static_cast<int64_t>(at) * half];
          MOE_UNROLL
          for (int other = 0; other < 3; ++other) parts[i][other] = fused(value, weights[other], parts[i][other]);
        }
      }
    }
    float* out = rows ? p.rows : p.columns;
    MOE_UNROLL
    for (int i = 0; i < kPlaces; ++i) {
      if (first + i >= length) continue;
      for (int kind = 0; kind < 4; ++kind) {
        const float before = kind & 1 ? 0.f : parts[i][0], after = kind & 2 ? 0.f : parts[i][2];
        out[(static_cast<int64_t>(kind) * length + first + i) * p.layout.total + column] = parts[i][1] + before + after;
      }
    }
  }
};

// 3x3 weights as fragments: [groups][steps of 32 bytes of channels][taps][4 matrices][8 rows][16 bytes]. Row r of a
// group's first matrices is its channel 2 r, and of the second ones 2 r + 1, so that a lane holds two neighbours.
template <class Arithmetic>
struct PackFragments {
  static constexpr int kThreads = 256;
  static constexpr int kCount = 16 / sizeof(Operand<Arithmetic>);

  struct Params {
    Problem problem;
    Columns layout;
    int channels;  // padded
    Operand<Arithmetic>* packed;
  };

  static Grid grid(const Params& p) {
    return {divide_up(static_cast<int64_t>(p.layout.total) * p.channels * kTaps, kThreads)};
  }

  MOE_DEVICE static void run(const Params& p) {
    const int index = block_index().x * kThreads + thread_index();
    if (index >= p.layout.total * p.channels * kTaps) return;
    const int element = index % kCount, row = index / kCount % 8, matrix = index / (8 * kCount) % 4;
    const int fragment = index / (32 * kCount), tap = fragment % kTaps, steps = p.channels / (2 * kCount);
    const int column = fragment / kTaps / steps * kGroup + 2 * row + matrix % 2;
    const int channel = fragment / kTaps % steps * 2 * kCount + matrix / 2 * kCount + element;
    p.packed[index] = to_operand<Arithmetic>(first_weight(p.problem, p.layout, column, channel, tap));
  }
};

template <class Arithmetic>
struct LowResolution {
  static constexpr int kMakers = 3 * kUnits * kWarp, kCombiners = kUnits * kUnitColumns;
  static constexpr int kThreads = kMakers + kCombiners;
  static constexpr int kBlocks = sizeof(Operand<Arithmetic>) == 2 ? 2 : 1;  // on a processor, where they fit
  static constexpr int kTiles = kUnitPixels / 8;   // of 8 pixels, which the matrix units see as columns
  static constexpr int kRun = kUnitPixels / 4;     // neighbouring pixels in the accumulators of a lane, and as many
  static constexpr int kHalo = 3;                  // of the next lane's does it need for the columns that begin in its own
  static constexpr int kRowFloats = 3 * kGroup;
  static constexpr int kBlockPixels = kUnits * kUnitPixels;
  enum Barrier { kPixels = 1, kFull, kEmpty };

  struct Params {
    const char* x;  // operands, from the planes' first frame on
    int64_t frame_bytes, row_bytes, pixel_bytes;
    int in_height, in_width, height, width;
    int channels;                        // padded to whole steps of kRowBytes
    const Operand<Arithmetic>* weights;  // PackFragments
    const float *column_parts, *row_parts;  // PositionParts
    const float* second;                 // [most outputs][total]
    Columns columns;
    float* sums;                         // planes of the second layer's parts
    Planes planes;
    int rows, band_rows;                 // of the planes, and of a block
    int slots, widest;                   // slots_per_pixel(), Strips
  };

  static Grid grid(const Params& p, const Strips& strips) {
    return {static_cast<int64_t>(strips.count) * (p.columns.total / kGroup), divide_up(p.rows, p.band_rows),
            p.planes.frames};
  }

  // shared memory: weights, a row of pixels, the table of slots, two rows of what was combined along the row
  static int64_t weight_bytes(int64_t channels) { return kGroup * kTaps * channels * sizeof(Operand<Arithmetic>); }
  static MOE_BOTH int pixel_pitch(int channels) {
    return static_cast<int>(round_up(channels * static_cast<int>(sizeof(Operand<Arithmetic>)), 128));
  }
  static int64_t slot_bytes(int64_t slots) { return kUnits * (kRun + 2) * slots * 4 * sizeof(Slot); }
  static int64_t shared_bytes(int64_t channels, int64_t slots, int64_t widest) {
    return weight_bytes(channels) + kBlockPixels * pixel_pitch(static_cast<int>(channels)) + slot_bytes(slots) +
           2 * widest * kRowFloats * static_cast<int64_t>(sizeof(float));
  }

  MOE_DEVICE static void run(const Params& p) {
    const Block block(p);
    fill_slots(p, block);
    if (thread_index() < kMakers) {
      copy_weights(p, block);
      copy_pixels(p, block, block.first_source);
    }
    sync_block();  // the slots are there
    if (thread_index() < kMakers)
      make(p, block);
    else
      combine(p, block);
  }

 private:
  // One upsampled column of a lane's pixels, by the pixel left of it (4 lanes x kRun + 2 pixels x slots_per_pixel()).
  // Unused slots have no weight and no target; the one that closes the last output column has only a target.
  struct alignas(16) Slot {
    float lower_weight, upper_weight;
    int target;  // where the output column that it completes lies in a combined row, in bytes; or -1
    int unused;
  };

  struct Block {
    Strip strip;
    int group, frame;
    int first_row, end_row;          // of the output
    int first_source, last_source;   // rows of x
    uint32_t weights, pixels, slots, combined;  // shared memory
    int row_bytes;                   // of a combined row and dy

    MOE_DEVICE explicit Block(const Params& p) {
      const Index3 index = block_index();
      const int groups = p.columns.total / kGroup;  // neighbours in the grid share pixels
      int column = 0;
      for (int i = index.x / groups; i > 0; --i)
        column = strip_from(column, p.in_width, p.width).units[kUnits - 1].end_column;
      strip = strip_from(column, p.in_width, p.width);
      group = index.x % groups, frame = index.z;
      first_row = p.planes.first_row + index.y * p.band_rows;
      const int end = p.planes.first_row + p.rows;
      end_row = first_row + p.band_rows < end ? first_row + p.band_rows : end;
      const int first = first_row > 0 ? first_row - 1 : 0, last = end_row < p.height ? end_row : p.height - 1;
      first_source = source_position(first, p.in_height, p.height).lower;
      const SourcePosition reached = source_position(last, p.in_height, p.height);
      last_source = reached.lower + (reached.upper_weight > 0.f ? 1 : 0);

      weights = shared_address(shared_memory());
      pixels = weights + kGroup * kTaps * p.channels * static_cast<int>(sizeof(Operand<Arithmetic>));
      slots = pixels + kBlockPixels * pixel_pitch(p.channels);
      combined = slots + kUnits * (kRun + 2) * p.slots * 4 * static_cast<int>(sizeof(Slot));
      row_bytes = p.widest * kGroup * static_cast<int>(sizeof(float));
    }
    MOE_DEVICE uint32_t combined_row(int source) const { return combined + (source & 1) * 3 * row_bytes; }
  };

  // the makers

  // Chunks of 16 bytes are swizzled so that the eight pixels of a matrix (0, 1, 8, 9, 16 ...) fall on different banks.
  MOE_DEVICE static int swizzle(int pixel) { return (pixel & 1) | (pixel >> 3 & 3) << 1; }

  MOE_DEVICE static void copy_weights(const Params& p, const Block& block) {
    const int bytes = kGroup * kTaps * p.channels * static_cast<int>(sizeof(Operand<Arithmetic>));
    const char* from = reinterpret_cast<const char*>(p.weights) + static_cast<int64_t>(block.group) * bytes;
    for (int at = thread_index() * 16; at < bytes; at += kMakers * 16) copy_async(block.weights + at, from + at, true);
  }

  MOE_DEVICE static void copy_pixels(const Params& p, const Block& block, int source) {
    const int chunks = p.channels * static_cast<int>(sizeof(Operand<Arithmetic>)) / 16, pitch = pixel_pitch(p.channels);
    const int first = block.strip.units[0].first_pixel;
    const char* row = p.x + block.frame * p.frame_bytes + source * p.row_bytes;
    for (int i = thread_index(); i < kBlockPixels * chunks; i += kMakers) {
      const int pixel = i / chunks, chunk = i % chunks;
      const bool real = first + pixel < p.in_width;
      const uint32_t to = block.pixels + pixel * pitch + (chunk >> 3 << 7) + (((chunk & 7) ^ swizzle(pixel)) << 4);
      copy_async(to, row + (real ? first + pixel : 0) * p.pixel_bytes + chunk * 16, real);
    }
    commit_copies();
  }

  MOE_DEVICE static void fill_slots(const Params& p, const Block& block) {
    const int count = kUnits * (kRun + 2) * p.slots * 4;
    auto* table = reinterpret_cast<Slot*>(shared_memory() + (block.slots - block.weights));
    for (int i = thread_index(); i < count; i += kThreads) {
      const int lane = i % 4, slot = i / 4 % p.slots, pixel = i / 4 / p.slots % (kRun + 2);
      table[i] = slot_of(p, block, i / 4 / p.slots / (kRun + 2), lane, pixel, slot);
    }
  }

  MOE_DEVICE static Slot slot_of(const Params& p, const Block& block, int unit_index, int lane, int run_pixel, int slot) {
    const Slot none = {0.f, 0.f, -1, 0};
    const Unit unit = block.strip.units[unit_index];
    const int pixel = unit.first_pixel + lane * kRun + run_pixel, last = p.in_width - 1;
    if (pixel > last) return none;
    int upsampled = slot;  // the slot-th that lies at this pixel or right of it
    if (last > 0) upsampled += static_cast<int>(divide_up(static_cast<int64_t>(pixel) * (p.width - 1), last));
    if (upsampled > p.width || (upsampled == p.width && pixel < last)) return none;
    Slot found = none;
    if (upsampled < p.width) {
      const SourcePosition at = source_position(upsampled, p.in_width, p.width);
      if (at.lower != pixel) return none;
      found.lower_weight = 1.f - at.upper_weight, found.upper_weight = at.upper_weight;
    }
    const int column = upsampled - 1, left = column > 0 ? column - 1 : 0;  // of the output that is complete now
    const int owner = (source_position(left, p.in_width, p.width).lower - unit.first_pixel) / kRun;
    if (column >= unit.first_column && column < unit.end_column && owner == lane) {
      const int local = column - block.strip.units[0].first_column;
      found.target = combined_offset(local);
    }
    return found;
  }

  // Rows of 16 channels, their four chunks swizzled; a chunk's number (times 16) joins by exclusive or.
  MOE_DEVICE static int combined_offset(int column) { return column * 64 | (column >> 1 & 3) << 4; }

  using Sums = float[3][kTiles][4];

  MOE_DEVICE static void make(const Params& p, const Block& block) {
    const int dy = warp_index() % 3, unit = warp_index() / 3;
    const bool idle = block.strip.units[unit].first_column >= block.strip.units[unit].end_column;
    const int shift = block.strip.units[unit].first_pixel - block.strip.units[0].first_pixel;
    for (int source = block.first_source; source <= block.last_source; ++source) {
      wait_for_copies<0>();
      sync_some(kPixels, kMakers);  // the row of pixels is there
      Sums sums = {};
      if (!idle) multiply_row(p, block, sums, shift, dy);
      sync_some(kPixels, kMakers);  // everybody has left it
      if (source < block.last_source) copy_pixels(p, block, source + 1);
      if (source > block.first_source) sync_some(kEmpty, kThreads);  // the row before the last one is not read any more
      if (!idle) combine_along_row(p, block, sums, unit, block.combined_row(source) + dy * block.row_bytes);
      arrive(kFull, kThreads);
    }
  }

  // Lane 4 g + t gets channels 2 g and 2 g + 1 of the pixels t kRun ... t kRun + 7, for three dx.
  MOE_DEVICE static void multiply_row(const Params& p, const Block& block, Sums& sums, int shift, int dy) {
    const int lane = lane_index(), row = lane % 8, chunk = lane / 8;
    uint32_t pixel_row[kTiles];
    MOE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const int pixel = shift + row / 2 * kRun + 2 * j + row % 2;
      pixel_row[j] = block.pixels + pixel * pixel_pitch(p.channels) + ((chunk ^ swizzle(pixel)) << 4);
    }
    uint32_t fragment = block.weights + dy * 3 * 512 + lane * 16;
    const int steps = p.channels / kStep<Arithmetic>;
    for (int step = 0; step < steps; ++step) {
      uint32_t b[kTiles][4];
      MOE_UNROLL
      for (int j = 0; j < kTiles; ++j) load_matrices(b[j], (pixel_row[j] ^ (step & 1) << 6) + (step >> 1 << 7));
      MOE_UNROLL
      for (int half = 0; half < 2; ++half) {
        MOE_UNROLL
        for (int dx = 0; dx < 3; ++dx) {
          uint32_t a[4];
          load_matrices(a, fragment + dx * 512);
          MOE_UNROLL
          for (int j = 0; j < kTiles; ++j) {
            const uint32_t operand[2] = {b[j][2 * half], b[j][2 * half + 1]};
            multiply(Arithmetic{}, sums[dx][j], a, operand);
          }
        }
        fragment += kTaps * 512;
      }
    }
  }

  MOE_DEVICE static void combine_along_row(const Params& p, const Block& block, const Sums& sums, int unit, uint32_t to) {
    const int lane = lane_index(), next = lane % 4 < 3 ? lane + 1 : lane;  // the last one needs no neighbour
    float halo[3][kHalo][2];
    MOE_UNROLL
    for (int dx = 0; dx < 3; ++dx) {
      MOE_UNROLL
      for (int i = 0; i < kHalo; ++i) {
        MOE_UNROLL
        for (int c = 0; c < 2; ++c) halo[dx][i][c] = shuffle(sums[dx][i / 2][2 * c + i % 2], next);
      }
    }
    const auto value = [&](int dx, int i, int c) {
      return i < kRun ? sums[dx][i / 2 % kTiles][2 * c + i % 2] : halo[dx][i < kRun ? 0 : i - kRun][c];
    };
    const int own = (lane / 8 << 4) | (lane / 4 % 2 << 3);  // this lane's channels in a combined row
    uint32_t slot = block.slots + (unit * (kRun + 2) * p.slots * 4 + lane % 4) * static_cast<int>(sizeof(Slot));
    float first[2] = {}, second[2] = {};
    MOE_UNROLL
    for (int i = 0; i < kRun + 2; ++i) {
      for (int s = 0; s < p.slots; ++s, slot += 4 * sizeof(Slot)) {
        float entry[4];
        load_shared(entry, slot);
        const float lower = entry[0], upper = entry[1];
        float out[2] = {first[0], first[1]};
        if (lower > 0.f) {
          MOE_UNROLL
          for (int c = 0; c < 2; ++c) {
            out[c] = fused(lower, value(2, i, c), first[c]);
            first[c] = fused(lower, value(1, i, c), second[c]);
            second[c] = lower * value(0, i, c);
          }
          if (upper > 0.f) {
            MOE_UNROLL
            for (int c = 0; c < 2; ++c) {
              out[c] = fused(upper, value(2, i + 1, c), out[c]);
              first[c] = fused(upper, value(1, i + 1, c), first[c]);
              second[c] = fused(upper, value(0, i + 1, c), second[c]);
            }
          }
        }
        const int target = static_cast<int>(as_bits(entry[2]));
        if (target >= 0) store_shared(to + (target ^ own), out[0], out[1]);
      }
    }
  }

  // the combiners: each thread has one output column

  struct Pending {
    float first[kGroup], second[kGroup];
  };

  MOE_DEVICE static void combine(const Params& p, const Block& block) {
    const int local = thread_index() - kMakers, column = block.strip.units[0].first_column + local;
    const bool real = column < block.strip.units[kUnits - 1].end_column;
    int next = block.first_row > 0 ? block.first_row - 1 : 0;  // upsampled row
    const int last = block.end_row < p.height ? block.end_row : p.height - 1;
    Pending pending = {};
    for (int source = block.first_source; source <= block.last_source; ++source) {
      sync_some(kFull, kThreads);
      for (; next <= last; ++next) {
        const SourcePosition at = source_position(next, p.in_height, p.height);
        const bool between = at.upper_weight > 0.f;
        if (at.lower + (between ? 1 : 0) > source) break;
        float hidden[kGroup];
        if (real) {
          const uint32_t lower = block.combined_row(at.lower), upper = block.combined_row(at.lower + 1);
          advance(block, pending, hidden, lower, upper, at.upper_weight, local);
          if (next > block.first_row) finish(p, block, hidden, next - 1, column);
        }
      }
      if (source < block.last_source) arrive(kEmpty, kThreads);
    }
    if (real && block.end_row == p.height) finish(p, block, pending.first, p.height - 1, column);
  }

  // One more upsampled row; `hidden` is the output row above it.
  MOE_DEVICE static void advance(const Block& block, Pending& pending, float (&hidden)[kGroup], uint32_t lower,
                                 uint32_t upper, float weight, int local) {
    const int offset = combined_offset(local);
    MOE_UNROLL
    for (int chunk = 0; chunk < kGroup / 4; ++chunk) {
      const uint32_t at = offset ^ chunk << 4;
      float rows[3][4];
      MOE_UNROLL
      for (int dy = 0; dy < 3; ++dy) load_shared(rows[dy], lower + dy * block.row_bytes + at);
      if (weight > 0.f) {
        MOE_UNROLL
        for (int dy = 0; dy < 3; ++dy) {
          float above[4];
          load_shared(above, upper + dy * block.row_bytes + at);
          MOE_UNROLL
          for (int e = 0; e < 4; ++e) rows[dy][e] = fused(weight, above[e], (1.f - weight) * rows[dy][e]);
        }
      }
      MOE_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int c = 4 * chunk + e;
        hidden[c] = pending.first[c] + rows[2][e];
        pending.first[c] = pending.second[c] + rows[1][e];
        pending.second[c] = rows[0][e];
      }
    }
  }

  // The embedding and the biases, ReLU, and this group's part of the second layer.
  MOE_DEVICE static void finish(const Params& p, const Block& block, float (&hidden)[kGroup], int row, int column) {
    const Columns& columns = p.columns;
    const int first = block.group * kGroup, owner = columns.owner(first);
    if (owner < 0) return;
    const int kind_of_row = (row == 0 ? 1 : 0) | (row == p.height - 1 ? 2 : 0);
    const int kind_of_column = (column == 0 ? 1 : 0) | (column == p.width - 1 ? 2 : 0);
    const float* of_column =
        p.column_parts + (static_cast<int64_t>(kind_of_row) * p.width + column) * columns.total + first;
    const float* of_row = p.row_parts + (static_cast<int64_t>(kind_of_column) * p.height + row) * columns.total + first;
    const int used = columns.first(owner) + columns.channels(owner) - first;
    MOE_UNROLL
    for (int c = 0; c < kGroup; ++c) hidden[c] = c < used ? relu(hidden[c] + (of_column[c] + of_row[c])) : 0.f;
    const int part = columns.part(owner, first), outputs = columns.outputs_of(owner);
    const int64_t pixel = p.planes.pixel(block.frame, row - p.planes.first_row, column);
    for (int output = 0; output < outputs; ++output) {
      const float* weights = p.second + static_cast<int64_t>(output) * columns.total + first;
      float sum = 0.f;
      MOE_UNROLL
      for (int c = 0; c < kGroup; ++c) sum = fused(hidden[c], weights[c], sum);
      p.sums[columns.slot(owner, part, output) * p.planes.size() + pixel] = sum;
    }
  }
};

}  // namespace moe::cuda

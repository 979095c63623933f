// The hidden activations by the low-resolution formulation, and the second layer, in one kernel:
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
constexpr int kUnits = 2;          // side by side in a block: the first one and, in Facts, the second one

// Units share out the columns of the output: each has as many as need no more than its pixels, beginning with those that
// the column left of its first one reads. Upsampling only (or no resampling), so that a pixel has at least one column.
struct Unit {
  int first_column, end_column;  // of the output
  int first_pixel;
};

MOE_BOTH Unit unit_from(int first_column, int in_width, int width) {
  const int left = first_column > 0 ? first_column - 1 : 0, last_pixel = in_width - 1;
  const int base = width > 1 ? left * last_pixel / (width - 1) : 0;  // sides are at most 32,768
  int end = first_column + kUnitColumns;
  const int reach = base + kUnitPixels - 1;
  if (reach < last_pixel) {
    const int upsampled = reach * (width - 1) / last_pixel;  // the last one
    end = upsampled < end ? upsampled : end;
  }
  return {first_column, end < width ? end : width, base};
}

// A strip is kUnits units side by side; the later ones may be empty.
MOE_BOTH Unit unit_of_strip(int index, int first_column, int in_width, int width) {
  Unit unit = unit_from(first_column, in_width, width);
  for (; index > 0; --index) unit = unit_from(unit.end_column, in_width, width);
  return unit;
}
MOE_BOTH int end_of_strip(int first_column, int in_width, int width) {
  return unit_of_strip(kUnits - 1, first_column, in_width, width).end_column;
}

// How the columns of an image fall into strips.
struct Strips {
  int count = 0, widest = 0;

  Strips(int in_width, int width) {
    for (int column = 0; column < width; ++count) {
      const int end = end_of_strip(column, in_width, width);
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
  static constexpr int kRun = kUnitPixels / 4;     // neighbouring pixels in the accumulators of a lane; columns that
                                                   // begin there read up to three of the next lane's
  static constexpr int kColumnBytes = 3 * kGroup * sizeof(float);  // of a combined row, for three dy
  static constexpr int kBlockPixels = kUnits * kUnitPixels;
  static constexpr int kFactsBytes = 128;          // so that all that follows is aligned to it
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
           kFactsBytes + 2 * widest * kColumnBytes;
  }

  MOE_DEVICE static void run(const Params& p) {
    begin(p);
    sync_block();  // the slots are there
    if (thread_index() < kMakers)
      make(p, Block(p));
    else
      combine(p, Block(p));
  }

 private:
  // One upsampled column of a lane's pixels, by the pixel left of it (4 lanes x kRun + 2 pixels x slots_per_pixel()).
  // Unused slots have no weight and no target; the one that closes the last output column has only a target.
  struct alignas(16) Slot {
    float lower_weight, upper_weight;
    int target;  // where the output column that it completes lies in a combined row, in bytes; or -1
    int unused;
  };

  // What is read in shared memory each time, for want of registers.
  struct alignas(16) Facts {
    int first_channel, used;  // of the group, and how many of them are not padding
    int sums_row;             // among the planes: where this frame's first sums would have the image's row 0
    int shift;                // of the second unit's pixels from the first one's; or -1: it has no columns
    int last_source;          // of Block
    int first_pixel, unused[2];
  };

  struct Block {
    int first_column, end_column;    // of the output
    int first_pixel;                 // of x
    int first_channel, frame;
    int first_row, end_row;          // of the output
    int first_source, last_source;   // rows of x
    uint32_t weights, pixels, slots, combined;  // shared memory

    MOE_DEVICE explicit Block(const Params& p) {
      const Index3 index = {computed_anew(block_index().x), computed_anew(block_index().y), block_index().z};
      const int groups = p.columns.total / kGroup;  // neighbours in the grid share pixels
      first_column = 0;
      for (int i = index.x / groups; i > 0; --i) first_column = end_of_strip(first_column, p.in_width, p.width);
      end_column = end_of_strip(first_column, p.in_width, p.width);
      first_pixel = unit_from(first_column, p.in_width, p.width).first_pixel;
      first_channel = index.x % groups * kGroup, frame = index.z;
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
      combined = slots + kUnits * (kRun + 2) * p.slots * 4 * static_cast<int>(sizeof(Slot)) + kFactsBytes;
    }
  };

  MOE_DEVICE static Facts facts(const Block& block) {
    float v[2][4];
    const uint32_t at = block.combined - static_cast<int>(sizeof(Facts));
    load_shared(v[0], at);
    load_shared(v[1], at + 16);
    const auto integer = [&](int i) { return static_cast<int>(as_bits(v[i / 4][i % 4])); };
    return {integer(0), integer(1), integer(2), integer(3), integer(4), integer(5), {}};
  }

  MOE_DEVICE static void begin(const Params& p) {
    const Block block(p);
    fill_slots(p, block);
    if (thread_index() == kMakers) fill_facts(p, block);
    if (thread_index() >= kMakers) return;
    copy_weights(p, block);
    copy_pixels(p, block, block.first_pixel, block.first_source);
  }

  // the makers

  // Chunks of 16 bytes are swizzled so that the eight pixels of a matrix (0, 1, 8, 9, 16 ...) fall on different banks.
  MOE_DEVICE static int swizzle(int pixel) { return (pixel & 1) | (pixel >> 3 & 3) << 1; }

  MOE_DEVICE static void copy_weights(const Params& p, const Block& block) {
    const int bytes = kGroup * kTaps * p.channels * static_cast<int>(sizeof(Operand<Arithmetic>));
    const int64_t group = block.first_channel / kGroup;
    const char* from = reinterpret_cast<const char*>(p.weights) + group * bytes;
    MOE_KEEP_LOOP
    for (int at = thread_index() * 16; at < bytes; at += kMakers * 16) copy_async(block.weights + at, from + at, true);
  }

  MOE_DEVICE static void copy_pixels(const Params& p, const Block& block, int first, int source) {
    const int chunks = p.channels * static_cast<int>(sizeof(Operand<Arithmetic>)) / 16, pitch = pixel_pitch(p.channels);
    const char* row = p.x + block.frame * p.frame_bytes + source * p.row_bytes;
    MOE_KEEP_LOOP
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
    MOE_KEEP_LOOP
    for (int i = thread_index(); i < count; i += kThreads) {
      const int lane = i % 4, slot = i / 4 % p.slots, pixel = i / 4 / p.slots % (kRun + 2);
      table[i] = slot_of(p, block, i / 4 / p.slots / (kRun + 2), lane, pixel, slot);
    }
  }

  MOE_DEVICE static void fill_facts(const Params& p, const Block& block) {
    const Columns& columns = p.columns;
    const int first = block.first_channel, owner = columns.owner(first);
    const int plane = columns.slot(owner, columns.part(owner, first), 0);
    const Unit second = unit_of_strip(1, block.first_column, p.in_width, p.width);
    Facts& facts = *reinterpret_cast<Facts*>(shared_memory() + (block.combined - block.weights) - sizeof(Facts));
    facts.first_channel = first;
    facts.used = columns.first(owner) + columns.channels(owner) - first;
    facts.sums_row = (plane * p.planes.frames + block.frame) * p.planes.rows - p.planes.first_row;
    facts.last_source = block.last_source, facts.first_pixel = block.first_pixel;
    facts.shift = second.first_column < second.end_column ? second.first_pixel - block.first_pixel : -1;
  }

  MOE_DEVICE static Slot slot_of(const Params& p, const Block& block, int unit_index, int lane, int run_pixel,
                                 int slot) {
    const Slot none = {0.f, 0.f, -1, 0};
    const Unit unit = unit_of_strip(unit_index, block.first_column, p.in_width, p.width);
    const int pixel = unit.first_pixel + lane * kRun + run_pixel, last = p.in_width - 1;
    if (pixel > last) return none;
    int upsampled = slot;  // the slot-th that lies at this pixel or right of it
    if (last > 0) upsampled += (pixel * (p.width - 1) + last - 1) / last;
    if (upsampled > p.width || (upsampled == p.width && pixel < last)) return none;
    Slot found = none;
    if (upsampled < p.width) {
      const SourcePosition at = source_position(upsampled, p.in_width, p.width);
      if (at.lower != pixel) return none;
      found.lower_weight = 1.f - at.upper_weight, found.upper_weight = at.upper_weight;
    }
    const int column = upsampled - 1, left = column > 0 ? column - 1 : 0;  // of the output that is complete now
    const int owner = (source_position(left, p.in_width, p.width).lower - unit.first_pixel) / kRun;
    if (column >= unit.first_column && column < unit.end_column && owner == lane)
      found.target = combined_offset(column - block.first_column);
    return found;
  }

  // Combined rows: [columns][dy][16 channels], of which the four chunks of 16 bytes are swizzled; a chunk's number
  // (times 16) joins by exclusive or.
  MOE_DEVICE static int combined_offset(int column) { return column * kColumnBytes | (column >> 1 & 3) << 4; }
  MOE_DEVICE static uint32_t combined_row(const Params& p, const Block& block, int source) {
    return block.combined + (source & 1) * p.widest * kColumnBytes;
  }

  using Sums = float[3][kTiles][4];

  MOE_DEVICE static void make(const Params& p, const Block& block) {
    MOE_KEEP_LOOP
    for (int source = block.first_source; source <= facts(block).last_source; ++source) {
      const int warp = computed_anew(warp_index()), unit = warp / 3, dy = warp % 3;
      const int shift = unit == 0 ? 0 : facts(block).shift;
      wait_for_copies<0>();
      sync_some(kPixels, kMakers);  // the row of pixels is there
      Sums sums = {};
      if (shift >= 0) multiply_row(p, block, sums, shift, dy);
      sync_some(kPixels, kMakers);  // everybody has left it
      const Facts now = facts(block);
      if (source < now.last_source) copy_pixels(p, block, now.first_pixel, source + 1);
      sync_some(kEmpty, kThreads);  // the row before the last one is not read any more
      if (shift >= 0) combine_along_row(p, block, sums, unit, combined_row(p, block, source) + dy * 64);
      arrive(kFull, kThreads);
    }
  }

  // Lane 4 g + t gets channels 2 g and 2 g + 1 of the pixels t kRun ... t kRun + 7, for three dx.
  MOE_DEVICE static void multiply_row(const Params& p, const Block& block, Sums& sums, int shift, int dy) {
    if constexpr (std::is_same_v<Arithmetic, Ieee>)
      multiply_scalars(p, block, sums, shift, dy);
    else
      multiply_matrices(p, block, sums, shift, dy);
  }

  // On the vector units, four channels at a time.
  MOE_DEVICE static void multiply_scalars(const Params& p, const Block& block, Sums& sums, int shift, int dy) {
    const int lane = lane_index(), first = shift + lane % 4 * kRun;
    const uint32_t weights = block.weights + dy * 3 * 512 + lane / 4 * 16;
    MOE_KEEP_LOOP
    for (int chunk = 0; chunk < p.channels / 4; ++chunk) {
      const uint32_t fragment = weights + chunk / 2 * kTaps * 512 + chunk % 2 * 256;
      float x[kRun][4];
      MOE_UNROLL
      for (int i = 0; i < kRun; ++i)
        load_shared(x[i], block.pixels + (first + i) * pixel_pitch(p.channels) + (chunk >> 3 << 7) +
                              (((chunk & 7) ^ swizzle(first + i)) << 4));
      MOE_UNROLL
      for (int dx = 0; dx < 3; ++dx) {
        MOE_UNROLL
        for (int c = 0; c < 2; ++c) {
          float w[4];
          load_shared(w, fragment + dx * 512 + c * 128);
          MOE_UNROLL
          for (int i = 0; i < kRun; ++i) {
            float& sum = sums[dx][i / 2][2 * c + i % 2];
            MOE_UNROLL
            for (int k = 0; k < 4; ++k) sum = fused(x[i][k], w[k], sum);
          }
        }
      }
    }
  }

  MOE_DEVICE static void multiply_matrices(const Params& p, const Block& block, Sums& sums, int shift, int dy) {
    const int lane = computed_anew(lane_index()), row = lane % 8, chunk = lane / 8;
    uint32_t pixel_row[kTiles];
    MOE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const int pixel = shift + row / 2 * kRun + 2 * j + row % 2;
      pixel_row[j] = block.pixels + pixel * pixel_pitch(p.channels) + ((chunk ^ swizzle(pixel)) << 4);
    }
    uint32_t fragment = block.weights + dy * 3 * 512 + lane * 16;
    const int steps = p.channels / kStep<Arithmetic>;
    MOE_KEEP_LOOP
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

  MOE_DEVICE static void combine_along_row(const Params& p, const Block& block, const Sums& sums, int unit,
                                           uint32_t to) {
    const int lane = computed_anew(lane_index());
    const int next = lane % 4 < 3 ? lane + 1 : lane;        // the last one needs no neighbour
    const int own = (lane / 8 << 4) | (lane / 4 % 2 << 3);  // this lane's channels in a combined row
    uint32_t slot = block.slots + (unit * (kRun + 2) * p.slots * 4 + lane % 4) * static_cast<int>(sizeof(Slot));
    float first[2] = {}, second[2] = {}, left[3][2], right[3][2];
    pixel_of_run(sums, 0, next, right);
    MOE_UNROLL
    for (int i = 0; i < kRun + 2; ++i) {
      MOE_UNROLL
      for (int dx = 0; dx < 3; ++dx) left[dx][0] = right[dx][0], left[dx][1] = right[dx][1];
      pixel_of_run(sums, i + 1, next, right);
      MOE_KEEP_LOOP
      for (int s = 0; s < p.slots; ++s, slot += 4 * sizeof(Slot)) {
        float entry[4];
        load_shared(entry, slot);
        const float lower = entry[0], upper = entry[1];
        float out[2] = {first[0], first[1]};
        if (lower > 0.f) {
          MOE_UNROLL
          for (int c = 0; c < 2; ++c) {
            out[c] = fused(lower, left[2][c], first[c]);
            first[c] = fused(lower, left[1][c], second[c]);
            second[c] = lower * left[0][c];
          }
          if (upper > 0.f) {
            MOE_UNROLL
            for (int c = 0; c < 2; ++c) {
              out[c] = fused(upper, right[2][c], out[c]);
              first[c] = fused(upper, right[1][c], first[c]);
              second[c] = fused(upper, right[0][c], second[c]);
            }
          }
        }
        const int target = static_cast<int>(as_bits(entry[2]));
        if (target >= 0) store_shared(to + (target ^ own), out[0], out[1]);
      }
    }
  }

  // Pixel i of a lane's run; beyond its end those of the next lane's.
  MOE_DEVICE static void pixel_of_run(const Sums& sums, int i, int next, float (&out)[3][2]) {
    const int own = i % kRun;
    MOE_UNROLL
    for (int dx = 0; dx < 3; ++dx) {
      MOE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float value = sums[dx][own / 2][2 * c + own % 2];
        out[dx][c] = i < kRun ? value : shuffle(value, next);
      }
    }
  }

  // the combiners: each thread has one output column

  struct alignas(16) Four {
    float v[4];
  };
  struct Pending {
    float first[kGroup], second[kGroup];
  };

  MOE_DEVICE static void combine(const Params& p, const Block& block) {
    const int last_column = block.end_column - 1 - block.first_column;  // threads beyond it repeat it and store nothing
    const int local = thread_index() - kMakers < last_column ? thread_index() - kMakers : last_column;
    const int place = (block.first_column + local) << 7 | local;  // one register for column and place in the strip
    int next = block.first_row > 0 ? block.first_row - 1 : 0;  // upsampled row; the one at the image's end adds nothing
    Pending pending = {};
    arrive(kEmpty, kThreads);
    MOE_KEEP_LOOP
    for (int source = block.first_source; source <= facts(block).last_source; ++source) {
      sync_some(kFull, kThreads);
      MOE_KEEP_LOOP
      for (; next <= block.end_row; ++next) {
        const SourcePosition at = source_position(next < p.height ? next : p.height - 1, p.in_height, p.height);
        if (at.lower + (at.upper_weight > 0.f ? 1 : 0) > source) break;
        float hidden[kGroup];
        if (next == p.height)
          memcpy(hidden, pending.first, sizeof hidden);
        else if (at.upper_weight > 0.f)
          advance<true>(p, block, pending, hidden, at, computed_anew(place) & 127);
        else
          advance<false>(p, block, pending, hidden, at, computed_anew(place) & 127);
        if (next > block.first_row) finish(p, block, hidden, next - 1, computed_anew(place));
      }
      if (source < facts(block).last_source) arrive(kEmpty, kThreads);
    }
  }

  // One more upsampled row, between two of x or on one; `hidden` is the output row above it.
  template <bool kBetween>
  MOE_DEVICE static void advance(const Params& p, const Block& block, Pending& pending, float (&hidden)[kGroup],
                                 const SourcePosition& source, int local) {
    const int offset = combined_offset(local);
    const uint32_t lower = combined_row(p, block, source.lower) + offset;
    const uint32_t upper = combined_row(p, block, source.lower + 1) + offset;
    const float weight = source.upper_weight;
    MOE_UNROLL
    for (int chunk = 0; chunk < kGroup / 4; ++chunk) {
      float rows[3][4];
      MOE_UNROLL
      for (int dy = 0; dy < 3; ++dy) load_shared(rows[dy], (lower ^ chunk << 4) + dy * 64);
      if constexpr (kBetween) {
        MOE_UNROLL
        for (int dy = 0; dy < 3; ++dy) {
          float above[4];
          load_shared(above, (upper ^ chunk << 4) + dy * 64);
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
      sync_warp();  // it holds the next loads back, for which registers would not suffice
    }
  }

  // The embedding and the biases, ReLU, and this group's part of the second layer.
  MOE_DEVICE static void finish(const Params& p, const Block& block, float (&hidden)[kGroup], int row, int place) {
    const int column = place >> 7;
    const Facts facts = LowResolution::facts(block);
    const int first = facts.first_channel, total = p.columns.total;
    const int kind_of_row = (row == 0 ? 1 : 0) | (row == p.height - 1 ? 2 : 0);
    const int kind_of_column = (column == 0 ? 1 : 0) | (column == p.width - 1 ? 2 : 0);
    const float* of_column = p.column_parts + (static_cast<int64_t>(kind_of_row) * p.width + column) * total + first;
    const float* of_row = p.row_parts + (static_cast<int64_t>(kind_of_column) * p.height + row) * total + first;
    MOE_UNROLL
    for (int chunk = 0; chunk < kGroup; chunk += 4) {
      const Four a = *reinterpret_cast<const Four*>(of_column + chunk);
      const Four b = *reinterpret_cast<const Four*>(of_row + chunk);
      MOE_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& value = hidden[chunk + e];
        value = chunk + e < facts.used ? relu(value + (a.v[e] + b.v[e])) : 0.f;
      }
      sync_warp();
    }
    const float* weights = p.second + first;
    float* to = p.sums + static_cast<int64_t>(facts.sums_row + row) * p.planes.pitch + column;
    const int outputs = first < p.columns.gate_first ? p.columns.outputs : p.columns.experts;
    MOE_KEEP_LOOP
    for (int output = 0; output < outputs; ++output, weights += total, to += p.planes.size()) {
      float sum = 0.f;
      MOE_UNROLL
      for (int chunk = 0; chunk < kGroup; chunk += 4) {
        const Four w = *reinterpret_cast<const Four*>(weights + chunk);
        MOE_UNROLL
        for (int e = 0; e < 4; ++e) sum = fused(hidden[chunk + e], w.v[e], sum);
      }
      if (thread_index() - kMakers == (place & 127)) *to = sum;
    }
  }
};

}  // namespace moe::cuda

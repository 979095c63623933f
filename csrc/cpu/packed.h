// A head's parameters and a frame's pixels in the order in which the kernels read them.
#pragma once

#include <vector>

#include "memory.h"

namespace moe::cpu {

// What is multiplied. In bf16x3 a number is a high part, itself as bfloat16, and a low one, the rest as bfloat16.
enum class Numbers { float32, bf16, bf16x3 };

// Input channels in two halves, because the position embedding fills one with a function of the column and the other
// with one of the row. In bfloat16 each half is padded to whole pairs, and one float holds a pair; of bf16x3 the low
// parts of all channels come after all high ones.
class ChannelLayout {
 public:
  // Halves take whole multiples of `step` floats.
  ChannelLayout(int64_t channels, Numbers numbers, int64_t step = 1)
      : numbers_(numbers),
        half_((channels + 1) / 2),
        rest_(channels - half_),
        per_float_(numbers == Numbers::float32 ? 1 : 2),
        step_(step) {}

  Numbers numbers() const { return numbers_; }
  bool in_pairs() const { return numbers_ != Numbers::float32; }
  int64_t channels() const { return half_ + rest_; }
  int64_t half_channels() const { return half_; }
  int64_t half_floats() const { return padded(half_); }
  int64_t depth() const { return half_floats() + padded(rest_); }  // floats of a pixel's products
  int64_t floats() const { return parts() * depth(); }             // of a pixel
  int64_t position_floats() const { return parts() * half_floats(); }  // of a half alone
  int64_t parts() const { return numbers_ == Numbers::bf16x3 ? 2 : 1; }
  int64_t low_of(int64_t floats) const { return numbers_ == Numbers::bf16x3 ? floats : 0; }  // where there are low parts
  // A channel's place, counted in elements (floats, or halves of pairs).
  int64_t place(int64_t channel) const {
    return channel < half_ ? channel : half_floats() * per_float_ + channel - half_;
  }

 private:
  int64_t padded(int64_t channels) const { return round_up(divide_up(channels, per_float_), step_); }

  Numbers numbers_;
  int64_t half_, rest_, per_float_, step_;
};

// kGroup hidden channels of one branch: an expert (0 .. K-1), or the gate (K).
struct Group {
  int64_t branch, first_channel, channels;  // of the branch's hidden channels
  bool first_of_branch;
};

// A head's branches in groups, with everything but the first layers' weights, which each formulation packs its own way.
class Branches {
 public:
  Branches(const Problem& problem, const Kernels& kernels);

  const Problem& problem;
  const Kernels& kernels;

  int64_t branches() const { return problem.experts + (problem.has_gate() ? 1 : 0); }
  int64_t groups() const { return static_cast<int64_t>(groups_.size()); }
  const Group& group(int64_t g) const { return groups_[g]; }
  Span branch_groups(int64_t branch) const;
  bool is_expert(int64_t branch) const { return branch < problem.experts; }
  int64_t hidden(int64_t branch) const { return is_expert(branch) ? problem.expert_hidden : problem.gate_hidden; }
  int64_t outputs(int64_t branch) const { return is_expert(branch) ? problem.outputs : problem.experts; }
  int64_t padded_outputs(int64_t branch) const { return round_up(outputs(branch), kSecondAlign); }

  const float* w1(int64_t branch) const;                                             // as given
  const float* b1(int64_t g) const { return b1_ + g * kGroup; }                      // [kGroup]
  const float* w2(int64_t g) const { return w2_ + g * kGroup * most_outputs_; }      // [kGroup][padded_outputs]
  const float* w2_by_output(int64_t g) const { return w2_by_output_ + g * kGroup * most_outputs_; }  // transposed
  const float* b2(int64_t branch) const { return b2_ + branch * most_outputs_; }     // [padded_outputs]

 private:
  void pack_group(int64_t g);

  std::vector<Group> groups_;
  int64_t most_outputs_;
  Buffer b1_, w2_, w2_by_output_, b2_;
};

// A head for the low-resolution formulation.
class PackedHead : public Branches {
 public:
  PackedHead(const Problem& problem, const Kernels& kernels, Numbers numbers);

  const ChannelLayout layout;
  int64_t block_rows() const { return layout.in_pairs() ? kernels.bf16.block_rows : kernels.block_rows; }  // of products
  // Low-resolution columns whose products are made together, and blended while they are in L1 or, if the products are
  // fast, L2: a multiple of block_rows().
  int64_t column_block() const { return layout.in_pairs() ? kernels.bf16.columns : kColumnBlock / kernels.block_rows * kernels.block_rows; }

  // The first layers' weights in the products' order.
  int64_t packed_floats() const { return groups() * group_floats(); }
  void pack(float* out) const;
  // Must come before what follows. `packed`: what pack() wrote earlier; null: pack now.
  void use(const float* packed);

  // The position embedding's part that depends on the column, [3][W][kGroup] per row of taps; null without one.
  const float* column_part(int64_t g) const;

  // products [columns][kColumn] = packed pixels times group g's weights, for the channels of half 0, half 1 or both:
  // layout.floats() or layout.position_floats() a pixel.
  enum class Channels { all, first_half, second_half };
  void multiply(int64_t g, Channels which, const float* pixels, int64_t pixel_floats, int64_t blocks,
                float* products) const;

 private:
  static constexpr int64_t kColumnBlock = 32;

  int64_t group_floats() const { return kColumn * layout.floats(); }
  void pack_group(int64_t g, float* out) const;
  void make_column_part(int64_t g, const float* packed_pos, float* products);

  Buffer own_w1_, column_part_;
  const float* w1_;
};

// Some rows of a table [count][half_channels] of positions as packed pixels of one half, whose padding must be 0.
void pack_positions(const float* table, Span rows, const ChannelLayout& layout, float* out);

// Some columns of row `row` of a frame as packed pixels `pixel` floats apart, whose padding must be 0.
void pack_row(const Problem& problem, const Kernels& kernels, const ChannelLayout& layout, int64_t frame, int64_t row,
              Span columns, int64_t pixel, float* out);

}  // namespace moe::cpu

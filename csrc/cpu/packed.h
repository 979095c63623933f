// A head's parameters and a frame's pixels in the order in which the kernels read them.
#pragma once

#include <vector>

#include "memory.h"

namespace moe::cpu {

// Input channels in two halves, because the position embedding fills one with a function of the column and the other
// with one of the row. In bfloat16 each half is padded to whole pairs, and one float holds a pair.
class ChannelLayout {
 public:
  ChannelLayout(int64_t channels, bool bf16)
      : bf16_(bf16), half_((channels + 1) / 2), rest_(channels - half_), per_float_(bf16 ? 2 : 1) {}

  bool bf16() const { return bf16_; }
  int64_t channels() const { return half_ + rest_; }
  int64_t half_channels() const { return half_; }
  int64_t half_floats() const { return divide_up(half_, per_float_); }
  int64_t floats() const { return half_floats() + divide_up(rest_, per_float_); }  // of a pixel
  // A channel's place, counted in elements (floats, or halves of pairs).
  int64_t place(int64_t channel) const {
    return channel < half_ ? channel : half_floats() * per_float_ + channel - half_;
  }

 private:
  bool bf16_;
  int64_t half_, rest_, per_float_;
};

// kGroup hidden channels of one branch: an expert (0 .. K-1), or the gate (K).
struct Group {
  int64_t branch, first_channel, channels;  // of the branch's hidden channels
  bool first_of_branch;
};

class PackedHead {
 public:
  PackedHead(const Problem& problem, const Kernels& kernels, bool bf16);

  const Problem& problem;
  const Kernels& kernels;
  const ChannelLayout layout;

  int64_t groups() const { return static_cast<int64_t>(groups_.size()); }
  const Group& group(int64_t g) const { return groups_[g]; }
  Span branch_groups(int64_t branch) const;
  int64_t outputs(int64_t branch) const { return branch < problem.experts ? problem.outputs : problem.experts; }
  int64_t padded_outputs(int64_t branch) const { return round_up(outputs(branch), kSecondAlign); }

  const float* w1(int64_t branch) const { return branch < problem.experts ? problem.expert_w1 + branch * problem.expert_hidden * problem.channels * kTaps : problem.gate_w1; }
  const float* b1(int64_t g) const { return b1_ + g * kGroup; }                      // [kGroup]
  const float* w2(int64_t g) const { return w2_ + g * kGroup * most_outputs_; }      // [kGroup][padded_outputs]
  const float* w2_by_output(int64_t g) const { return w2_by_output_ + g * kGroup * most_outputs_; }  // transposed
  const float* b2(int64_t branch) const { return b2_ + branch * most_outputs_; }     // [padded_outputs]
  // The position embedding's part that depends on the column, [3][W][kGroup] per row of taps; null without one.
  const float* column_part(int64_t g) const;

  // products [columns][kColumn] = packed pixels times group g's weights, for the channels of half 0, half 1 or both.
  enum class Channels { all, first_half, second_half };
  void multiply(int64_t g, Channels which, const float* pixels, int64_t pixel_floats, int64_t blocks,
                float* products) const;

 private:
  void pack_group(int64_t g);
  void make_column_part(int64_t g, const float* packed_pos, float* products);

  std::vector<Group> groups_;
  int64_t most_outputs_;
  Buffer w1_, b1_, w2_, w2_by_output_, b2_, column_part_;
};

// A table [count][half_channels] of positions as packed pixels of one half, zero up to a whole block of rows.
Buffer pack_positions(const float* table, Span rows, const ChannelLayout& layout, int64_t block_rows);

// Row `row` of a frame as packed pixels [round_up(w, block_rows)][layout.floats()].
void pack_row(const Problem& problem, const ChannelLayout& layout, int64_t frame, int64_t row, int64_t block_rows,
              float* out);

}  // namespace moe::cpu

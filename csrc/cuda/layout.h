// How the work is laid out in memory: hidden channels in columns, the image in bands, buffers in the workspace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.h"

namespace moe::cuda {

constexpr int kTile = 16;     // a block of the convolution computes kTile x kTile pixels
constexpr int kRowBytes = 64;  // of one pixel (or column of weights) that a step of the convolution reads
constexpr int kTaps = 9;

MOE_BOTH int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
MOE_BOTH int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

// The arithmetic of the products, as a type: Bf16, Half, Tf32, or
struct Ieee {};

template <class Arithmetic>
struct OperandOf {
  using Type = float;
};
template <>
struct OperandOf<Bf16> {
  using Type = Bf16;
};
template <>
struct OperandOf<Half> {
  using Type = Half;
};
template <class Arithmetic>
using Operand = typename OperandOf<Arithmetic>::Type;

template <class Arithmetic>
constexpr int kStep = kRowBytes / static_cast<int>(sizeof(Operand<Arithmetic>));  // channels of one step

template <class Arithmetic>
MOE_DEVICE Operand<Arithmetic> to_operand(float value) {
  if constexpr (std::is_same_v<Arithmetic, Ieee>)
    return value;
  else
    return rounded<Arithmetic>(value);
}
MOE_DEVICE float to_float(float value) { return value; }

// A run of groups of `width` columns that one launch of the convolution computes.
struct Section {
  int first, columns, width;

  int groups() const { return columns / width; }
};

// The hidden channels of the experts, then of the gate, as columns of one matrix. An owner (expert k, or the gate as
// number `experts`) starts at a multiple of 8, so that a fragment of 8 columns has one owner; what remains is padding.
struct Columns {
  int experts, outputs;
  int hidden, gate_hidden;         // channels of an owner
  int expert_stride, gate_first;   // in columns
  int total;
  int warp_shift, gate_warp_shift;  // log2 of the columns that one warp sums up: see part()
  int expert_parts, gate_parts;     // at most

  MOE_BOTH int owner(int column) const {  // -1: padding
    if (column >= gate_first) return column < gate_first + gate_hidden ? experts : -1;
    const int k = column / expert_stride;
    return k < experts && column - k * expert_stride < hidden ? k : -1;
  }
  MOE_BOTH int first(int owner) const { return owner == experts ? gate_first : owner * expert_stride; }
  MOE_BOTH int channels(int owner) const { return owner == experts ? gate_hidden : hidden; }
  MOE_BOTH int outputs_of(int owner) const { return owner == experts ? experts : outputs; }
  MOE_BOTH int most_outputs() const { return gate_hidden > 0 && experts > outputs ? experts : outputs; }
  MOE_BOTH int raw_outputs() const { return experts * outputs + (gate_hidden > 0 ? experts : 0); }
  MOE_BOTH int raw_output(int owner, int output) const { return owner * outputs + output; }

  // A raw output is a sum of parts, one for each warp that holds columns of its owner.
  MOE_BOTH int part(int owner, int column) const {
    const int shift = owner == experts ? gate_warp_shift : warp_shift;
    return (column >> shift) - (first(owner) >> shift);
  }
  MOE_BOTH int parts(int owner) const { return part(owner, first(owner) + channels(owner) - 1) + 1; }
  MOE_BOTH int slot(int owner, int part, int output) const {
    return owner == experts ? (experts * expert_parts) * outputs + part * experts + output
                            : (owner * expert_parts + part) * outputs + output;
  }
  int slots() const { return experts * (expert_parts * outputs + gate_parts); }
  void count_parts() {
    expert_parts = 1;
    for (int k = 0; k < experts; ++k) expert_parts = std::max(expert_parts, parts(k));
    gate_parts = gate_hidden > 0 ? parts(experts) : 0;
  }
};

constexpr int kWide = 128, kNarrow = 32;  // groups of columns; a warp of the wide kernel has 64 of them, else all 32
inline int warp_shift_of(int width) { return width == kWide ? 6 : 5; }

// The width of groups that wastes less: a narrow group costs almost twice as much per column.
inline int group_width(int64_t columns) {
  return 18 * round_up(columns, kNarrow) < 10 * round_up(columns, kWide) ? kNarrow : kWide;
}

struct ColumnPlan {
  Columns columns;
  Section first, second;  // with skipping the gate, then the experts; else everything, then nothing
};

inline ColumnPlan plan_columns(const Problem& p, bool skipping) {
  ColumnPlan plan;
  Columns& c = plan.columns;
  c.experts = static_cast<int>(p.experts);
  c.outputs = static_cast<int>(p.outputs);
  c.hidden = static_cast<int>(p.expert_hidden);
  c.gate_hidden = static_cast<int>(p.gate_hidden);
  if (skipping) {  // every expert in groups of its own
    const int expert_width = group_width(c.hidden), gate_width = group_width(c.gate_hidden);
    c.expert_stride = static_cast<int>(round_up(c.hidden, expert_width));
    c.gate_first = static_cast<int>(round_up(c.experts * c.expert_stride, gate_width));
    const int gate_columns = static_cast<int>(round_up(c.gate_hidden, gate_width));
    c.total = c.gate_first + gate_columns;
    c.warp_shift = warp_shift_of(expert_width), c.gate_warp_shift = warp_shift_of(gate_width);
    plan.first = {c.gate_first, gate_columns, gate_width};
    plan.second = {0, c.experts * c.expert_stride, expert_width};
  } else {
    c.expert_stride = static_cast<int>(round_up(c.hidden, 8));
    c.gate_first = c.experts * c.expert_stride;
    const int64_t used = c.gate_first + round_up(c.gate_hidden, 8);
    const int width = group_width(used);
    c.total = static_cast<int>(round_up(used, width));
    c.warp_shift = c.gate_warp_shift = warp_shift_of(width);
    plan.first = {0, c.total, width};
    plan.second = {0, 0, kNarrow};
  }
  c.count_parts();
  return plan;
}

// Columns for the low-resolution kernel, whose blocks take a group of 16, of one owner.
constexpr int kGroup = 16;
inline Columns group_columns(const Problem& p) {
  Columns c;
  c.experts = static_cast<int>(p.experts), c.outputs = static_cast<int>(p.outputs);
  c.hidden = static_cast<int>(p.expert_hidden), c.gate_hidden = static_cast<int>(p.gate_hidden);
  c.expert_stride = static_cast<int>(round_up(c.hidden, kGroup));
  c.gate_first = c.experts * c.expert_stride;
  c.total = c.gate_first + static_cast<int>(round_up(c.gate_hidden, kGroup));
  c.warp_shift = c.gate_warp_shift = 4;
  c.count_parts();
  return c;
}

// Rows of pixels with `channels` numbers each, of one or more frames: row 0 is the image's row `first_row`, column 0
// the one left of the image. The border, and everything outside the image, is zero: the convolution's padding.
struct Band {
  int first_frame, frames;
  int first_row, rows;  // of every frame
  int pitch;            // columns
  int channels;

  MOE_BOTH int64_t pixel(int frame, int row, int column) const {
    return (static_cast<int64_t>(frame) * rows + row) * pitch + column;
  }
  MOE_BOTH int64_t pixels() const { return static_cast<int64_t>(frames) * rows * pitch; }
};

// A plane of numbers per pixel, without a border: what the second layer's sums are kept in.
struct Planes {
  int first_frame, frames;
  int first_row, rows;
  int pitch;

  MOE_BOTH int64_t size() const { return static_cast<int64_t>(frames) * rows * pitch; }
  MOE_BOTH int64_t pixel(int frame, int row, int column) const {
    return (static_cast<int64_t>(frame) * rows + row) * pitch + column;
  }
};

// Pieces of the workspace, one after another. With a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace moe::cuda

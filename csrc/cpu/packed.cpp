#include "packed.h"

#include <algorithm>

#include "numbers.h"
#include "parallel.h"

namespace moe::cpu {
namespace {

// Puts a number into the pairs that begin at `first`; in bf16x3 their low parts are `low_floats` behind, which otherwise is 0.
void put_in_pairs(float* first, int64_t number, int64_t low_floats, float value) {
  put(reinterpret_cast<Bfloat16*>(first) + number, 2 * low_floats, value);
}

int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

}  // namespace

void pack_row(const Problem& p, const Kernels& kernels, const ChannelLayout& layout, int64_t frame, int64_t row,
              Span columns, int64_t pixel, float* out) {
  const int64_t first = frame * p.x_strides[0] + row * p.x_strides[2] + columns.begin * p.x_strides[3];
  PixelRow pixels = {};
  pixels.first = static_cast<const char*>(p.x) + first * bytes_of(p.x_element);
  pixels.element = p.x_element;
  pixels.channel = p.x_strides[1], pixels.row = p.x_strides[2], pixels.pixel = p.x_strides[3];
  pixels.count = columns.size();
  pixels.half = layout.half_channels(), pixels.rest = layout.channels() - layout.half_channels();
  pixels.in_pairs = layout.in_pairs();
  pixels.half_floats = layout.half_floats(), pixels.out_pixel = pixel;
  pixels.low = layout.low_of(layout.depth());
  kernels.pack_pixels(pixels, out);
}

void pack_positions(const float* table, Span rows, const ChannelLayout& layout, float* out) {
  const int64_t channels = layout.half_channels(), floats = layout.position_floats();
  for (int64_t i = 0; i < rows.size(); ++i)
    for (int64_t c = 0; c < channels; ++c) {
      const float value = table[(rows.begin + i) * channels + c];
      if (layout.in_pairs())
        put_in_pairs(out + i * floats, c, layout.low_of(layout.half_floats()), value);
      else
        out[i * floats + c] = value;
    }
}

Branches::Branches(const Problem& p, const Kernels& k) : problem(p), kernels(k) {
  for (int64_t branch = 0; branch < branches(); ++branch)
    for (int64_t first = 0; first < hidden(branch); first += kGroup)
      groups_.push_back({branch, first, std::min<int64_t>(kGroup, hidden(branch) - first), first == 0});
  most_outputs_ = std::max(padded_outputs(0), padded_outputs(p.experts));
  b1_ = zeros(groups() * kGroup);
  w2_ = zeros(groups() * kGroup * most_outputs_);
  w2_by_output_ = zeros(groups() * kGroup * most_outputs_);
  b2_ = zeros(branches() * most_outputs_);
  for (int64_t branch = 0; branch < branches(); ++branch) {
    const float* b2 = is_expert(branch) ? p.expert_b2 + branch * p.outputs : p.gate_b2;
    std::memcpy(b2_ + branch * most_outputs_, b2, outputs(branch) * sizeof(float));
  }
  for (int64_t g = 0; g < groups(); ++g) pack_group(g);
}

Span Branches::branch_groups(int64_t branch) const {
  const auto in_branch = [&](const Group& group) { return group.branch == branch; };
  const auto begin = std::find_if(groups_.begin(), groups_.end(), in_branch);
  const auto end = std::find_if_not(begin, groups_.end(), in_branch);
  return {begin - groups_.begin(), end - groups_.begin()};
}

const float* Branches::w1(int64_t branch) const {
  return is_expert(branch) ? problem.expert_w1 + branch * problem.expert_hidden * problem.channels * kTaps
                           : problem.gate_w1;
}

void Branches::pack_group(int64_t g) {
  const Group& group = groups_[g];
  const int64_t branch = group.branch, count = hidden(branch), padded = padded_outputs(branch);
  const float* b1_in = is_expert(branch) ? problem.expert_b1 + branch * count : problem.gate_b1;
  const float* w2_in = is_expert(branch) ? problem.expert_w2 + branch * problem.outputs * count : problem.gate_w2;
  for (int n = 0; n < group.channels; ++n) {
    *(b1_ + (g * kGroup + n)) = b1_in[group.first_channel + n];
    for (int64_t o = 0; o < outputs(branch); ++o) {
      const float value = w2_in[o * count + group.first_channel + n];
      *(w2_ + (g * kGroup * most_outputs_ + n * padded + o)) = value;
      *(w2_by_output_ + (g * kGroup * most_outputs_ + o * kGroup + n)) = value;
    }
  }
}

PackedHead::PackedHead(const Problem& p, const Kernels& k, Numbers numbers)
    : Branches(p, k), layout(p.channels, numbers), w1_(nullptr) {}

void PackedHead::use(const float* packed) {
  if (!packed) {
    own_w1_ = Buffer(packed_floats());
    pack(own_w1_.data());
  }
  w1_ = packed ? packed : own_w1_.data();
  const Problem& p = problem;
  if (!p.pos_x) return;

  column_part_ = Buffer(groups() * 3 * p.width * kGroup);
  const int64_t rows = round_up(p.width, block_rows());
  Buffer packed_pos = zeros(rows * layout.position_floats());
  pack_positions(p.pos_x, {0, p.width}, layout, packed_pos.data());
  std::vector<Buffer> products;
  for (int64_t slot = 0; slot < std::min<int64_t>(p.threads, groups()); ++slot) products.emplace_back(rows * kColumn);
  parallel_for(groups(), p.threads,
               [&](int64_t g, int slot) { make_column_part(g, packed_pos.data(), products[slot].data()); });
}

const float* PackedHead::column_part(int64_t g) const {
  return problem.pos_x ? column_part_ + g * 3 * problem.width * kGroup : nullptr;
}

void PackedHead::pack(float* out) const {
  std::memset(out, 0, packed_floats() * sizeof(float));
  parallel_for(groups(), problem.threads, [&](int64_t g, int) { pack_group(g, out + g * group_floats()); });
}

void PackedHead::pack_group(int64_t g, float* out) const {
  const int64_t channels = problem.channels, depth = layout.depth();
  const float* w1_in = w1(group(g).branch) + group(g).first_channel * channels * kTaps;
  for (int n = 0; n < group(g).channels; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t column = tap * kGroup + n, panel = column / kernels.panel, within = column % kernels.panel;
        const float value = w1_in[(n * channels + c) * kTaps + tap];
        const int64_t place = layout.place(c);
        if (layout.in_pairs())
          put_in_pairs(out + (panel * depth + place / 2) * kernels.panel + within, place % 2,
                       layout.low_of(kColumn * depth), value);
        else
          out[(panel * depth + place) * kernels.panel + within] = value;
      }
}

void PackedHead::multiply(int64_t g, Channels which, const float* pixels, int64_t pixel_floats, int64_t blocks,
                          float* products) const {
  const int64_t first = which == Channels::second_half ? layout.half_floats() : 0;
  const int64_t depth = which == Channels::all           ? layout.depth()
                        : which == Channels::first_half ? layout.half_floats()
                                                        : layout.depth() - layout.half_floats();
  Gemm gemm = {};
  gemm.a = pixels;
  gemm.a_row = pixel_floats;
  gemm.a_depth = 1;
  gemm.b = w1_ + g * group_floats() + first * kernels.panel;
  gemm.b_panel = layout.depth() * kernels.panel;
  gemm.b_depth = kernels.panel;
  gemm.a_low = layout.low_of(pixel_floats / layout.parts());
  gemm.b_low = layout.low_of(kColumn * layout.depth());
  gemm.c = products;
  gemm.c_row = kColumn;
  gemm.row_blocks = blocks;
  gemm.panels = kColumn / kernels.panel;
  gemm.depth = depth;
  switch (layout.numbers()) {
    case Numbers::float32: return kernels.gemm(gemm);
    case Numbers::bf16: return kernels.bf16.gemm(gemm);
    case Numbers::bf16x3: return kernels.bf16.gemm_x3(gemm);
  }
}

// At X: the sum over horizontal taps inside the image. The vertical sum happens by itself, because the blend of rows
// has weights that sum to one where a tap's row is inside the image, and to zero where it is padding.
void PackedHead::make_column_part(int64_t g, const float* packed_pos, float* products) {
  const int64_t W = problem.width;
  multiply(g, Channels::first_half, packed_pos, layout.position_floats(), divide_up(W, block_rows()), products);
  float* out = column_part_ + g * 3 * W * kGroup;
  for (int dy = 0; dy < 3; ++dy)
    for (int64_t X = 0; X < W; ++X)
      for (int n = 0; n < kGroup; ++n) {
        float sum = 0;
        for (int64_t dx = X == 0 ? 1 : 0; dx < (X == W - 1 ? 2 : 3); ++dx)
          sum += products[(X + dx - 1) * kColumn + dy * kRowTap + dx * kGroup + n];
        out[(dy * W + X) * kGroup + n] = sum;
      }
}

}  // namespace moe::cpu

#include "packed.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "parallel.h"

namespace moe::cpu {
namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float widen(float value) { return value; }

struct Bfloat16 {
  uint16_t bits;
};
float widen(Bfloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

struct Float16 {
  uint16_t bits;
};
float widen(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
  // The exponents' difference, 112, as a factor: exact, and right for denormals too.
  return from_bits(sign | bits_of(from_bits(magnitude << 13) * 0x1p112f));
}

Bfloat16 to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // NaN stays one
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};  // to nearest, ties to even
}

void put(float* at, float value) { *at = value; }
void put(Bfloat16* at, float value) { *at = to_bf16(value); }

template <typename Number>
void copy(const Number* in, int64_t count, Number* out) {
  std::memcpy(out, in, count * sizeof(Number));
}
template <typename In, typename Out>
void copy(const In* in, int64_t count, Out* out) {
  for (int64_t i = 0; i < count; ++i) put(out + i, widen(in[i]));
}

// Lanes of a and b, which are numbered 0 to 3 and 4 to 7.
typedef float Four __attribute__((vector_size(16)));
template <int P, int Q, int R, int S>
Four lanes(Four a, Four b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, P, Q, R, S);
#else
  typedef int32_t Numbers __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Numbers{P, Q, R, S});
#endif
}

// Four floats of four neighbouring pixels: a channel's, or a pair's of bfloat16 ones, are channel(n), n from 0 to 3.
template <typename Channel>
void transpose(Channel channel, float* out, int64_t out_pixel) {
  const auto set_pixel = [&](int i, Four channels) {  // need not be aligned
    std::memcpy(out + i * out_pixel, &channels, sizeof channels);
  };
  const Four front01 = lanes<0, 4, 1, 5>(channel(0), channel(1)), back01 = lanes<2, 6, 3, 7>(channel(0), channel(1));
  const Four front23 = lanes<0, 4, 1, 5>(channel(2), channel(3)), back23 = lanes<2, 6, 3, 7>(channel(2), channel(3));
  set_pixel(0, lanes<0, 1, 4, 5>(front01, front23));
  set_pixel(1, lanes<2, 3, 6, 7>(front01, front23));
  set_pixel(2, lanes<0, 1, 4, 5>(back01, back23));
  set_pixel(3, lanes<2, 3, 6, 7>(back01, back23));
}

// Four neighbouring pixels of a channel.
Four four_at(const float* at) {
  Four pixels;
  std::memcpy(&pixels, at, sizeof pixels);
  return pixels;
}

// Of two channels, in bfloat16: a[0], b[0], a[1], b[1], ...
typedef uint32_t FourBits __attribute__((vector_size(16)));
Four pairs_at(const Bfloat16* a, const Bfloat16* b) {
  typedef uint16_t Eight __attribute__((vector_size(16)));
  const auto load = [](const Bfloat16* at) {
    uint64_t bits;  // a copy into half of a vector would go by way of memory
    std::memcpy(&bits, at, sizeof bits);
    typedef uint64_t Two __attribute__((vector_size(16)));
    return reinterpret_cast<Eight>(Two{bits, 0});
  };
#ifdef __clang__
  return reinterpret_cast<Four>(__builtin_shufflevector(load(a), load(b), 0, 8, 1, 9, 2, 10, 3, 11));
#else
  return reinterpret_cast<Four>(__builtin_shuffle(load(a), load(b), Eight{0, 8, 1, 9, 2, 10, 3, 11}));
#endif
}
Four pairs_at(const float* a, const float* b) {
  const auto rounded = [](const float* at) {  // as to_bf16, its bits on top
    const auto bits = reinterpret_cast<FourBits>(four_at(at));
    const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  };
  return reinterpret_cast<Four>(rounded(a) >> 16 | (rounded(b) & 0xffff0000u));
}

// Strides of a map, in its elements.
struct Strides {
  int64_t channel, row, pixel;
};

// out[i][c] = in(channel c, pixel i), as much of it as is done here by fours: for so many pixels, of so many channels.
template <typename In, typename Out>
std::pair<int64_t, int64_t> by_fours(const In* in, const Strides& strides, int64_t channels, int64_t pixels, Out* out,
                                     int64_t out_pixel) {
  if constexpr (std::is_same_v<In, float> || std::is_same_v<In, Out>) {
    constexpr int64_t kInFloat = sizeof(float) / sizeof(Out), kStep = 4 * kInFloat;  // channels
    if (strides.pixel != 1) return {0, 0};
    for (int64_t c = 0; c + kStep <= channels; c += kStep)
      for (int64_t i = 0; i + 4 <= pixels; i += 4) {
        const auto floats = [&](int n) {
          const In* first = in + (c + n * kInFloat) * strides.channel + i;
          if constexpr (kInFloat == 1)
            return four_at(first);
          else
            return pairs_at(first, first + strides.channel);
        };
        transpose(floats, reinterpret_cast<float*>(out + i * out_pixel + c), out_pixel / kInFloat);
      }
    return {pixels / 4 * 4, channels / kStep * kStep};
  }
  return {0, 0};
}

// Some channels of `pixels` pixels of a row, to neighbouring places.
template <typename In, typename Out>
void pack_channels(const In* in, const Strides& strides, int64_t channels, int64_t pixels, Out* out, int64_t out_pixel) {
  for (int64_t c = 0; c < channels; ++c) __builtin_prefetch(in + c * strides.channel + strides.row, 0, 2);  // packed next
  const auto [pixels_done, channels_done] = by_fours(in, strides, channels, pixels, out, out_pixel);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = c < channels_done ? pixels_done : 0; i < pixels; ++i)
      put(out + i * out_pixel + c, widen(in[c * strides.channel + i * strides.pixel]));
}

// `count` pixels of one row, channels in the layout's places.
template <typename In, typename Out>
void pack_pixels(const In* in, const Strides& strides, int64_t count, const ChannelLayout& layout, Out* out,
                 int64_t out_pixel) {
  constexpr int64_t kBlock = 16;  // pixels at a time, so that neither side's lines are fetched twice
  const int64_t half = layout.half_channels(), rest = layout.channels() - half, second = layout.place(half);
  if (strides.channel == 1) {
    for (int64_t i = 0; i < count; ++i) {
      copy(in + i * strides.pixel, half, out + i * out_pixel);
      copy(in + i * strides.pixel + half, rest, out + i * out_pixel + second);
    }
    return;
  }
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t pixels = std::min(kBlock, count - begin);
    const In* from = in + begin * strides.pixel;
    Out* to = out + begin * out_pixel;
    pack_channels(from, strides, half, pixels, to, out_pixel);
    pack_channels(from + half * strides.channel, strides, rest, pixels, to + second, out_pixel);
  }
}

template <typename In>
void pack_row_of(const Problem& p, const ChannelLayout& layout, int64_t frame, int64_t row, Span columns, float* out) {
  const In* in = static_cast<const In*>(p.x) + frame * p.x_strides[0] + row * p.x_strides[2] +
                 columns.begin * p.x_strides[3];
  const Strides strides = {p.x_strides[1], p.x_strides[2], p.x_strides[3]};
  if (layout.bf16())
    pack_pixels(in, strides, columns.size(), layout, reinterpret_cast<Bfloat16*>(out), 2 * layout.floats());
  else
    pack_pixels(in, strides, columns.size(), layout, out, layout.floats());
}

}  // namespace

void pack_row(const Problem& p, const ChannelLayout& layout, int64_t frame, int64_t row, Span columns, float* out) {
  switch (p.x_element) {
    case Element::float32: return pack_row_of<float>(p, layout, frame, row, columns, out);
    case Element::bfloat16: return pack_row_of<Bfloat16>(p, layout, frame, row, columns, out);
    case Element::float16: return pack_row_of<Float16>(p, layout, frame, row, columns, out);
  }
}

Buffer pack_positions(const float* table, Span rows, const ChannelLayout& layout, int64_t block_rows) {
  const int64_t channels = layout.half_channels(), floats = layout.half_floats();
  Buffer out = zeros(round_up(rows.size(), block_rows) * floats);
  for (int64_t i = 0; i < rows.size(); ++i)
    for (int64_t c = 0; c < channels; ++c) {
      const float value = table[(rows.begin + i) * channels + c];
      if (layout.bf16())
        put(reinterpret_cast<Bfloat16*>(out + i * floats) + c, value);
      else
        put(out + i * floats + c, value);
    }
  return out;
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

PackedHead::PackedHead(const Problem& p, const Kernels& k, bool bf16)
    : Branches(p, k), layout(p.channels, bf16), w1_(nullptr) {}

void PackedHead::use(const float* packed) {
  if (!packed) {
    own_w1_ = Buffer(packed_floats());
    pack(own_w1_.data());
  }
  w1_ = packed ? packed : own_w1_.data();
  const Problem& p = problem;
  if (!p.pos_x) return;

  column_part_ = Buffer(groups() * 3 * p.width * kGroup);
  const Buffer packed_pos = pack_positions(p.pos_x, {0, p.width}, layout, block_rows());
  std::vector<Buffer> products;
  for (int64_t slot = 0; slot < std::min<int64_t>(p.threads, groups()); ++slot)
    products.emplace_back(round_up(p.width, block_rows()) * kColumn);
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
  const int64_t channels = problem.channels, depth = layout.floats();
  const float* w1_in = w1(group(g).branch) + group(g).first_channel * channels * kTaps;
  for (int n = 0; n < group(g).channels; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int tap = 0; tap < kTaps; ++tap) {
        const int64_t column = tap * kGroup + n, panel = column / kernels.panel, within = column % kernels.panel;
        const float value = w1_in[(n * channels + c) * kTaps + tap];
        const int64_t place = layout.place(c);
        if (layout.bf16())
          put(reinterpret_cast<Bfloat16*>(out + (panel * depth + place / 2) * kernels.panel + within) + place % 2, value);
        else
          out[(panel * depth + place) * kernels.panel + within] = value;
      }
}

void PackedHead::multiply(int64_t g, Channels which, const float* pixels, int64_t pixel_floats, int64_t blocks,
                          float* products) const {
  const int64_t first = which == Channels::second_half ? layout.half_floats() : 0;
  const int64_t depth = which == Channels::all           ? layout.floats()
                        : which == Channels::first_half ? layout.half_floats()
                                                        : layout.floats() - layout.half_floats();
  Gemm gemm = {};
  gemm.a = pixels;
  gemm.a_row = pixel_floats;
  gemm.a_depth = 1;
  gemm.b = w1_ + g * group_floats() + first * kernels.panel;
  gemm.b_panel = layout.floats() * kernels.panel;
  gemm.b_depth = kernels.panel;
  gemm.c = products;
  gemm.c_row = kColumn;
  gemm.row_blocks = blocks;
  gemm.panels = kColumn / kernels.panel;
  gemm.depth = depth;
  (layout.bf16() ? kernels.bf16.gemm : kernels.gemm)(gemm);
}

// At X: the sum over horizontal taps inside the image. The vertical sum happens by itself, because the blend of rows
// has weights that sum to one where a tap's row is inside the image, and to zero where it is padding.
void PackedHead::make_column_part(int64_t g, const float* packed_pos, float* products) {
  const int64_t W = problem.width;
  multiply(g, Channels::first_half, packed_pos, layout.half_floats(), divide_up(W, block_rows()), products);
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

// The backward pass: everything is recomputed from the inputs, in tiles of low-resolution rows that do not depend on
// the number of threads. With gz the gradients of the 1x1 layers' results and gh those before relu, the adjoint of
// hidden.h's formulation is
//
//   V[jy, dy, X, n]      = sum_Y Uy[Y + dy, jy] gh[n, Y, X]
//   dG[jy, jx, dy, dx, n] = sum_X Ux[X + dx, jx] V[jy, dy, X, n]
//   dx = W . dG,   dW = dG . x + the position embedding's part
//
// A tile owns its low-resolution rows: it visits every output row that reads one of them. An output row belongs to
// the tile that holds the first row it reads; sums over output pixels are taken there, so each is counted once.
// Sums over tiles are kept in a fixed number of slots, each summed in order, then the slots are summed in order.
#include <algorithm>
#include <memory>
#include <vector>

#include "flush.h"
#include "hidden.h"
#include "parallel.h"
#include "select.h"

namespace moe::cpu {
namespace {

constexpr int64_t kLeastRows = 28, kMostRows = 64;  // output rows to a tile, about
constexpr int64_t kSlots = 16;

struct Tile {
  int64_t frame;
  Span ranks;
};

// The larger a tile, the less is recomputed twice; but there shall be one for every slot.
std::vector<Tile> split_into_tiles(const Problem& p, int64_t ranks) {
  const int64_t enough = std::min(divide_up(p.height, kLeastRows), divide_up(kSlots, std::max<int64_t>(p.batch, 1)));
  const int64_t size = divide_up(ranks, std::max(divide_up(p.height, kMostRows), enough));
  std::vector<Tile> tiles;
  for (int64_t frame = 0; frame < p.batch; ++frame)
    for (int64_t rank = 0; rank < ranks; rank += size) tiles.push_back({frame, {rank, std::min(rank + size, ranks)}});
  return tiles;
}

// The most of any tile: its own low-resolution rows, and the output rows that read one of them.
struct Extent {
  Extent(const std::vector<Tile>& tiles, const RowPlan& plan) {
    for (const Tile& tile : tiles) {
      ranks = std::max(ranks, tile.ranks.size());
      rows = std::max(rows, plan.readers(tile.ranks).size());
    }
  }
  int64_t ranks = 0, rows = 0;
};

// What is wanted, and the sizes of one group's sums.
struct Wanted {
  explicit Wanted(const PackedHead& head, const Gradients& g)
      : x(g.x), first_layer(g.expert_w1 || g.gate_w1), columns(first_layer && head.problem.pos_x) {
    const int64_t outputs = std::max(head.padded_outputs(0), head.padded_outputs(head.problem.experts));
    w1 = first_layer ? round_up(head.problem.channels, head.kernels.block_rows) * kColumn : 0;
    w2 = outputs * kGroup;
    column_sums = columns ? 3 * head.problem.width * kGroup : 0;
  }
  bool x, first_layer, columns;
  int64_t w1, w2, column_sums;  // floats a group
};

// Sums over all pixels, for every group: [channel][tap][n], [n], [output][n]; over all rows, for the position part:
// [dy][X][n]; and for every branch [output].
struct Sums {
  Sums(const PackedHead& head, const Wanted& wanted)
      : wanted(wanted),
        outputs(wanted.w2 / kGroup),
        w1(zeros(head.groups() * wanted.w1)),
        b1(head.groups() * kGroup),
        w2(zeros(head.groups() * wanted.w2)),
        b2((head.problem.experts + 1) * outputs),
        column_sums(zeros(head.groups() * wanted.column_sums)) {}

  float* w1_of(int64_t g) { return w1 + g * wanted.w1; }
  double* b1_of(int64_t g) { return b1.data() + g * kGroup; }
  float* w2_of(int64_t g) { return w2 + g * wanted.w2; }
  double* b2_of(int64_t branch) { return b2.data() + branch * outputs; }
  float* columns_of(int64_t g) { return column_sums + g * wanted.column_sums; }

  Wanted wanted;
  int64_t outputs;
  Buffer w1;
  std::vector<double> b1;  // biases in double: their many terms nearly cancel
  Buffer w2;
  std::vector<double> b2;
  Buffer column_sums;
};

template <typename From, typename To>
void add(const From* from, int64_t count, To* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Group weights for dx = W . dG: [group][panel of channels][tap and n][channel].
class TransposedWeights {
 public:
  TransposedWeights(const PackedHead& head, bool wanted)
      : panel_(head.kernels.narrow_panel), panels_(divide_up(head.problem.channels, panel_)) {
    if (!wanted) return;
    data_ = zeros(head.groups() * group_floats());
    parallel_for(head.groups(), head.problem.threads, [&](int64_t g, int) { pack(head, g); });
  }
  int64_t panels() const { return panels_; }
  int64_t padded_channels() const { return panels_ * panel_; }
  int64_t panel_floats() const { return kColumn * panel_; }
  const float* group(int64_t g) const { return data_ + g * group_floats(); }

 private:
  int64_t group_floats() const { return panels_ * panel_floats(); }

  void pack(const PackedHead& head, int64_t g) {
    const Group& group = head.group(g);
    const int64_t channels = head.problem.channels;
    const float* w1 = head.w1(group.branch) + group.first_channel * channels * kTaps;
    float* out = data_ + g * group_floats();
    for (int64_t n = 0; n < group.channels; ++n)
      for (int tap = 0; tap < kTaps; ++tap)
        for (int64_t c = 0; c < channels; ++c)
          out[(c / panel_ * kColumn + tap * kGroup + n) * panel_ + c % panel_] = w1[(n * channels + c) * kTaps + tap];
  }

  int64_t panel_, panels_;
  Buffer data_;
};

class Backward {
 public:
  Backward(const PackedHead& head, const TransposedWeights& transposed, const RowPlan& rows,
           const ColumnPlan& columns, const Extent& extent, const Cotangents& cotangents, const Gradients& gradients)
      : head_(head),
        p_(head.problem),
        transposed_(transposed),
        plan_(rows),
        columns_(columns),
        cotangents_(cotangents),
        gradients_(gradients),
        wanted_(head, gradients),
        hidden_rows_(head, rows, columns, extent.rows),
        most_rows_(extent.rows),
        row_floats_(p_.width * kGroup),
        in_columns_(round_up(p_.in_width, head.kernels.block_rows)),
        hidden_(head.groups() * most_rows_ * row_floats_),
        adjoint_(extent.ranks * 3 * row_floats_),
        begun_(extent.ranks * 3),
        scratch_(mix_scratch_floats(p_)),
        products_((in_columns_ + 1) * kColumn),
        grad_x_(wanted_.x ? extent.ranks * grad_row_floats() : 0),
        z_at_(p_.experts) {
    for (int64_t branch = 0; branch <= p_.experts; ++branch)
      z_.emplace_back(most_rows_ * p_.width * head.padded_outputs(branch));
  }

  void run(const Tile& tile, Sums& sums) {
    tile_ = tile;
    rows_ = plan_.readers(tile.ranks);
    recompute();
    differentiate_mixture(sums);
    for (int64_t g = 0; g < head_.groups(); ++g) {
      differentiate_hidden(g, sums);
      for (int64_t rank = tile.ranks.begin; rank < tile.ranks.end; ++rank) differentiate_first_layer(g, rank, sums);
    }
    if (wanted_.x) write_pixels();
  }

 private:
  bool owns(int64_t Y) const {
    const int64_t first = plan_.terms(Y).term[0].rank;
    return first >= tile_.ranks.begin && first < tile_.ranks.end;
  }
  float* hidden(int64_t g, int64_t Y) { return hidden_ + (g * most_rows_ + Y - rows_.begin) * row_floats_; }
  float* z(int64_t branch, int64_t Y) {
    return z_[branch] + (Y - rows_.begin) * p_.width * head_.padded_outputs(branch);
  }
  // The first of three rows, one for each row of taps.
  int64_t adjoint_row(int64_t rank) const { return (rank - tile_.ranks.begin) * 3; }
  float* adjoint(int64_t row) { return adjoint_ + row * row_floats_; }
  int64_t grad_row_floats() const { return in_columns_ * transposed_.padded_channels(); }
  float* grad_row(int64_t rank) { return grad_x_ + (rank - tile_.ranks.begin) * grad_row_floats(); }

  void recompute() {
    hidden_rows_.begin_chunk(tile_.frame, rows_);
    for (int64_t g = 0; g < head_.groups(); ++g) {
      const int64_t branch = head_.group(g).branch, padded = head_.padded_outputs(branch);
      const float* start = head_.group(g).first_of_branch ? head_.b2(branch) : nullptr;
      hidden_rows_.begin_group(g);
      for (int64_t Y = rows_.begin; Y < rows_.end; ++Y) {
        hidden_rows_.prepare(g, Y, nullptr);
        for (int64_t t = 0; t < hidden_rows_.tiles(); ++t)
          hidden_rows_.read(g, Y, t, hidden(g, Y) + hidden_rows_.tile(t).begin * kGroup);
        head_.kernels.second_layer(hidden(g, Y), p_.width, head_.w2(g), padded, start, z(branch, Y), padded);
      }
    }
  }

  // z becomes its own gradient.
  void differentiate_mixture(Sums& sums) {
    for (int64_t Y = rows_.begin; Y < rows_.end; ++Y) {
      for (int64_t t = 0; t < hidden_rows_.tiles(); ++t) {
        const Span columns = hidden_rows_.tile(t);
        const int64_t pixel = Y * p_.width + columns.begin, padded = head_.padded_outputs(0);
        for (int64_t k = 0; k < p_.experts; ++k) z_at_[k] = z(k, Y) + columns.begin * padded;
        MixGradients out = {};
        out.z = z_at_.data();
        MixBlock block = {};
        block.count = columns.size();
        block.z = z_at_.data();
        block.z_pixel = padded;
        block.gate_pixel = head_.padded_outputs(p_.experts);
        if (p_.has_gate()) block.gate = out.gate = z(p_.experts, Y) + columns.begin * block.gate_pixel;
        if (p_.gate_logits) block.gate_logits = p_.gate_logits + tile_.frame * p_.experts * p_.pixels() + pixel;
        block.plane = p_.pixels();
        block.scratch = scratch_.data();
        head_.kernels.mix_backward(p_, block, cotangents_at(pixel), out);
      }
      if (!owns(Y)) continue;
      for (int64_t branch = 0; branch < p_.experts + (p_.has_gate() ? 1 : 0); ++branch) sum_outputs(branch, Y, sums);
      if (gradients_.gate_logits) write_gate_logits(Y);
    }
  }

  Cotangents cotangents_at(int64_t pixel) const {
    const int64_t channels = p_.prediction_channels(), plane = p_.pixels();
    const auto at = [&](const float* map, int64_t planes) {
      return map ? map + tile_.frame * planes * plane + pixel : nullptr;
    };
    return {at(cotangents_.prediction, channels), at(cotangents_.confidence, 1), at(cotangents_.entropy, 1),
            at(cotangents_.weights, p_.experts), at(cotangents_.hypotheses, p_.experts * channels)};
  }

  void sum_outputs(int64_t branch, int64_t Y, Sums& sums) {
    const int64_t padded = head_.padded_outputs(branch);
    const float* grad = z(branch, Y);
    for (int64_t X = 0; X < p_.width; ++X) add(grad + X * padded, padded, sums.b2_of(branch));
  }

  void write_gate_logits(int64_t Y) {
    const int64_t padded = head_.padded_outputs(p_.experts);
    const float* grad = z(p_.experts, Y);
    for (int64_t k = 0; k < p_.experts; ++k) {
      float* out = gradients_.gate_logits + ((tile_.frame * p_.experts + k) * p_.height + Y) * p_.width;
      for (int64_t X = 0; X < p_.width; ++X) out[X] = grad[X * padded + k];
    }
  }

  // From gz through the 1x1 layer and relu to gh, and gh onto the low-resolution rows of this tile.
  void differentiate_hidden(int64_t g, Sums& sums) {
    const int64_t branch = head_.group(g).branch, padded = head_.padded_outputs(branch);
    const int64_t outputs = head_.outputs(branch);
    std::fill(begun_.begin(), begun_.end(), uint8_t{0});
    for (int64_t Y = rows_.begin; Y < rows_.end; ++Y) {
      float* row = hidden(g, Y);
      if (owns(Y)) head_.kernels.second_layer_weights(row, p_.width, z(branch, Y), padded, outputs, sums.w2_of(g));
      head_.kernels.second_layer_backward(row, p_.width, head_.w2_by_output(g), outputs, z(branch, Y), padded);
      if (owns(Y)) sum_row(g, Y, row, sums);
      const RowPlan::Terms& terms = plan_.terms(Y);
      for (int t = 0; t < terms.count; ++t) {
        const RowPlan::Term& term = terms.term[t];
        if (term.rank < tile_.ranks.begin || term.rank >= tile_.ranks.end) continue;
        const int64_t to = adjoint_row(term.rank) + term.dy;
        head_.kernels.add_row(row, term.weight, row_floats_, begun_[to], adjoint(to));
        begun_[to] = 1;
      }
    }
  }

  // The bias, and the position embedding's row part: its outer taps are padding in the outermost columns.
  void sum_row(int64_t g, int64_t Y, const float* row, Sums& sums) {
    double total[kGroup] = {};
    head_.kernels.sum_pixels(row, p_.width, total);
    add(total, kGroup, sums.b1_of(g));
    if (!wanted_.columns) return;
    alignas(64) float by_tap[3][kGroup];
    const float* last = row + (p_.width - 1) * kGroup;
    for (int n = 0; n < kGroup; ++n) {
      by_tap[0][n] = static_cast<float>(total[n] - row[n]);
      by_tap[1][n] = static_cast<float>(total[n]);
      by_tap[2][n] = static_cast<float>(total[n] - last[n]);
    }
    const int64_t half = p_.channels / 2;
    for (int dy = 0; dy < 3; ++dy) {
      const int64_t at = Y + dy - 1;
      if (at < 0 || at >= p_.height) continue;
      for (int64_t c = 0; c < half; ++c) {
        float* out = sums.w1_of(g) + (half + c) * kColumn + dy * kRowTap;
        head_.kernels.add_row(by_tap[0], p_.pos_y[at * half + c], kRowTap, true, out);
      }
    }
  }

  void differentiate_first_layer(int64_t g, int64_t rank, Sums& sums) {
    if (!wanted_.x && !wanted_.first_layer) return;
    const int64_t first = adjoint_row(rank);
    for (int64_t row = first; row < first + 3; ++row)
      if (!begun_[row]) std::memset(adjoint(row), 0, row_floats_ * sizeof(float));
    const float* rows = adjoint(first);
    if (wanted_.columns) head_.kernels.add_row(rows, 1.f, 3 * row_floats_, true, sums.columns_of(g));
    std::memset(products_.data(), 0, (in_columns_ + 1) * kColumn * sizeof(float));
    head_.kernels.scatter_columns(rows, row_floats_, columns_.blends(), p_.width, products_.data());
    if (wanted_.first_layer) add_weight_gradient(hidden_rows_.packed_row(rank), sums.w1_of(g));
    if (wanted_.x) add_pixel_gradient(g, grad_row(rank));
  }

  void add_weight_gradient(const float* pixels, float* grad_w1) {
    Gemm gemm = {};
    gemm.a = pixels;
    gemm.a_row = 1;  // channels
    gemm.a_depth = head_.layout.floats();
    gemm.b = products_.data();
    gemm.b_panel = head_.kernels.panel;
    gemm.b_depth = kColumn;
    gemm.c = grad_w1;
    gemm.c_row = kColumn;
    gemm.row_blocks = divide_up(p_.channels, head_.kernels.block_rows);
    gemm.panels = kColumn / head_.kernels.panel;
    gemm.depth = p_.in_width;
    gemm.accumulate = true;
    head_.kernels.gemm(gemm);
  }

  void add_pixel_gradient(int64_t g, float* grad_x) {
    Gemm gemm = {};
    gemm.a = products_.data();
    gemm.a_row = kColumn;  // pixels
    gemm.a_depth = 1;
    gemm.b = transposed_.group(g);
    gemm.b_panel = transposed_.panel_floats();
    gemm.b_depth = head_.kernels.narrow_panel;
    gemm.c = grad_x;
    gemm.c_row = transposed_.padded_channels();
    gemm.row_blocks = in_columns_ / head_.kernels.block_rows;
    gemm.panels = transposed_.panels();
    gemm.depth = kColumn;
    gemm.accumulate = g > 0;
    head_.kernels.gemm_narrow(gemm);
  }

  void write_pixels() {
    for (int64_t rank = tile_.ranks.begin; rank < tile_.ranks.end; ++rank) {
      const int64_t row = tile_.frame * p_.in_height + plan_.source_row(rank);
      float* out = gradients_.x + row * p_.in_width * p_.channels;
      for (int64_t i = 0; i < p_.in_width; ++i)
        std::memcpy(out + i * p_.channels, grad_row(rank) + i * transposed_.padded_channels(),
                    p_.channels * sizeof(float));
    }
  }

  const PackedHead& head_;
  const Problem& p_;
  const TransposedWeights& transposed_;
  const RowPlan& plan_;
  const ColumnPlan& columns_;
  const Cotangents& cotangents_;
  const Gradients& gradients_;
  const Wanted wanted_;
  HiddenRows hidden_rows_;
  const int64_t most_rows_, row_floats_, in_columns_;
  Buffer hidden_;    // [group][tile's row][X][kGroup]: activations, then gh
  Buffer adjoint_;   // of one group, [tile's rank][dy][X][kGroup]: V
  std::vector<uint8_t> begun_;  // [tile's rank][dy]: whether that row holds a sum
  Buffer scratch_;
  Buffer products_;  // one row of dG for one group, and the column that takes what is padding
  Buffer grad_x_;    // [tile's rank][low-resolution column][padded channels]
  std::vector<Buffer> z_;
  std::vector<float*> z_at_;  // each expert's results, from a pixel on
  Tile tile_ = {};
  Span rows_ = {0, 0};
};

// The position embedding's column part of a group's weight gradient.
void add_column_part(const PackedHead& head, const float* column_sums, float* grad_w1) {
  const Problem& p = head.problem;
  const int64_t half = p.channels / 2, W = p.width;
  for (int dy = 0; dy < 3; ++dy)
    for (int dx = 0; dx < 3; ++dx)
      for (int64_t X = dx == 0 ? 1 : 0; X < (dx == 2 ? W - 1 : W); ++X)
        for (int64_t c = 0; c < half; ++c) {
          float* out = grad_w1 + c * kColumn + dy * kRowTap + dx * kGroup;
          head.kernels.add_row(column_sums + (dy * W + X) * kGroup, p.pos_x[(X + dx - 1) * half + c], kGroup, true, out);
        }
}

// One group's sums in the parameters' own layout.
void write_group(const PackedHead& head, int64_t g, Sums& sums, const Gradients& out) {
  const Problem& p = head.problem;
  const Group& group = head.group(g);
  const bool expert = group.branch < p.experts;
  const int64_t hidden = expert ? p.expert_hidden : p.gate_hidden, outputs = head.outputs(group.branch);
  const int64_t branch = expert ? group.branch : 0;
  float* w1 = expert ? out.expert_w1 : out.gate_w1;
  float* b1 = expert ? out.expert_b1 : out.gate_b1;
  float* w2 = expert ? out.expert_w2 : out.gate_w2;
  for (int64_t n = 0; n < group.channels; ++n) {
    const int64_t channel = branch * hidden + group.first_channel + n;
    for (int64_t c = 0; w1 && c < p.channels; ++c)
      for (int tap = 0; tap < kTaps; ++tap)
        w1[(channel * p.channels + c) * kTaps + tap] = sums.w1_of(g)[c * kColumn + tap * kGroup + n];
    if (b1) b1[channel] = static_cast<float>(sums.b1_of(g)[n]);
    for (int64_t o = 0; w2 && o < outputs; ++o)
      w2[(branch * outputs + o) * hidden + group.first_channel + n] = sums.w2_of(g)[o * kGroup + n];
  }
}

void write_parameters(const PackedHead& head, std::vector<Sums>& slots, const Gradients& out) {
  const Problem& p = head.problem;
  Sums& total = slots[0];
  const Wanted& wanted = total.wanted;
  parallel_for(head.groups(), p.threads, [&](int64_t g, int) {
    for (size_t s = 1; s < slots.size(); ++s) {
      add(slots[s].w1_of(g), wanted.w1, total.w1_of(g));
      add(slots[s].b1_of(g), kGroup, total.b1_of(g));
      add(slots[s].w2_of(g), wanted.w2, total.w2_of(g));
      add(slots[s].columns_of(g), wanted.column_sums, total.columns_of(g));
    }
    if (wanted.columns) add_column_part(head, total.columns_of(g), total.w1_of(g));
    write_group(head, g, total, out);
  });
  for (int64_t branch = 0; branch <= p.experts; ++branch) {
    for (size_t s = 1; s < slots.size(); ++s) add(slots[s].b2_of(branch), total.outputs, total.b2_of(branch));
    float* b2 = branch < p.experts ? out.expert_b2 : out.gate_b2;
    const int64_t first = branch < p.experts ? branch * p.outputs : 0;
    for (int64_t o = 0; b2 && o < head.outputs(branch); ++o) b2[first + o] = static_cast<float>(total.b2_of(branch)[o]);
  }
}

void run(const Problem& p, const Kernels& kernels, const Cotangents& cotangents, const Gradients& gradients) {
  PackedHead head(p, kernels, Numbers::float32);
  head.use(nullptr);
  const TransposedWeights transposed(head, gradients.x != nullptr);
  const RowPlan rows(p.in_height, p.height);
  const ColumnPlan columns(p.in_width, p.width, round_up(p.in_width, kernels.block_rows));
  const std::vector<Tile> tiles = split_into_tiles(p, rows.count());
  const Extent extent(tiles, rows);
  const auto tile_count = static_cast<int64_t>(tiles.size()), slot_count = std::min(kSlots, tile_count);
  const Wanted wanted(head, gradients);
  std::vector<Sums> slots;
  for (int64_t s = 0; s < slot_count; ++s) slots.emplace_back(head, wanted);
  std::vector<std::unique_ptr<Backward>> workers;  // made here: an exception must not leave a thread of the team
  for (int64_t worker = 0; worker < std::min<int64_t>(p.threads, slot_count); ++worker)
    workers.push_back(
        std::make_unique<Backward>(head, transposed, rows, columns, extent, cotangents, gradients));

  if (gradients.x && rows.count() < p.in_height)  // rows that downsampling skips
    std::memset(gradients.x, 0, p.batch * p.in_height * p.in_width * p.channels * sizeof(float));
  parallel_for(slot_count, p.threads, [&](int64_t s, int worker) {
    const FlushToZero flush;
    for (int64_t t = s; t < tile_count; t += slot_count) workers[worker]->run(tiles[t], slots[s]);
  });
  write_parameters(head, slots, gradients);
}

}  // namespace

Status backward(const Problem& problem, const Cotangents& cotangents, const Gradients& gradients) {
  const Selected selected = select_kernels(problem.isa);
  if (selected.status != Status::ok) return selected.status;
  try {
    run(problem, *selected.kernels, cotangents, gradients);
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
  return Status::ok;
}

}  // namespace moe::cpu

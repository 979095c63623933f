#include "hidden.h"

#include <algorithm>

namespace moe::cpu {

HiddenRows::HiddenRows(const PackedHead& head, const RowPlan& rows, const ColumnPlan& columns, int64_t chunk)
    : head_(head),
      rows_(rows),
      columns_(columns),
      tiles_(divide_up(head.problem.width, kTileWidth)),
      ring_rows_(rows.max_ranks(1)),
      packed_rows_(rows.max_ranks(chunk)),
      packed_row_floats_(round_up(head.problem.in_width, head.block_rows()) * head.layout.floats()) {
  const int64_t W = head.problem.width, columns_in = round_up(head.problem.in_width, head.block_rows());
  packed_ = zeros(packed_rows_ * packed_row_floats_ + head.block_rows());
  packed_rank_.assign(packed_rows_, -1);
  products_ = Buffer((columns_in + 1) * kColumn);
  std::memset(products_ + columns_in * kColumn, 0, kColumn * sizeof(float));
  ring_ = Buffer(head.groups() * ring_rows_ * 3 * W * kGroup);
  ring_rank_.assign(head.groups() * ring_rows_, -1);
  done_.assign(head.groups() * ring_rows_ * tiles_, 0);
  zero_row_ = zeros(W * kGroup);
  base_ = Buffer(chunk * kEdgeKinds * kGroup);
  const int64_t position_rows = round_up(chunk + 2, head.block_rows());
  positions_ = zeros(position_rows * head.layout.position_floats());
  position_products_ = Buffer(position_rows * kColumn);
}

Span HiddenRows::tile(int64_t t) const {
  return {t * kTileWidth, std::min((t + 1) * kTileWidth, head_.problem.width)};
}

Span HiddenRows::position_rows() const {
  return {std::max<int64_t>(chunk_.begin - 1, 0), std::min(chunk_.end + 1, head_.problem.height)};
}

float* HiddenRows::ring_row(int64_t g, int64_t rank) {
  return ring_ + (g * ring_rows_ + rank % ring_rows_) * 3 * head_.problem.width * kGroup;
}

void HiddenRows::begin_chunk(int64_t frame, Span rows) {
  chunk_ = rows;
  if (frame != frame_) {
    std::fill(packed_rank_.begin(), packed_rank_.end(), -1);
    std::fill(ring_rank_.begin(), ring_rank_.end(), -1);
    frame_ = frame;
  }
  const Span ranks = rows_.ranks(rows);
  for (int64_t rank = ranks.begin; rank < ranks.end; ++rank) {
    int64_t& held = packed_rank_[slot_of_packed(rank)];
    if (held == rank) continue;
    pack_row(head_.problem, head_.kernels, head_.layout, frame, rows_.source_row(rank), {0, head_.problem.in_width},
             head_.layout.floats(), packed_ + slot_of_packed(rank) * packed_row_floats_);
    held = rank;
  }
  if (head_.problem.pos_y) pack_positions(head_.problem.pos_y, position_rows(), head_.layout, positions_.data());
}

// The row part of the position embedding is a constant along a row, but for the outermost columns, whose outer taps
// are padding.
void HiddenRows::begin_group(int64_t g) {
  const Problem& p = head_.problem;
  for (int64_t i = 0; i < chunk_.size() * kEdgeKinds; ++i)
    std::memcpy(base_ + i * kGroup, head_.b1(g), kGroup * sizeof(float));
  if (!p.pos_y) return;

  const Span table = position_rows();
  head_.multiply(g, PackedHead::Channels::second_half, positions_.data(), head_.layout.position_floats(),
                 divide_up(table.size(), head_.block_rows()), position_products_.data());
  for (int64_t Y = chunk_.begin; Y < chunk_.end; ++Y)
    for (int dy = 0; dy < 3; ++dy) {
      const int64_t row = Y + dy - 1;
      if (row < 0 || row >= p.height) continue;
      const float* products = position_products_ + (row - table.begin) * kColumn + dy * kRowTap;
      for (int kind = 0; kind < kEdgeKinds; ++kind)
        for (int dx = (kind & 1 ? 1 : 0); dx < (kind & 2 ? 2 : 3); ++dx)
          for (int n = 0; n < kGroup; ++n)
            *(base_ + (((Y - chunk_.begin) * kEdgeKinds + kind) * kGroup + n)) += products[dx * kGroup + n];
    }
}

void HiddenRows::prepare(int64_t g, int64_t Y, const uint8_t* wanted) {
  const RowPlan::Terms& terms = rows_.terms(Y);
  for (int t = 0; t < terms.count; ++t) ensure(g, terms.term[t].rank, wanted);
}

// Computes what is missing in runs of neighbouring tiles, because each run's ends cost a few columns more.
void HiddenRows::ensure(int64_t g, int64_t rank, const uint8_t* wanted) {
  int64_t& held = ring_rank_[g * ring_rows_ + rank % ring_rows_];
  uint8_t* done = marks(g, rank);
  if (held != rank) {
    std::fill(done, done + tiles_, uint8_t{0});
    held = rank;
  }
  const auto missing = [&](int64_t t) { return !done[t] && (!wanted || wanted[t]); };
  for (int64_t t = 0; t < tiles_; ++t) {
    if (!missing(t)) continue;
    const int64_t first = t;
    for (; t < tiles_ && missing(t); ++t) done[t] = 1;
    compute(g, rank, {tile(first).begin, tile(t - 1).end});
  }
}

void HiddenRows::compute(int64_t g, int64_t rank, Span wanted) {
  const int64_t block_rows = head_.block_rows(), W = head_.problem.width;
  const float* pixels = packed_row(rank);
  const float* start = head_.column_part(g);
  float* out = ring_row(g, rank);
  const int64_t end = round_up(columns_.columns(wanted.end - 1).end, block_rows);
  int64_t column = columns_.columns(wanted.begin).begin / block_rows * block_rows;
  for (int64_t X = wanted.begin; X < wanted.end;) {
    const int64_t next = std::min(column + head_.column_block(), end);
    head_.multiply(g, PackedHead::Channels::all, pixels + column * head_.layout.floats(), head_.layout.floats(),
                   (next - column) / block_rows, products_ + column * kColumn);
    const int64_t first = X;
    while (X < wanted.end && columns_.columns(X).end <= next) ++X;
    head_.kernels.blend_columns(products_.data(), columns_.blends(), first, X, start, out, W * kGroup);
    column = next;
  }
}

RowBlend HiddenRows::blend_of(int64_t g, int64_t Y) const {
  const RowPlan::Terms& terms = rows_.terms(Y);
  const int64_t W = head_.problem.width;
  RowBlend blend;
  for (int i = 0; i < kBlend; ++i) {
    const bool used = i < terms.count;
    blend.row[i] = used ? ring_row(g, terms.term[i].rank) + terms.term[i].dy * W * kGroup : zero_row_.data();
    blend.weight[i] = used ? terms.term[i].weight : 0.f;
  }
  return blend;
}

void HiddenRows::read(int64_t g, int64_t Y, int64_t t, float* hidden, float* sum) const {
  const Span columns = tile(t);
  head_.kernels.blend_rows(blend_of(g, Y), base_ + (Y - chunk_.begin) * kEdgeKinds * kGroup, columns.begin, columns.end,
                           head_.problem.width, hidden, sum);
}

void HiddenRows::read_linear(int64_t g, int64_t Y, int64_t t, const float* bias, float* out) const {
  const Span columns = tile(t);
  head_.kernels.blend_rows_linear(blend_of(g, Y), bias, columns.begin, columns.end, head_.problem.width, out);
}

}  // namespace moe::cpu

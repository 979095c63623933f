// Hidden activations relu(conv(upsample(x) + pos) + b1) of one frame, by the low-resolution formulation:
//
//   conv(U x)[n, Y, X] = sum_dy sum_jy Uy[Y + dy, jy] ( sum_dx sum_jx Ux[X + dx, jx] G[jy, jx, dy, dx, n] )
//   G[jy, jx, dy, dx, n] = W[n, :, dy, dx] . x[:, jy, jx]
//
// G is a matrix product at low resolution; the inner sum ("combined row") is shared by all output rows that read
// low-resolution row jy. Rows are computed when first asked for and kept in a ring for each group, with a mark for
// each tile of columns; that gives any split of the rows among threads, and skipping, with the same result bit by bit.
#pragma once

#include "packed.h"

namespace moe::cpu {

class HiddenRows {
 public:
  // `chunk` is the most output rows that lie between two calls of begin_chunk.
  HiddenRows(const PackedHead& head, const RowPlan& rows, const ColumnPlan& columns, int64_t chunk);

  int64_t tiles() const { return tiles_; }
  Span tile(int64_t t) const;  // its output columns

  // Starts with output rows `rows` of a frame; what earlier chunks of the same frame computed is used again.
  void begin_chunk(int64_t frame, Span rows);
  // Group g in this chunk; must come before its rows.
  void begin_group(int64_t g);
  // Makes row Y readable in the tiles t with wanted[t] (null: in all).
  void prepare(int64_t g, int64_t Y, const uint8_t* wanted);
  // hidden [tile's columns][kGroup] of a prepared row; `sum` as in Kernels::blend_rows.
  void read(int64_t g, int64_t Y, int64_t t, float* hidden, float* sum = nullptr) const;
  // The same without relu, and with `bias` [kEdgeKinds][kGroup] in place of what begin_group sets.
  void read_linear(int64_t g, int64_t Y, int64_t t, const float* bias, float* out) const;

  // One that the chunk reads, with room to read a whole block of channels at its last pixel.
  const float* packed_row(int64_t rank) const { return packed_ + slot_of_packed(rank) * packed_row_floats_; }

 private:
  int64_t slot_of_packed(int64_t rank) const { return rank % packed_rows_; }
  Span position_rows() const;  // of the embedding, that the chunk reads
  float* ring_row(int64_t g, int64_t rank);
  const float* ring_row(int64_t g, int64_t rank) const { return const_cast<HiddenRows*>(this)->ring_row(g, rank); }
  uint8_t* marks(int64_t g, int64_t rank) { return done_.data() + (g * ring_rows_ + rank % ring_rows_) * tiles_; }
  RowBlend blend_of(int64_t g, int64_t Y) const;
  void ensure(int64_t g, int64_t rank, const uint8_t* wanted);
  void compute(int64_t g, int64_t rank, Span columns);

  const PackedHead& head_;
  const RowPlan& rows_;
  const ColumnPlan& columns_;
  int64_t tiles_, ring_rows_, packed_rows_, packed_row_floats_;
  int64_t frame_ = -1;
  Span chunk_ = {0, 0};

  Buffer packed_;                      // ring of packed low-resolution rows
  std::vector<int64_t> packed_rank_;   // which rank each of its slots holds
  Buffer products_;                    // one row of G for one group, and a column of zeros
  Buffer ring_;                        // [group][ring row][dy][X][kGroup]
  std::vector<int64_t> ring_rank_;     // [group][ring row]
  std::vector<uint8_t> done_;          // [group][ring row][tile]
  Buffer zero_row_;                    // [X][kGroup]
  Buffer base_;                        // [chunk row][kind of column][kGroup]: bias and the embedding's row part
  Buffer positions_;                   // the embedding's position_rows(), packed
  Buffer position_products_;           // of them, for one group
};

}  // namespace moe::cpu

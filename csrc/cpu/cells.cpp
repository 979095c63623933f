// Convolutions as matrix products with gathered 3x3 neighbourhoods: with a stride, or giving several pixels per cell.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../decoder.h"
#include "memory.h"
#include "parallel.h"
#include "select.h"

namespace moe::cpu {
namespace {

constexpr int64_t kBlock = 48;  // cells: their neighbourhoods of 256 channels take 0.4 MB

// The rows (or columns) of taps, in 0, 1, 2, that phase p of `scale` reads.
Span taps_of(int64_t phase, int64_t scale) { return {phase == 0 ? 0 : 1, phase == scale - 1 ? 3 : 2}; }

class Cells {
 public:
  Cells(const CellLayer& layer, const Kernels& kernels)
      : p_(layer),
        kernels_(kernels),
        rows_(divide_up(layer.height, layer.stride)),
        columns_(divide_up(layer.width, layer.stride)),
        cells_(layer.batch * rows_ * columns_),
        padded_(round_up(layer.out_channels, kernels.narrow_panel)),
        block_(round_up(std::min(kBlock, divide_up(cells_, layer.threads)), kernels.block_rows)) {}

  void run() {
    const int64_t blocks = divide_up(cells_, block_);
    std::vector<Buffer> in, out;
    for (int64_t slot = 0; slot < std::min<int64_t>(p_.threads, blocks); ++slot) {
      in.push_back(zeros(block_ * kTaps * p_.in_channels));
      out.emplace_back(block_ * padded_);
    }
    parallel_for(blocks, p_.threads, [&](int64_t i, int slot) {
      run_block({i * block_, std::min((i + 1) * block_, cells_)}, in[slot].data(), out[slot].data());
    });
  }

 private:
  struct Place {
    int64_t frame, row, column;
  };

  Place place(int64_t cell) const { return {cell / (rows_ * columns_), cell / columns_ % rows_, cell % columns_}; }

  void run_block(Span cells, float* in, float* out) const {
    for (int64_t cell = cells.begin; cell < cells.end; ++cell)
      gather(place(cell), in + (cell - cells.begin) * kTaps * p_.in_channels);
    const float* weights = p_.weights;
    for (int64_t p = 0; p < p_.scale; ++p)
      for (int64_t q = 0; q < p_.scale; ++q) {
        weights = multiply(taps_of(p, p_.scale), taps_of(q, p_.scale), cells.size(), in, weights, out);
        for (int64_t cell = cells.begin; cell < cells.end; ++cell)
          write(place(cell), p, q, out + (cell - cells.begin) * padded_);
      }
  }

  void gather(const Place& at, float* in) const {
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const int64_t row = at.row * p_.stride + tap / 3 - 1, column = at.column * p_.stride + tap % 3 - 1;
      float* to = in + tap * p_.in_channels;
      if (row < 0 || row >= p_.height || column < 0 || column >= p_.width)
        std::memset(to, 0, p_.in_channels * sizeof(float));
      else
        std::memcpy(to, p_.x + ((at.frame * p_.height + row) * p_.width + column) * p_.in_channels,
                    p_.in_channels * sizeof(float));
    }
  }

  // One phase of all cells; returns where the next phase's weights begin.
  const float* multiply(Span rows, Span columns, int64_t cells, const float* in, const float* weights,
                        float* out) const {
    Gemm gemm = {};
    gemm.a_row = kTaps * p_.in_channels;
    gemm.a_depth = 1;
    gemm.depth = columns.size() * p_.in_channels;
    gemm.b_panel = gemm.depth * kernels_.narrow_panel;
    gemm.b_depth = kernels_.narrow_panel;
    gemm.c = out;
    gemm.c_row = padded_;
    gemm.row_blocks = divide_up(cells, kernels_.block_rows);
    gemm.panels = padded_ / kernels_.narrow_panel;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      gemm.a = in + (row * 3 + columns.begin) * p_.in_channels;
      gemm.b = weights;
      gemm.accumulate = row > rows.begin;
      kernels_.gemm_in_parts(gemm);
      weights += gemm.depth * padded_;
    }
    return weights;
  }

  void write(const Place& at, int64_t p, int64_t q, const float* out) const {
    const int64_t height = rows_ * p_.scale, width = columns_ * p_.scale;
    const int64_t row = at.row * p_.scale + p, column = at.column * p_.scale + q;
    const float* bias = p_.bias + (edge_kind(row, height) * kEdgeKinds + edge_kind(column, width)) * p_.out_channels;
    float* y = p_.y + ((at.frame * height + row) * width + column) * p_.out_channels;
    for (int64_t n = 0; n < p_.out_channels; ++n) y[n] = out[n] + bias[n];
  }

  const CellLayer& p_;
  const Kernels& kernels_;
  int64_t rows_, columns_, cells_, padded_, block_;
};

}  // namespace

Status cells(const CellLayer& layer) {
  return with_kernels(layer.isa, [&](const Kernels& kernels) { Cells(layer, kernels).run(); });
}

}  // namespace moe::cpu

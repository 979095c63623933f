// 3x3 convolutions by Winograd's algorithm. A block of tiles is one thread's: its transformed input and its products stay in
// that thread's caches, and the weights stream past them once a block.
#include <algorithm>
#include <vector>

#include "../decoder.h"
#include "memory.h"
#include "parallel.h"
#include "select.h"

namespace moe::cpu {
namespace {

constexpr int64_t kProducts = kPatch * kPatch;
constexpr int64_t kStagger = 16;  // floats between planes, so that they do not compete for the same lines of a cache

class Winograd {
 public:
  Winograd(const WinogradLayer& layer, const Kernels& kernels)
      : p_(layer),
        kernels_(kernels),
        rows_(divide_up(layer.height, kTile)),
        columns_(divide_up(layer.width, kTile)),
        tiles_(layer.batch * rows_ * columns_),
        padded_(round_up(layer.out_channels, kernels.narrow_panel)) {
    // Weights pass once a block, a tile's transforms twice: as many bytes of one as of the other.
    const int64_t balanced = layer.in_channels * padded_ / (2 * (layer.in_channels + padded_));
    const int64_t share = divide_up(tiles_, layer.threads);
    block_ = round_up(std::max<int64_t>(std::min(balanced, share), 1), kernels.block_rows);
    in_plane_ = block_ * layer.in_channels + kStagger;
    out_plane_ = block_ * padded_ + kStagger;
  }

  void run() {
    const int64_t blocks = divide_up(tiles_, block_);
    std::vector<Buffer> in, out;
    for (int64_t slot = 0; slot < std::min<int64_t>(p_.threads, blocks); ++slot) {
      in.emplace_back(kProducts * in_plane_);
      out.emplace_back(kProducts * out_plane_);
    }
    parallel_for(blocks, p_.threads, [&](int64_t i, int slot) {
      run_block({i * block_, std::min((i + 1) * block_, tiles_)}, in[slot].data(), out[slot].data());
    });
  }

 private:
  struct Place {
    int64_t frame, row, column;  // the tile's first pixel
  };

  Place place(int64_t tile) const {
    return {tile / (rows_ * columns_), tile / columns_ % rows_ * kTile, tile % columns_ * kTile};
  }

  void run_block(Span tiles, float* in, float* out) const {
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
      read(place(tile), in + (tile - tiles.begin) * p_.in_channels);
    const int64_t blocks = divide_up(tiles.size(), kernels_.block_rows);
    for (int64_t i = 0; i < kProducts; ++i) multiply(i, blocks, in + i * in_plane_, out + i * out_plane_);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
      write(place(tile), out + (tile - tiles.begin) * padded_);
  }

  void read(const Place& at, float* in) const {
    WinogradPatch patch = {};
    patch.channels = p_.in_channels;
    patch.pixel = p_.in_channels;
    patch.row = p_.width * p_.in_channels;
    patch.plane = in_plane_;
    patch.rows_begin = at.row == 0 ? 1 : 0;
    patch.columns_begin = at.column == 0 ? 1 : 0;
    patch.rows_end = static_cast<int>(std::min<int64_t>(kPatch, p_.height + 1 - at.row));
    patch.columns_end = static_cast<int>(std::min<int64_t>(kPatch, p_.width + 1 - at.column));
    const int64_t corner = ((at.frame * p_.height + at.row - 1) * p_.width + at.column - 1) * p_.in_channels;
    kernels_.winograd_input(patch, p_.x + corner, p_.relu_input, in);
  }

  void multiply(int64_t product, int64_t blocks, const float* in, float* out) const {
    Gemm gemm = {};
    gemm.a = in;
    gemm.a_row = p_.in_channels;
    gemm.a_depth = 1;
    gemm.b = p_.weights + product * p_.in_channels * padded_;
    gemm.b_panel = p_.in_channels * kernels_.narrow_panel;
    gemm.b_depth = kernels_.narrow_panel;
    gemm.c = out;
    gemm.c_row = padded_;
    gemm.row_blocks = blocks;
    gemm.panels = padded_ / kernels_.narrow_panel;
    gemm.depth = p_.in_channels;
    gemm.goes_on = true;
    kernels_.gemm_in_parts(gemm);
  }

  void write(const Place& at, const float* out) const {
    WinogradPatch patch = {};
    patch.channels = p_.out_channels;
    patch.pixel = p_.out_channels;
    patch.row = p_.width * p_.out_channels;
    patch.plane = out_plane_;
    patch.rows_end = static_cast<int>(std::min<int64_t>(kTile, p_.height - at.row));
    patch.columns_end = static_cast<int>(std::min<int64_t>(kTile, p_.width - at.column));
    const int64_t first = ((at.frame * p_.height + at.row) * p_.width + at.column) * p_.out_channels;
    const auto from = [&](const float* map) { return map ? map + first : nullptr; };
    kernels_.winograd_output(patch, out, p_.bias, from(p_.residual), p_.relu_residual, from(p_.added), p_.y + first);
  }

  const WinogradLayer& p_;
  const Kernels& kernels_;
  int64_t rows_, columns_, tiles_;  // of the output
  int64_t padded_;                  // output channels, to whole panels
  int64_t block_;                   // tiles
  int64_t in_plane_, out_plane_;    // floats from one of the 36 products to the next
};

}  // namespace

Status winograd(const WinogradLayer& layer) {
  return with_kernels(layer.isa, [&](const Kernels& kernels) { Winograd(layer, kernels).run(); });
}

}  // namespace moe::cpu

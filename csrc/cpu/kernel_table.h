// Collects this translation unit's kernels; include last.
#pragma once

#include "blend.h"
#include "gemm.h"
#include "median.h"
#include "mix.h"
#include "pack.h"
#include "tile_kernels.h"
#include "winograd.h"

namespace moe::cpu {
namespace {

template <int Rows, int Vecs, int NarrowVecs>
Kernels make_kernels(const char* isa) {
  Kernels kernels = {};
  kernels.isa = isa;
  kernels.block_rows = Rows;
  kernels.panel = Vecs * kLanes;
  kernels.narrow_panel = NarrowVecs * kLanes;
  kernels.gemm = gemm<Rows, Vecs>;
  kernels.gemm_narrow = gemm<Rows, NarrowVecs>;
  kernels.gemm_in_parts = gemm_in_parts<Rows, NarrowVecs>;
  kernels.pack_pixels = pack_pixels;
  kernels.blend_columns = blend_columns;
  kernels.blend_rows = blend_rows;
  kernels.blend_rows_linear = blend_rows_linear;
  kernels.second_layer = second_layer;
  kernels.mix = mix;
  kernels.find_kept = find_kept;
  kernels.mix_backward = mix_backward;
  kernels.transform_rows = transform_rows;
  kernels.transform_columns = transform_columns;
  kernels.tile_hidden = tile_hidden;
  kernels.winograd_input = winograd_input;
  kernels.winograd_output = winograd_output;
  kernels.blend_corners = blend_corners;
  kernels.sharpen_row = sharpen_row;
  kernels.second_layer_backward = second_layer_backward;
  kernels.second_layer_weights = second_layer_weights;
  kernels.add_row = add_row;
  kernels.sum_pixels = sum_pixels;
  kernels.scatter_columns = scatter_columns;
  return kernels;
}

}  // namespace
}  // namespace moe::cpu

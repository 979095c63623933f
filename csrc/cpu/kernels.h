// The inner loops, compiled once per instruction set; everything above them is compiled for the baseline processor.
//
// Layout rule of the whole CPU path: channels lie in vector lanes. Hidden channels are handled in groups of kGroup,
// because a group's weights, its products at low resolution and its ring of combined rows fit a 1 MB L2 together.
// That keeps interpolation free of shuffles (its weights are scalars), and any width costs what it should.
#pragma once

#include <cstdint>

#include "../moe_head.h"
#include "../sharpen.h"

namespace moe::cpu {

constexpr int kGroup = 16;               // hidden channels handled together
constexpr int kTaps = 9;                 // of the 3x3 convolution, row by row
constexpr int kColumn = kTaps * kGroup;  // products of one low-resolution pixel with one group's weights
constexpr int kRowTap = 3 * kGroup;      // floats between the products of neighbouring rows of taps
constexpr int kBlend = 6;                // three taps, each between two low-resolution neighbours
constexpr int kSecondAlign = 4;          // outputs of a 1x1 layer are padded to a multiple of it
constexpr int kTileWidth = 64;           // output pixels of a row handled together: the skip grid and the L1 block

// c[m][n] (+)= sum_k a(m, k) b[k][n], for `row_blocks` blocks of kernel rows and `panels` panels of kernel columns.
// Products of bfloat16: a and b hold pairs along k, one pair per float, and `depth` counts pairs.
struct Gemm {
  const float* a;
  int64_t a_row, a_depth;  // strides
  const float* b;          // panel p's row k starts at b + p * b_panel + k * b_depth
  int64_t b_panel, b_depth;
  int64_t a_low, b_low;    // of bf16x3: from a high half's place to its low half's
  float* c;
  int64_t c_row;
  int64_t row_blocks, panels, depth;
  bool accumulate;
  bool goes_on;  // what is wanted next lies behind the last panel: fetch it (a hint, of float32 products)
};

// Pixels of a row of x, and how they are packed: see ChannelLayout.
struct PixelRow {
  const void* first;
  Element element;
  int64_t channel, row, pixel;  // strides, in elements
  int64_t count;
  int64_t half, rest;            // channels of the two halves
  bool in_pairs;                 // of bfloat16; otherwise float32
  int64_t half_floats, out_pixel;  // floats of a packed half, and from a packed pixel to the next
  int64_t low;                   // floats to the low parts of bf16x3; otherwise 0
};

// How one output column's three horizontal taps read the low-resolution products: offsets into a row of them.
struct ColumnBlend {
  int64_t offset[kBlend];
  float weight[kBlend];
};

// One output row's vertical taps: combined rows and their weights; unused entries point to a row of zeros.
struct RowBlend {
  const float* row[kBlend];
  float weight[kBlend];
};

// Which kind of column an output pixel is in, for the part of the position embedding that depends on the row:
// bit 0: the first column (its left taps are padding); bit 1: the last one.
constexpr int kEdgeKinds = 4;
static inline int edge_kind(int64_t at, int64_t count) { return (at == 0 ? 1 : 0) + (at == count - 1 ? 2 : 0); }

// Winograd's tiles: kTile x kTile outputs from kPatch x kPatch inputs.
constexpr int kTile = 4;
constexpr int kPatch = kTile + 2;

// A tile's pixels in a map, and its transform.
struct WinogradPatch {
  int64_t channels;    // a multiple of kChannelStep
  int64_t row, pixel;  // strides of the map
  int64_t plane;       // floats from one of the transform's kPatch * kPatch places to the next
  int rows_begin, rows_end, columns_begin, columns_end;  // of the patch: those inside the map
};

// The head's tiles: kHeadTile x kHeadTile outputs from kHeadPatch x kHeadPatch upsampled pixels, by kPlaces products.
// The points double from pair to pair and are powers of two: of the sets tried, the smallest rounding error.
constexpr int kHeadTile = 6;
constexpr int kHeadPatch = kHeadTile + 2;
constexpr int kPlaces = kHeadPatch * kHeadPatch;
constexpr int kMaxPatchSources = kHeadPatch + 1;  // low-resolution rows or columns, of which there are no more than pixels
constexpr double kHeadPoints[kHeadPatch - 1] = {0, .5, -.5, 1, -1, 2, -2};  // and infinity

// The position embedding in a patch's transform, for kGroup channels: place (i, j) gets vectors[j] * scalars[i] where it
// depends on the column, vectors[i] * scalars[j] where it depends on the row.
struct PatchPosition {
  const float* vectors;  // [kHeadPatch] at a distance of `stride`; null: there is no embedding
  int64_t stride;
  const float* scalars;  // [kHeadPatch]
  bool by_column;
};

// A block of at most kTileWidth pixels of one output row, from the 1x1 layers' results to the outputs or to gradients.
struct MixBlock {
  int64_t count;
  const float* const* z;  // expert k's outputs of pixel i: z[k] + i * z_pixel
  int64_t z_pixel;
  const float* gate;  // pixel i's logits: gate + i * gate_pixel; null without a gate
  int64_t gate_pixel;
  const float* gate_logits;  // added: expert k's of pixel i at k * plane + i; null: none
  int64_t plane;             // pixels of a frame
  const uint8_t* kept;       // per expert: 0 = left out; null: none is
  float* scratch;            // mix_scratch_floats()
};

struct MixGradients {
  float* const* z;  // laid out as MixBlock::z, and may be the same memory
  float* gate;      // laid out as MixBlock::gate, likewise
};

inline int64_t mix_scratch_floats(const Problem& p) {
  // planes of kTileWidth: raw outputs, activated outputs and their gradients; logits, weights, log weights, decode weights
  return kTileWidth * (p.experts * (3 * p.outputs + 6) + 8);
}

// Of one row of one plane in sharpen_row()'s scratch: the border's pixels beyond both ends, and a vector that begins at
// the last column.
static inline int64_t sharpen_row_floats(const Sharpening& p) {
  return (p.width + p.window + 2 * kGroup) / kGroup * kGroup;
}
static inline int64_t sharpen_scratch_floats(const Sharpening& p) {
  // planes of depth, validity and colours; four of extremes, one of edges; values and weights of a window's pixels
  return (5 * p.window + 5) * sharpen_row_floats(p) + 2 * p.window * p.window * kGroup;
}

// Products of bfloat16 pairs. null where the instruction set or the processor has none.
struct Bf16Products {
  void (*gemm)(const Gemm&);
  // a = high + low and b likewise: the products of the high halves and of a high with a low one. What that leaves out is
  // 2^-18 of a product, and a number that is not finite makes NaN. Henry, Tang and Heinecke (arXiv 1904.06376).
  void (*gemm_x3)(const Gemm&);
  int block_rows;  // rows of c in one Gemm block
  int columns;     // low-resolution columns whose products are made together
  double x3_cost;  // the time of a multiply-add of gemm_x3 in that of a float32 one
};

struct Kernels {
  const char* isa;
  int block_rows;    // rows of c in one Gemm block
  int panel;         // columns of c in one panel of `gemm`
  int narrow_panel;  // the same of `gemm_narrow`

  void (*gemm)(const Gemm&);
  void (*gemm_narrow)(const Gemm&);
  // The same panels in parts of the depth, whose sums are summed: with 256 channels a third of the rounding error.
  void (*gemm_in_parts)(const Gemm&);
  Bf16Products bf16;

  // Padding stays as it is, but for the other half of a last pair, which becomes 0.
  void (*pack_pixels)(const PixelRow&, float* out);
  // out[dy][X] = start[dy][X] + sum over the blend of products, for X in [begin, end) and the three rows of taps.
  void (*blend_columns)(const float* products, const ColumnBlend* blends, int64_t begin, int64_t end,
                        const float* start, float* out, int64_t out_plane);
  // hidden[i] = relu(base[kind of column begin + i] + sum of the blend's rows), for i in [0, end - begin). Adds what relu
  // was given to sum [kGroup], which stays finite only if all of it is, unless that is null.
  void (*blend_rows)(const RowBlend& blend, const float* base, int64_t begin, int64_t end, int64_t width,
                     float* hidden, float* sum);
  // The same without the relu and the sum.
  void (*blend_rows_linear)(const RowBlend& blend, const float* base, int64_t begin, int64_t end, int64_t width,
                            float* out);
  // z[i] (+)= hidden[i] . w2, for kGroup hidden channels; w2 is [kGroup][padded], start [padded] or null to add to z.
  void (*second_layer)(const float* hidden, int64_t count, const float* w2, int64_t padded, const float* start,
                       float* z, int64_t z_pixel);
  // The outputs of a block; pointers in `outputs` are those of the block's first pixel in its frame.
  void (*mix)(const Problem&, const MixBlock&, const Outputs& outputs);
  // kept[k] |= whether expert k matters in this block: see Problem::skip_below.
  void (*find_kept)(const Problem&, const MixBlock&, uint8_t* kept);
  // The gradients of a block's z and logits, written over the inputs' layout.
  void (*mix_backward)(const Problem&, const MixBlock&, const Cotangents&, const MixGradients&);

  // --- the head by tiles: see tiles.h ---
  // out[column][kHeadPatch][kGroup] = sum over rows of weights[row][kHeadPatch] times kGroup channels of the pixels.
  void (*transform_rows)(const float* pixels, int64_t row, int64_t rows, int64_t pixel, int64_t columns,
                         const float* weights, float* out);
  // A patch's kGroup channels: v[place] = sum over columns of weights[column][kHeadPatch] times transformed rows, and the
  // position's part.
  void (*transform_columns)(const float* rows, int64_t columns, const float* weights, const PatchPosition& position,
                            float* v, int64_t plane);
  // hidden [kHeadTile * kHeadTile][kGroup] = relu(bias + the tile of the products m[place]). Adds its terms but for the
  // bias to sum [kGroup], which stays finite only if all of them are.
  void (*tile_hidden)(const float* m, int64_t plane, const float* bias, float* hidden, float* sum);

  // --- the decoder's layers ---
  // v[place] of a patch whose first pixel, which may lie outside the map, is x.
  void (*winograd_input)(const WinogradPatch&, const float* x, bool relu_input, float* v);
  // y, and residual and added with its strides, from m[place]: see WinogradLayer. Begins are 0; all but m may be null.
  void (*winograd_output)(const WinogradPatch&, const float* m, const float* bias, const float* residual,
                          bool relu_residual, const float* added, float* y);
  // out = the weighted sum of four pixels.
  void (*blend_corners)(const float* const* corners, const float* weights, int64_t channels, float* out);

  // --- the filter ---
  // A row of the result; scratch: sharpen_scratch_floats().
  void (*sharpen_row)(const Sharpening&, int64_t frame, int64_t row, float* scratch);

  // --- the adjoints ---
  // hidden[i] becomes the gradient before relu: where(hidden <= 0, 0, grad_z[i] . w2), w2 being [outputs][kGroup].
  void (*second_layer_backward)(float* hidden, int64_t count, const float* w2, int64_t outputs, const float* grad_z,
                                int64_t z_pixel);
  // grad_w2 [outputs][kGroup] += sum_i grad_z[i] (x) hidden[i].
  void (*second_layer_weights)(const float* hidden, int64_t count, const float* grad_z, int64_t z_pixel,
                               int64_t outputs, float* grad_w2);
  // out (+)= weight * row, `count` floats (a multiple of kGroup).
  void (*add_row)(const float* row, float weight, int64_t count, bool accumulate, float* out);
  // total [kGroup] += the sum over `count` pixels of a row.
  void (*sum_pixels)(const float* row, int64_t count, double* total);
  // The adjoint of blend_columns: products[blend] += weight * rows[dy][X], for the three rows of taps.
  void (*scatter_columns)(const float* rows, int64_t row_plane, const ColumnBlend* blends, int64_t width,
                          float* products);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();  // avx512_kernels() but for bfloat16 products
#endif

}  // namespace moe::cpu

// Layers of a DPT decoder on float32 maps with channels last ([batch][row][column][channel], contiguous). Plain data, as
// in moe_head.h; no exception crosses it. Channels of maps are multiples of kChannelStep, but for the input of cells(), and
// every address is aligned to 64 bytes.
#pragma once

#include "moe_head.h"

namespace moe {

constexpr int64_t kChannelStep = 16;

struct Layer {
  int64_t batch, height, width, in_channels;  // of x
  int64_t out_channels;
  const float* x;
  const float* weights;
  const float* bias;
  float* y;
  const char* isa;
  int32_t threads;
};

// y = conv(x) + bias + residual + added: 3x3, stride 1, padding 1. Weights are those of G w G^T for the points of
// cpu/winograd.h, [36][panel][in_channels][panel's columns], where columns up to a whole panel are zero.
struct WinogradLayer : Layer {  // bias [out_channels], or null
  bool relu_input;              // conv(relu(x))
  const float* residual;        // of y's shape, or null
  bool relu_residual;
  const float* added;  // of y's shape, or null
};

// In the other layers a bias may come from a layer that was folded in, and is then missing where padding was: a table
// [kEdgeKinds][kEdgeKinds][out_channels] over kinds of row and of column (bit 0: the first one, bit 1: the last one).

// Cell (i, j) reads the 3x3 pixels around x[i * stride, j * stride] and gives scale x scale pixels of y, each phase (p, q)
// with its own weights. Phases on a cell's edge read the taps on that side, the others only the middle ones. Weights: for
// each phase, and each of its rows of taps, [panel][columns of taps * in_channels][panel's columns].
struct CellLayer : Layer {
  int64_t stride, scale;
};

// y = conv(upsample(x)) + bias: bilinear to out_height x out_width with aligned corners, then 3x3 with padding 1. Weights
// [out_channels][in_channels][3][3].
struct UpsampledLayer : Layer {
  int64_t out_height, out_width;
};

// y = upsample(x), likewise; no weights.
struct Upsampling : Layer {
  int64_t out_height, out_width;
};

namespace cpu {
Status winograd(const WinogradLayer& layer);
Status cells(const CellLayer& layer);
Status upsampled(const UpsampledLayer& layer);
Status upsample(const Upsampling& layer);

// Columns of a panel of packed weights; 0 for an instruction set that this processor lacks.
int64_t weights_panel(const char* isa);
}  // namespace cpu

}  // namespace moe

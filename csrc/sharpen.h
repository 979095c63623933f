// One pass of the filter of moe3d/sharpen.py, on float32 maps. Plain data, as in moe_head.h; no exception crosses it.
#pragma once

#include "moe_head.h"

namespace moe {

// Where the largest valid depth of the window around a pixel is more than edge_ratio times the least, a valid pixel
// becomes the weighted median of the window's; a window with a NaN that counts stays as it is, and so does every other
// pixel. Beyond the border lie the last pixels again.
struct Sharpening {
  int64_t batch, height, width;
  int64_t window;        // side, odd
  float steepness;       // a neighbour weighs exp(-steepness * its squared distance in colour)
  float edge_ratio;
  const float* depth;    // [batch][row][column]
  const float* image;    // [batch][3][row][column]
  const uint8_t* valid;  // as depth; null: every pixel is
  float* sharp;          // as depth, in other memory
  const char* isa;
  int32_t threads;
};

namespace cpu {
Status sharpen(const Sharpening& pass);
}  // namespace cpu

}  // namespace moe

// Everything about a call that depends on its sizes alone: how output rows and columns read the low-resolution map.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace moe::cpu {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct Band {  // output rows of a frame
  int64_t frame;
  Span rows;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Where one output coordinate lies between its two low-resolution neighbours (align_corners=True). From integers, so
// exact: float32 positions, as PyTorch's, would cost 1e-4 at the worst pixel. A neighbour of weight 0 is never read.
struct Position {
  int64_t low;
  double low_weight, high_weight;  // high is low + 1
  bool has_high() const { return high_weight != 0; }
};
Position position_of(int64_t index, int64_t source, int64_t target);

// The low-resolution rows that the output reads, numbered by rank (downsampling skips rows), and which of them each
// output row reads through its three vertical taps.
class RowPlan {
 public:
  RowPlan(int64_t source, int64_t target);

  struct Term {  // tap dy in {0, 1, 2} reads the row of this rank
    int64_t rank;
    int dy;
    float weight;
  };
  struct Terms {
    Term term[kBlend];
    int count = 0;
  };

  const Terms& terms(int64_t Y) const { return terms_[Y]; }
  int64_t source_row(int64_t rank) const { return sources_[rank]; }
  int64_t count() const { return static_cast<int64_t>(sources_.size()); }
  Span ranks(Span rows) const;                 // read by these output rows
  Span readers(Span ranks) const;              // output rows that read one of these
  int64_t max_ranks(int64_t row_count) const;  // the most ranks that so many successive output rows read

 private:
  std::vector<Terms> terms_;
  std::vector<int64_t> sources_;
};

// How output columns read a row of products, whose column `zero_column` holds zeros.
class ColumnPlan {
 public:
  ColumnPlan(int64_t source, int64_t target, int64_t zero_column);

  const ColumnBlend* blends() const { return blends_.data(); }
  Span columns(int64_t X) const { return columns_[X]; }  // low-resolution columns that output column X reads

 private:
  std::vector<ColumnBlend> blends_;
  std::vector<Span> columns_;
};

// How one axis of the head's tiles reads the low-resolution map: interpolation and Winograd's transform of a patch in one
// table, made in double. Beyond the map the upsampled pixels are zero, which is the convolution's padding.
class PatchPlan {
 public:
  PatchPlan(int64_t source, int64_t target);

  int64_t count() const { return static_cast<int64_t>(patches_.size()); }
  Span sources(int64_t tile) const { return patches_[tile].sources; }  // low-resolution pixels
  const float* weights(int64_t tile) const { return patches_[tile].weights; }  // [source][kHeadPatch]
  const float* inside(int64_t tile) const { return patches_[tile].inside; }    // the transform of ones inside the map
  // The transform of values, one for each upsampled pixel and channel: out [kHeadPatch][out_stride].
  void transform(int64_t tile, const float* values, int64_t channels, float* out, int64_t out_stride) const;

 private:
  struct Patch {
    Span sources;
    float weights[kMaxPatchSources * kHeadPatch];
    float inside[kHeadPatch];
  };
  int64_t target_;
  std::vector<Patch> patches_;
};

// The matrices of Winograd's F(kHeadTile, 3) for kHeadPoints.
struct HeadTransforms {
  HeadTransforms();
  double input[kHeadPatch][kHeadPatch];  // B^T
  double weights[kHeadPatch][3];         // G
};
const HeadTransforms& head_transforms();

// What PyTorch's interpolation with float32 positions is off by, about: the RMS error of positions, in pixels. It is 0 where
// nothing is resampled or the ratio is a power of two, and grows with the map.
double interpolation_error(const Problem& problem);

// The relative RMS error of the forward pass by tiles, with sums in parts of the depth, as measured.
constexpr double kTileError = 2e-6;
// The same without parts, and in bf16x3.
constexpr double kRoughError = 4e-6;

// What the forward pass takes: products at low resolution, unless another formulation needs less time and is closer to the
// truth than PyTorch. `kernels` null: float32 products alone.
Formulation chosen_formulation(const Problem& problem, const Kernels* kernels);

}  // namespace moe::cpu

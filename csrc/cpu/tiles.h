// Hidden activations by Winograd's F(6x6, 3x3) on the upsampled map, of which no more than a few tiles exist at a time.
//
// A patch of 8 x 8 upsampled pixels is linear in the low-resolution pixels that it reads, and so is its transform: one small
// matrix for its rows and one for its columns do both (PatchPlan). 64 matrix products of transformed patches and weights and a
// transform back give 36 hidden pixels with 64 multiplications a channel where the low-resolution formulation of hidden.h takes
// 9 for each low-resolution pixel: at VGGT's ratio of 1.75, 1.8 for an output pixel instead of 2.9.
//
// Rounding errors are some ten times those of hidden.h, and still less than what float32 positions cost PyTorch where
// uses_tiles() says so. A number that is not finite spreads over its tiles: they are found by their sums, and their bands are
// done again as hidden.h does them.
#pragma once

#include "mixture.h"

namespace moe::cpu {

// Up to kMaxColumns hidden channels of one branch, whose products are made together.
struct Product {
  int64_t branch, first_group, groups;
  int64_t columns;  // to whole panels
  int64_t offset;   // of its weights, [place][panel][channel][panel's columns]
};

class TileHead : public Branches {
 public:
  TileHead(const Problem& problem, const Kernels& kernels);

  static constexpr int64_t kMaxColumns = 32;

  const ChannelLayout layout;

  const std::vector<Product>& products() const { return products_; }
  const float* weights(const Product& product) const { return weights_ + product.offset; }

  // The transformed weights of all products.
  int64_t packed_floats() const { return packed_floats_; }
  void pack(float* out) const;
  // Must come before weights(). `packed`: what pack() wrote earlier; null: pack now.
  void use(const float* packed);

 private:
  void pack_product(const Product& product, float* out) const;

  std::vector<Product> products_;
  int64_t packed_floats_ = 0;
  Buffer own_weights_;
  const float* weights_ = nullptr;
};

// The outputs of a call; returns the bands in which something is not finite, and has spread further than it may.
std::vector<Band> forward_by_tiles(const TileHead& head, const Outputs& outputs);

}  // namespace moe::cpu

// The last step of the forward pass: from the 1x1 layers' results of all branches to the outputs.
#pragma once

#include <vector>

#include "packed.h"

namespace moe::cpu {

// Whether experts of negligible weight may be left out.
inline bool skips(const Problem& p) { return p.skip_below > 0 && p.has_gate() && p.experts > 1; }

class Mixture {
 public:
  // `pixels`: how many have their results kept at a time.
  Mixture(const Branches& head, const Outputs& outputs, int64_t pixels)
      : head_(head), p_(head.problem), outputs_(outputs), scratch_(mix_scratch_floats(p_)), z_at_(p_.experts) {
    for (int64_t branch = 0; branch < head.branches(); ++branch) z_.emplace_back(pixels * head.padded_outputs(branch));
  }

  // A branch's results, [pixel][padded_outputs], from a pixel on.
  float* z(int64_t branch, int64_t at) { return z_[branch] + at * head_.padded_outputs(branch); }

  struct Run {  // at most kTileWidth neighbouring pixels of an output row
    int64_t frame, pixel;
    int64_t at;  // where their results begin
    int64_t count;
  };

  // Sets kept[k] where expert k matters in this run.
  void find_kept(const Run& run, uint8_t* kept) { head_.kernels.find_kept(p_, block(run), kept); }

  // The outputs of a run, without the experts k that have kept[k] == 0.
  void mix(const Run& run, const uint8_t* kept) {
    MixBlock mixed = block(run);
    mixed.kept = kept;
    head_.kernels.mix(p_, mixed, outputs_at(run));
  }

 private:
  MixBlock block(const Run& run) {
    MixBlock block = {};
    block.count = run.count;
    for (int64_t k = 0; k < p_.experts; ++k) z_at_[k] = z(k, run.at);
    block.z = z_at_.data();
    block.z_pixel = head_.padded_outputs(0);
    block.gate = p_.has_gate() ? z(p_.experts, run.at) : nullptr;
    block.gate_pixel = head_.padded_outputs(p_.experts);
    if (p_.gate_logits) block.gate_logits = p_.gate_logits + run.frame * p_.experts * p_.pixels() + run.pixel;
    block.plane = p_.pixels();
    block.scratch = scratch_.data();
    return block;
  }

  Outputs outputs_at(const Run& run) const {
    const int64_t channels = p_.prediction_channels(), plane = p_.pixels();
    const auto at = [&](float* map, int64_t planes) {
      return map ? map + run.frame * planes * plane + run.pixel : nullptr;
    };
    return {at(outputs_.prediction, channels), at(outputs_.confidence, 1), at(outputs_.entropy, 1),
            at(outputs_.weights, p_.experts), at(outputs_.hypotheses, p_.experts * channels)};
  }

  const Branches& head_;
  const Problem& p_;
  const Outputs& outputs_;
  Buffer scratch_;
  std::vector<Buffer> z_;
  std::vector<const float*> z_at_;
};

}  // namespace moe::cpu

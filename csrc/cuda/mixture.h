// The per-pixel half of the operation, forward and backward, as moe3d/ops/mixture.py defines it: one thread a pixel.
// Nothing is kept by expert in registers, so there is no limit on their number: values are read again where needed.
#pragma once

#include "numerics.h"

namespace moe::cuda {

constexpr float kSwitchMinWeight = 0.01f;  // experts at or below it have no say in whether the hypotheses disagree

// Softmax over a pixel's experts. The shift comes before the division, so that a small temperature overflows towards
// weight 0 and not to NaN; log(sum) goes through what the largest leaves over: exact where one expert has nearly all.
template <class Logit>
struct Gate {
  Logit logit;
  int experts;
  float temperature, largest, sum, log_sum;
  int best;  // the first of equals

  MOE_DEVICE Gate(Logit logit, int experts, float temperature)
      : logit(logit), experts(experts), temperature(temperature < FLT_MIN ? FLT_MIN : temperature) {
    largest = logit(0), best = 0;
    for (int k = 1; k < experts; ++k) {
      const float value = logit(k);
      if (value > largest || value != value) largest = value, best = k;
    }
    float rest = 0.f;
    sum = 0.f;
    for (int k = 0; k < experts; ++k) {
      const float e = expf(scaled(k));
      sum += e;
      if (k != best) rest += e;
    }
    log_sum = log1pf(rest);
  }

  MOE_DEVICE float scaled(int k) const { return (logit(k) - largest) / temperature; }
  MOE_DEVICE float weight(int k) const { return expf(scaled(k)) / sum; }
  MOE_DEVICE float log_weight(int k) const { return scaled(k) - log_sum; }
  MOE_DEVICE float times_log(int k) const {  // w log w with 0 log 0 = 0; NaN stays NaN
    const float w = weight(k);
    return w == 0.f ? 0.f : w * log_weight(k);
  }
  MOE_DEVICE float entropy() const {
    float total = 0.f;
    for (int k = 0; k < experts; ++k) total -= times_log(k);
    const float most = logf(static_cast<float>(experts));
    return total < 0.f ? 0.f : total > most ? most : total;
  }
};

// What a pixel's raw outputs are made of, and everything the two kernels below have in common.
struct Head {
  Problem problem;
  Columns columns;
  const float* slots;
  Planes planes;
  const uint8_t* reached;  // as in SecondLayer, or null
  int tile_columns;
  float disagreement;      // exp(gap)

  struct Pixel {
    int frame;            // of the batch
    int row, column;      // of the image
    int64_t plane_pixel;  // in the planes
    int64_t tile;         // in `reached`
    int64_t pixel;        // in the image
  };

  MOE_DEVICE Pixel at(int frame, int row, int column) const {
    const int tile_row = row / kTile, tile_rows = (planes.rows + kTile - 1) / kTile;
    Pixel pixel = {planes.first_frame + frame, planes.first_row + row, column, planes.pixel(frame, row, column), 0, 0};
    pixel.tile = (static_cast<int64_t>(frame) * tile_rows + tile_row) * tile_columns + column / kTile;
    pixel.pixel = pixel.row * problem.width + column;
    return pixel;
  }

  MOE_DEVICE float raw(const Pixel& at, int owner, int output) const {
    const bool gate = owner == columns.experts;
    float sum = gate ? problem.gate_b2[output] : problem.expert_b2[owner * columns.outputs + output];
    const int parts = columns.parts(owner);
    for (int part = 0; part < parts; ++part)
      sum += slots[columns.slot(owner, part, output) * planes.size() + at.plane_pixel];
    return sum;
  }
  MOE_DEVICE float logit(const Pixel& at, int k) const {
    if (!problem.gate_w1) return 0.f;
    const float own = raw(at, columns.experts, k);
    return problem.gate_logits ? own + problem.gate_logits[expert_map(at, k)] : own;
  }
  MOE_DEVICE bool kept(const Pixel& at, int k) const { return !reached || reached[at.tile * columns.experts + k]; }

  // where a pixel's numbers lie in outputs and cotangents
  MOE_DEVICE int64_t map(const Pixel& at) const { return at.frame * (problem.height * problem.width) + at.pixel; }
  MOE_DEVICE int64_t prediction_map(const Pixel& at, int c) const {
    return (at.frame * predicted() + c) * (problem.height * problem.width) + at.pixel;
  }
  MOE_DEVICE int64_t expert_map(const Pixel& at, int k) const {
    return (at.frame * problem.experts + k) * (problem.height * problem.width) + at.pixel;
  }
  MOE_DEVICE int64_t hypothesis_map(const Pixel& at, int k, int c) const {
    return ((at.frame * problem.experts + k) * predicted() + c) * (problem.height * problem.width) + at.pixel;
  }
  MOE_DEVICE int64_t predicted() const {
    return problem.outputs - (problem.conf_activation == ConfActivation::none ? 0 : 1);
  }
};

// One pixel: its gate, its experts, and how they are decoded.
struct Mixture {
  struct Logit {
    const Head& head;
    const Head::Pixel& at;
    MOE_DEVICE float operator()(int k) const { return head.logit(at, k); }
  };
  struct Raw {
    const Head& head;
    const Head::Pixel& at;
    int k;
    MOE_DEVICE float operator()(int c) const { return head.raw(at, k, c); }
  };

  const Head& head;
  const Head::Pixel& at;
  Gate<Logit> gate;
  bool chosen;       // the decoded value is one expert's
  float kept_share;  // of the weights, by the experts that were computed

  MOE_DEVICE Mixture(const Head& head, const Head::Pixel& at)
      : head(head), at(at), gate(Logit{head, at}, head.columns.experts, head.problem.temperature) {
    const Mode mode = head.problem.gate_w1 ? head.problem.mode : Mode::mean;
    chosen = mode == Mode::argmax || (mode == Mode::switch_ && disagree());
    kept_share = 1.f;
    if (!head.reached) return;
    kept_share = 0.f;
    for (int k = 0; k < experts(); ++k)
      if (head.kept(at, k)) kept_share += decode(k);
  }

  MOE_DEVICE int experts() const { return head.columns.experts; }
  MOE_DEVICE Activated<Raw> activated(int k) const {
    return {head.problem.activation, static_cast<int>(head.predicted()), Raw{head, at, k}};
  }
  MOE_DEVICE float raw_confidence(int k) const { return head.raw(at, k, static_cast<int>(head.predicted())); }

  // The weight of expert k in the decoded value; a NaN gate must not look like a choice.
  MOE_DEVICE float decode(int k) const {
    const float w = gate.weight(k);
    return !chosen || w != w ? w : k == gate.best ? 1.f : 0.f;
  }
  // sum_k w_k v_k; what was not chosen may overflow unnoticed, and what was not computed is not read.
  template <class Value>
  MOE_DEVICE float decoded(Value value) const {
    float sum = 0.f;
    for (int k = 0; k < experts(); ++k) {
      if (!head.kept(at, k)) continue;
      const float w = decode(k);
      if (!chosen || w != 0.f) sum = fused(w, value(k), sum);
    }
    return head.reached ? sum / kept_share : sum;
  }

 private:
  // In any channel, among the experts that have a say; never beside NaN.
  MOE_DEVICE bool disagree() const {
    for (int c = 0; c < head.predicted(); ++c) {
      float largest = -INFINITY, smallest = INFINITY;
      bool nan = false;
      for (int k = 0; k < experts(); ++k) {
        if (!head.kept(at, k) || !(gate.weight(k) > kSwitchMinWeight)) continue;
        const float value = activated(k).value(c);
        nan = nan || value != value;
        largest = value > largest ? value : largest;
        smallest = value < smallest ? value : smallest;
      }
      if (!nan && largest > head.disagreement * smallest) return true;
    }
    return false;
  }
};

// The outputs, from the second layer's sums.
struct Mix {
  static constexpr int kThreads = 128;

  struct Params {
    Head head;
    Outputs outputs;
  };

  static Grid grid(const Params& p) {
    return {divide_up(p.head.problem.width, kThreads), p.head.planes.rows, p.head.planes.frames};
  }

  MOE_DEVICE static void run(const Params& p) {
    const Head& head = p.head;
    const int column = block_index().x * kThreads + thread_index();
    const Head::Pixel at = head.at(block_index().z, block_index().y, column);
    if (column >= head.problem.width || at.row >= head.problem.height) return;
    const Mixture mixture(head, at);
    for (int c = 0; c < head.predicted(); ++c)
      p.outputs.prediction[head.prediction_map(at, c)] =
          mixture.decoded([&](int k) { return mixture.activated(k).value(c); });
    const ConfActivation kind = head.problem.conf_activation;
    if (kind != ConfActivation::none)
      p.outputs.confidence[head.map(at)] =
          mixture.decoded([&](int k) { return confidence_of(kind, mixture.raw_confidence(k)); });
    p.outputs.entropy[head.map(at)] = mixture.gate.entropy();
    for (int k = 0; k < mixture.experts(); ++k) {
      if (p.outputs.weights) p.outputs.weights[head.expert_map(at, k)] = mixture.gate.weight(k);
      if (!p.outputs.hypotheses) continue;
      const auto activated = mixture.activated(k);
      for (int c = 0; c < head.predicted(); ++c)
        p.outputs.hypotheses[head.hypothesis_map(at, k, c)] = activated.value(c);
    }
  }
};

// Which experts a tile of kTile x kTile pixels needs: those whose weight reaches the threshold somewhere in it, or all
// where a logit is not finite. A block is a tile; a thread, a pixel.
struct Reach {
  static constexpr int kThreads = kTile * kTile;

  struct Params {
    Head head;
    float threshold;
    uint8_t* reached;  // [tiles][experts]
  };

  static Grid grid(const Params& p) {
    const int64_t rows = std::min<int64_t>(p.head.planes.rows, p.head.problem.height - p.head.planes.first_row);
    return {p.head.tile_columns, divide_up(rows, kTile), p.head.planes.frames};
  }

  MOE_DEVICE static void run(const Params& p) {
    const Head& head = p.head;
    auto* found = reinterpret_cast<uint8_t*>(shared_memory());  // [experts][warps]
    constexpr int kWarps = kThreads / kWarp;
    const int row = block_index().y * kTile + thread_index() / kTile;
    const int column = block_index().x * kTile + thread_index() % kTile;
    const int last_row = static_cast<int>(head.problem.height) - 1 - head.planes.first_row;
    const int last_column = static_cast<int>(head.problem.width) - 1;
    const bool inside = row <= last_row && column <= last_column;  // others repeat the edge, and have no say
    const Head::Pixel at =
        head.at(block_index().z, row < last_row ? row : last_row, column < last_column ? column : last_column);
    const Gate<Mixture::Logit> gate(Mixture::Logit{head, at}, head.columns.experts, head.problem.temperature);
    bool strange = false;
    for (int k = 0; k < head.columns.experts; ++k) strange = strange || (inside && !is_finite(head.logit(at, k)));
    for (int k = 0; k < head.columns.experts; ++k) {
      const bool here = any(inside && gate.weight(k) >= p.threshold);
      if (lane_index() == 0) found[k * kWarps + warp_index()] = here;
    }
    const bool strange_warp = any(strange);
    if (lane_index() == 0) found[head.columns.experts * kWarps + warp_index()] = strange_warp;
    sync_block();
    for (int k = thread_index(); k < head.columns.experts; k += kThreads) {
      bool wanted = false;
      for (int warp = 0; warp < kWarps; ++warp)
        wanted = wanted || found[k * kWarps + warp] || found[head.columns.experts * kWarps + warp];
      p.reached[at.tile * head.columns.experts + k] = wanted;
    }
  }

  static size_t shared_bytes(const Params& p) {
    return static_cast<size_t>(p.head.columns.experts + 1) * (kThreads / kWarp);
  }
};

// The gradient to every raw output, from the cotangents.
struct MixGradient {
  static constexpr int kThreads = 128;

  struct Params {
    Head head;
    Cotangents given;
    float* raw_gradients;      // planes of raw outputs (Columns::raw_output), 0 outside the image; then `experts` more
    float* gate_logits;        // or null
    int own_first, own_last;   // rows whose gradient to gate_logits this band writes
  };

  static Grid grid(const Params& p) {
    return {divide_up(p.head.planes.pitch, kThreads), p.head.planes.rows, p.head.planes.frames};
  }

  MOE_DEVICE static void run(const Params& p) {
    const Head& head = p.head;
    const Problem& problem = head.problem;
    const int column = block_index().x * kThreads + thread_index();
    if (column >= head.planes.pitch) return;
    const Head::Pixel at = head.at(block_index().z, block_index().y, column);
    const auto raw_gradient = [&](int owner, int output) -> float& {
      return p.raw_gradients[head.columns.raw_output(owner, output) * head.planes.size() + at.plane_pixel];
    };
    const int experts = head.columns.experts, predicted = static_cast<int>(head.predicted());
    if (at.row < 0 || at.row >= problem.height || column >= problem.width) {
      for (int i = 0; i < head.columns.raw_outputs(); ++i)
        p.raw_gradients[i * head.planes.size() + at.plane_pixel] = 0.f;
      return;
    }
    const Mixture mixture(head, at);
    const bool confident = problem.conf_activation != ConfActivation::none;
    const float given_confidence = confident && p.given.confidence ? p.given.confidence[head.map(at)] : 0.f;
    const auto given_prediction = [&](int c) {
      return p.given.prediction ? p.given.prediction[head.prediction_map(at, c)] : 0.f;
    };
    for (int k = 0; k < experts; ++k) {
      const auto activated = mixture.activated(k);
      const float decode = mixture.decode(k);
      const auto grad = [&](int c) {
        const float own = p.given.hypotheses ? p.given.hypotheses[head.hypothesis_map(at, k, c)] : 0.f;
        return decode * given_prediction(c) + own;
      };
      bool nothing = true;  // no gradient in, none out: what overflows unheard must not turn 0 into NaN
      for (int c = 0; c < predicted; ++c) nothing = nothing && grad(c) == 0.f;
      const float along = nothing ? 0.f : activated.common(grad);
      float of_decode = 0.f;
      for (int c = 0; c < predicted; ++c) {
        raw_gradient(k, c) = nothing ? 0.f : activated.gradient(c, grad, along);
        if (!mixture.chosen) of_decode = fused(activated.value(c), given_prediction(c), of_decode);
      }
      if (confident) {
        const float z = mixture.raw_confidence(k), g = decode * given_confidence;
        raw_gradient(k, predicted) = g == 0.f ? 0.f : confidence_gradient(problem.conf_activation, z, g);
        if (!mixture.chosen) of_decode = fused(confidence_of(problem.conf_activation, z), given_confidence, of_decode);
      }
      if (!problem.gate_w1) continue;
      // the choice has no slope: there the gate learns from entropy and weights alone
      const float own = p.given.weights ? p.given.weights[head.expert_map(at, k)] : 0.f;
      p.raw_gradients[(head.columns.raw_outputs() + k) * head.planes.size() + at.plane_pixel] = of_decode + own;
    }
    if (problem.gate_w1) gate_gradients(p, at, mixture, raw_gradient);
  }

 private:
  // Through softmax and entropy, once the gradients to all weights are there. Pairs of them are subtracted before they
  // are summed: more accurate where they are nearly equal.
  template <class RawGradient>
  MOE_DEVICE static void gate_gradients(const Params& p, const Head::Pixel& at, const Mixture& mixture,
                                        RawGradient raw_gradient) {
    const Head& head = p.head;
    const int experts = head.columns.experts;
    const float entropy = mixture.gate.entropy();
    const float given_entropy = p.given.entropy ? p.given.entropy[head.map(at)] : 0.f;
    const bool own = p.gate_logits && at.row >= p.own_first && at.row < p.own_last;
    const auto of_weight = [&](int k) {
      return p.raw_gradients[(head.columns.raw_outputs() + k) * head.planes.size() + at.plane_pixel];
    };
    for (int k = 0; k < experts; ++k) {
      const float w = mixture.gate.weight(k);
      float sum = 0.f;
      for (int j = 0; j < experts; ++j) sum = fused(mixture.gate.weight(j), of_weight(k) - of_weight(j), sum);
      const float slope = mixture.gate.times_log(k) + w * entropy;  // -dH/ds_k, finite where w underflows
      const float gradient = (w * sum - slope * given_entropy) / mixture.gate.temperature;
      raw_gradient(experts, k) = gradient;
      if (own) p.gate_logits[head.expert_map(at, k)] = gradient;
    }
  }
};

}  // namespace moe::cuda

// The forward pass: bands of output rows, one thread each, in chunks of a few rows: gate, experts, mixture.
#include <algorithm>
#include <memory>
#include <vector>

#include "hidden.h"
#include "parallel.h"
#include "select.h"

namespace moe::cpu {
namespace {

constexpr int64_t kChunk = 16;  // output rows; with kTileWidth the fixed grid on which experts are skipped

struct Band {
  int64_t frame;
  Span rows;
};

// Splitting a frame costs about 2.6 low-resolution rows a band, which neighbours compute twice; not splitting it may
// leave threads idle. Counted in low-resolution rows of the busiest thread.
int64_t bands_per_frame(const Problem& p) {
  constexpr double kOverlap = 2.6;
  int64_t best = 1;
  double least = 0;
  for (int64_t bands = 1; bands <= std::min<int64_t>(p.threads, p.height); ++bands) {
    const double rounds = static_cast<double>(divide_up(p.batch * bands, p.threads));
    const double cost = rounds * (static_cast<double>(p.in_height) / static_cast<double>(bands) + kOverlap);
    if (bands == 1 || cost < least) {
      best = bands;
      least = cost;
    }
  }
  return best;
}

std::vector<Band> split_into_bands(const Problem& p, bool on_skip_grid) {
  const int64_t unit = on_skip_grid ? kChunk : 1, units = divide_up(p.height, unit), count = bands_per_frame(p);
  std::vector<Band> bands;
  for (int64_t frame = 0; frame < p.batch; ++frame)
    for (int64_t i = 0; i < count; ++i) {
      const Span rows = {units * i / count * unit, std::min(units * (i + 1) / count * unit, p.height)};
      if (rows.size() > 0) bands.push_back({frame, rows});
    }
  return bands;
}

class Forward {
 public:
  Forward(const PackedHead& head, const RowPlan& rows, const ColumnPlan& columns, const Outputs& outputs)
      : head_(head),
        p_(head.problem),
        outputs_(outputs),
        hidden_rows_(head, rows, columns, kChunk),
        hidden_(kTileWidth * kGroup),
        scratch_(mix_scratch_floats(p_)) {
    for (int64_t branch = 0; branch <= p_.experts; ++branch)
      z_.emplace_back(kChunk * p_.width * head.padded_outputs(branch));
    kept_.assign(p_.experts * hidden_rows_.tiles(), 1);
    wanted_.assign(hidden_rows_.tiles(), 1);
  }

  void run(const Band& band) {
    for (int64_t Y = band.rows.begin; Y < band.rows.end; Y += kChunk)
      run_chunk(band.frame, {Y, std::min(Y + kChunk, band.rows.end)});
  }

  static bool skips(const Problem& p) { return p.skip_below > 0 && p.has_gate() && p.experts > 1; }

 private:
  void run_chunk(int64_t frame, Span rows) {
    frame_ = frame;
    rows_ = rows;
    hidden_rows_.begin_chunk(frame, rows);
    if (p_.has_gate()) run_branch(p_.experts, nullptr);
    if (skips(p_)) find_kept();
    for (int64_t k = 0; k < p_.experts; ++k) {
      for (int64_t t = 0; t < hidden_rows_.tiles(); ++t) wanted_[t] = kept_[t * p_.experts + k];
      run_branch(k, wanted_.data());
    }
    for_each_block([&](int64_t t, MixBlock& block, int64_t pixel) {
      if (skips(p_)) block.kept = kept_.data() + t * p_.experts;
      head_.kernels.mix(p_, block, outputs_at(pixel));
    });
  }

  // z of one branch in the chunk's wanted tiles.
  void run_branch(int64_t branch, const uint8_t* wanted) {
    const Span groups = head_.branch_groups(branch);
    const int64_t padded = head_.padded_outputs(branch);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      hidden_rows_.begin_group(g);
      const float* start = head_.group(g).first_of_branch ? head_.b2(branch) : nullptr;
      for (int64_t Y = rows_.begin; Y < rows_.end; ++Y) {
        hidden_rows_.prepare(g, Y, wanted);
        for (int64_t t = 0; t < hidden_rows_.tiles(); ++t) {
          if (wanted && !wanted[t]) continue;
          const Span columns = hidden_rows_.tile(t);
          hidden_rows_.read(g, Y, t, hidden_.data());
          head_.kernels.second_layer(hidden_.data(), columns.size(), head_.w2(g), padded, start,
                                     z_[branch] + ((Y - rows_.begin) * p_.width + columns.begin) * padded, padded);
        }
      }
    }
  }

  // An expert is left out of a tile where its weight stays below skip_below, unless it is the most probable somewhere.
  void find_kept() {
    std::fill(kept_.begin(), kept_.end(), uint8_t{0});
    for_each_block([&](int64_t t, MixBlock& block, int64_t) {
      head_.kernels.find_kept(p_, block, kept_.data() + t * p_.experts);
    });
  }

  template <typename Function>
  void for_each_block(Function function) {
    const int64_t padded = head_.padded_outputs(0), gate_padded = head_.padded_outputs(p_.experts);
    for (int64_t Y = rows_.begin; Y < rows_.end; ++Y)
      for (int64_t t = 0; t < hidden_rows_.tiles(); ++t) {
        const Span columns = hidden_rows_.tile(t);
        const int64_t here = (Y - rows_.begin) * p_.width + columns.begin, pixel = Y * p_.width + columns.begin;
        MixBlock block = {};
        block.count = columns.size();
        for (int64_t k = 0; k < p_.experts; ++k) z_at_[k] = z_[k] + here * padded;
        block.z = z_at_.data();
        block.z_pixel = padded;
        block.gate = p_.has_gate() ? z_[p_.experts] + here * gate_padded : nullptr;
        block.gate_pixel = gate_padded;
        block.gate_logits = p_.gate_logits ? p_.gate_logits + frame_ * p_.experts * p_.pixels() + pixel : nullptr;
        block.plane = p_.pixels();
        block.scratch = scratch_.data();
        function(t, block, pixel);
      }
  }

  Outputs outputs_at(int64_t pixel) const {
    const int64_t channels = p_.prediction_channels(), plane = p_.pixels();
    const auto at = [&](float* map, int64_t planes) { return map ? map + frame_ * planes * plane + pixel : nullptr; };
    return {at(outputs_.prediction, channels), at(outputs_.confidence, 1), at(outputs_.entropy, 1),
            at(outputs_.weights, p_.experts), at(outputs_.hypotheses, p_.experts * channels)};
  }

  const PackedHead& head_;
  const Problem& p_;
  const Outputs& outputs_;
  HiddenRows hidden_rows_;
  Buffer hidden_, scratch_;
  std::vector<Buffer> z_;              // per branch: [chunk row][X][padded outputs]
  std::vector<const float*> z_at_ = std::vector<const float*>(p_.experts);
  std::vector<uint8_t> kept_, wanted_;  // [tile][expert]; [tile]
  int64_t frame_ = 0;
  Span rows_ = {0, 0};
};

void run(const Problem& p, const Kernels& kernels, const Outputs& outputs) {
  const PackedHead head(p, kernels, p.bf16);
  const RowPlan rows(p.in_height, p.height);
  const ColumnPlan columns(p.in_width, p.width, round_up(p.in_width, kernels.block_rows));
  const std::vector<Band> bands = split_into_bands(p, Forward::skips(p));
  const auto count = static_cast<int64_t>(bands.size());
  std::vector<std::unique_ptr<Forward>> workers;  // made here: an exception must not leave a thread of the team
  for (int64_t slot = 0; slot < std::min<int64_t>(p.threads, count); ++slot)
    workers.push_back(std::make_unique<Forward>(head, rows, columns, outputs));
  parallel_for(count, p.threads, [&](int64_t i, int slot) { workers[slot]->run(bands[i]); });
}

}  // namespace

Status forward(const Problem& problem, const Outputs& outputs) {
  const Selected selected = select_kernels(problem.isa);
  if (selected.status != Status::ok) return selected.status;
  if (problem.bf16 && !(selected.kernels->gemm_bf16 && has_bf16_products())) return Status::isa_not_supported;
  try {
    run(problem, *selected.kernels, outputs);
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
  return Status::ok;
}

}  // namespace moe::cpu

// The forward pass: by tiles (tiles.h), or at low resolution (hidden.h): there in bands of output rows, one thread each, in
// chunks of a few rows: gate, experts, mixture. Where tiles or bf16x3 meet a number that is not finite, float32 products
// at low resolution do the band again.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "hidden.h"
#include "parallel.h"
#include "select.h"
#include "tiles.h"

namespace moe::cpu {
namespace {

constexpr int64_t kChunk = 8;  // output rows; with kTileWidth the fixed grid on which experts are skipped

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

// The low-resolution formulation.
class RowWorker {
 public:
  RowWorker(const PackedHead& head, const RowPlan& rows, const ColumnPlan& columns, const Outputs& outputs)
      : head_(head),
        p_(head.problem),
        hidden_rows_(head, rows, columns, kChunk),
        mixture_(head, outputs, kChunk * p_.width),
        hidden_(kTileWidth * kGroup),
        kept_(p_.experts * hidden_rows_.tiles(), 1),
        wanted_(hidden_rows_.tiles(), 1),
        sum_(kGroup) {}

  // Whether everything is finite; looked at in bf16x3 alone.
  bool run(const Band& band) {
    std::fill(sum_.data(), sum_ + kGroup, 0.f);
    for (int64_t Y = band.rows.begin; Y < band.rows.end; Y += kChunk)
      run_chunk(band.frame, {Y, std::min(Y + kChunk, band.rows.end)});
    return std::all_of(sum_.data(), sum_ + kGroup, [](float value) { return std::isfinite(value); });
  }

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
    for_each_run([&](const Mixture::Run& run, uint8_t* kept) { mixture_.mix(run, kept); });
  }

  // z of one branch in the chunk's wanted tiles.
  void run_branch(int64_t branch, const uint8_t* wanted) {
    const Span groups = head_.branch_groups(branch);
    const int64_t padded = head_.padded_outputs(branch);
    float* sum = head_.layout.numbers() == Numbers::bf16x3 ? sum_.data() : nullptr;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      hidden_rows_.begin_group(g);
      const float* start = head_.group(g).first_of_branch ? head_.b2(branch) : nullptr;
      for (int64_t Y = rows_.begin; Y < rows_.end; ++Y) {
        hidden_rows_.prepare(g, Y, wanted);
        for (int64_t t = 0; t < hidden_rows_.tiles(); ++t) {
          if (wanted && !wanted[t]) continue;
          const Span columns = hidden_rows_.tile(t);
          hidden_rows_.read(g, Y, t, hidden_.data(), sum);
          head_.kernels.second_layer(hidden_.data(), columns.size(), head_.w2(g), padded, start,
                                     mixture_.z(branch, place(Y, columns.begin)), padded);
        }
      }
    }
  }

  // An expert is left out of a tile where its weight stays below skip_below, unless it is the most probable somewhere.
  void find_kept() {
    std::fill(kept_.begin(), kept_.end(), uint8_t{0});
    for_each_run([&](const Mixture::Run& run, uint8_t* kept) { mixture_.find_kept(run, kept); });
  }

  int64_t place(int64_t Y, int64_t X) const { return (Y - rows_.begin) * p_.width + X; }

  // function(one tile's pixels of a row, what is kept in that tile)
  template <typename Function>
  void for_each_run(Function function) {
    for (int64_t Y = rows_.begin; Y < rows_.end; ++Y)
      for (int64_t t = 0; t < hidden_rows_.tiles(); ++t) {
        const Span columns = hidden_rows_.tile(t);
        function({frame_, Y * p_.width + columns.begin, place(Y, columns.begin), columns.size()},
                 kept_.data() + t * p_.experts);
      }
  }

  const PackedHead& head_;
  const Problem& p_;
  HiddenRows hidden_rows_;
  Mixture mixture_;
  Buffer hidden_;
  std::vector<uint8_t> kept_, wanted_;  // [tile][expert]; [tile]
  Buffer sum_;  // [kGroup]: finite only if everything before the relu is
  int64_t frame_ = 0;
  Span rows_ = {0, 0};
};

// Returns the bands in which bf16x3 met something that is not finite.
std::vector<Band> forward_by_rows(const PackedHead& head, const std::vector<Band>& bands, const Outputs& outputs) {
  const Problem& p = head.problem;
  const RowPlan rows(p.in_height, p.height);
  const ColumnPlan columns(p.in_width, p.width, round_up(p.in_width, head.block_rows()));
  const auto count = static_cast<int64_t>(bands.size());
  std::vector<std::unique_ptr<RowWorker>> workers;  // made here: an exception must not leave a thread of the team
  for (int64_t slot = 0; slot < std::min<int64_t>(p.threads, count); ++slot)
    workers.push_back(std::make_unique<RowWorker>(head, rows, columns, outputs));
  std::vector<uint8_t> finite(count);
  parallel_for(count, p.threads, [&](int64_t i, int slot) { finite[i] = workers[slot]->run(bands[i]); });
  std::vector<Band> bad;
  for (int64_t i = 0; i < count; ++i)
    if (!finite[i]) bad.push_back(bands[i]);
  return bad;
}

// Of the formulation at low resolution.
Numbers numbers(const Problem& p, Formulation formulation) {
  return formulation == Formulation::bf16x3 ? Numbers::bf16x3 : p.bf16 ? Numbers::bf16 : Numbers::float32;
}

// Calls function(the head as the formulation packs it).
template <typename Function>
auto with_head(const Problem& p, const Kernels& kernels, Function function) {
  const Formulation formulation = chosen_formulation(p, &kernels);
  if (formulation == Formulation::winograd) return function(TileHead(p, kernels));
  return function(PackedHead(p, kernels, numbers(p, formulation)));
}

std::vector<Band> forward_by(const TileHead& head, const Outputs& outputs) { return forward_by_tiles(head, outputs); }
std::vector<Band> forward_by(const PackedHead& head, const Outputs& outputs) {
  return forward_by_rows(head, split_into_bands(head.problem, skips(head.problem)), outputs);
}

void run(const Problem& p, const Kernels& kernels, const Outputs& outputs) {
  const std::vector<Band> left = with_head(p, kernels, [&](auto head) {
    head.use(p.packed);
    return forward_by(head, outputs);
  });
  if (left.empty()) return;
  PackedHead head(p, kernels, Numbers::float32);
  head.use(nullptr);
  forward_by_rows(head, left, outputs);
}

// Runs function(kernels) if they have the products that the problem asks for.
template <typename Function>
Status with_products(const Problem& p, Function function) {
  Status status = Status::ok;
  const Status ran = with_kernels(p.isa, [&](const Kernels& kernels) {
    if (p.bf16 && !kernels.bf16.gemm)
      status = Status::isa_not_supported;
    else
      function(kernels);
  });
  return ran == Status::ok ? status : ran;
}

}  // namespace

Status forward(const Problem& problem, const Outputs& outputs) {
  return with_products(problem, [&](const Kernels& kernels) { run(problem, kernels, outputs); });
}

Formulation formulation(const Problem& problem) {
  return chosen_formulation(problem, select_kernels(problem.isa).kernels);
}

Status packed_floats(const Problem& problem, int64_t& out) {
  return with_products(problem, [&](const Kernels& kernels) {
    out = with_head(problem, kernels, [](const auto& head) { return head.packed_floats(); });
  });
}

Status pack(const Problem& problem, float* out) {
  return with_products(problem, [&](const Kernels& kernels) {
    with_head(problem, kernels, [&](const auto& head) { head.pack(out); });
  });
}

}  // namespace moe::cpu

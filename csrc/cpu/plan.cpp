#include "plan.h"

#include <algorithm>
#include <cmath>

namespace moe::cpu {

Position position_of(int64_t index, int64_t source, int64_t target) {
  if (source == target) return {index, 1.0, 0.0};
  if (target == 1) return {0, 1.0, 0.0};
  const int64_t scaled = index * (source - 1), steps = target - 1;
  const double high_weight = static_cast<double>(scaled % steps) / static_cast<double>(steps);
  return {scaled / steps, 1.0 - high_weight, high_weight};
}

RowPlan::RowPlan(int64_t source, int64_t target) : terms_(target) {
  const auto rank_of = [&](int64_t row) {  // rows are met in increasing order, each at most one rank back
    if (sources_.empty() || row > sources_.back()) sources_.push_back(row);
    auto at = sources_.end() - 1;
    while (*at > row) --at;
    return static_cast<int64_t>(at - sources_.begin());
  };
  for (int64_t row = 0; row < target; ++row) {
    const Position at = position_of(row, source, target);
    const int64_t low = rank_of(at.low), high = at.has_high() ? rank_of(at.low + 1) : low;
    for (int dy = 0; dy < 3; ++dy) {
      const int64_t Y = row - (dy - 1);
      if (Y < 0 || Y >= target) continue;
      Terms& terms = terms_[Y];
      terms.term[terms.count++] = {low, dy, static_cast<float>(at.low_weight)};
      if (at.has_high()) terms.term[terms.count++] = {high, dy, static_cast<float>(at.high_weight)};
    }
  }
}

Span RowPlan::ranks(Span rows) const {
  const Terms &first = terms_[rows.begin], &last = terms_[rows.end - 1];
  return {first.term[0].rank, last.term[last.count - 1].rank + 1};
}

Span RowPlan::readers(Span ranks) const {
  const auto height = static_cast<int64_t>(terms_.size());
  Span rows = {0, height};
  while (this->ranks({rows.begin, rows.begin + 1}).end <= ranks.begin) ++rows.begin;
  while (this->ranks({rows.end - 1, rows.end}).begin >= ranks.end) --rows.end;
  return rows;
}

int64_t RowPlan::max_ranks(int64_t row_count) const {
  const auto height = static_cast<int64_t>(terms_.size());
  int64_t most = 0;
  for (int64_t begin = 0; begin < height; ++begin)
    most = std::max(most, ranks({begin, std::min(begin + row_count, height)}).size());
  return most;
}

ColumnPlan::ColumnPlan(int64_t source, int64_t target, int64_t zero_column) : blends_(target), columns_(target) {
  for (int64_t X = 0; X < target; ++X) {
    ColumnBlend& blend = blends_[X];
    Span& columns = columns_[X] = {source, 0};
    for (int dx = 0; dx < 3; ++dx) {
      const int64_t column = X + dx - 1;
      const bool inside = column >= 0 && column < target;
      const Position at = inside ? position_of(column, source, target) : Position{zero_column, 0, 0};
      blend.offset[2 * dx] = at.low * kColumn + dx * kGroup;
      blend.weight[2 * dx] = static_cast<float>(at.low_weight);
      blend.offset[2 * dx + 1] = (at.has_high() ? at.low + 1 : zero_column) * kColumn + dx * kGroup;
      blend.weight[2 * dx + 1] = static_cast<float>(at.high_weight);
      if (!inside) continue;
      columns.begin = std::min(columns.begin, at.low);
      columns.end = std::max(columns.end, at.low + (at.has_high() ? 2 : 1));
    }
  }
}

HeadTransforms::HeadTransforms() : input{}, weights{} {
  constexpr int kFinite = kHeadPatch - 1;
  const auto times_all_but = [](int left_out, double* polynomial) {  // the product of (x - point), constant term first
    polynomial[0] = 1;
    for (int q = 0, degree = 0; q < kFinite; ++q) {
      if (q == left_out) continue;
      ++degree;
      for (int k = degree; k >= 0; --k)
        polynomial[k] = (k > 0 ? polynomial[k - 1] : 0) - (k < degree ? kHeadPoints[q] * polynomial[k] : 0);
    }
  };
  for (int i = 0; i < kFinite; ++i) {
    double scale = 1;
    for (int q = 0; q < kFinite; ++q) scale *= q == i ? 1 : kHeadPoints[i] - kHeadPoints[q];
    for (int tap = 0; tap < 3; ++tap) weights[i][tap] = std::pow(kHeadPoints[i], tap) / scale;
    times_all_but(i, input[i]);
  }
  weights[kFinite][2] = 1;
  times_all_but(kFinite, input[kFinite]);
}

const HeadTransforms& head_transforms() {
  static const HeadTransforms transforms;
  return transforms;
}

PatchPlan::PatchPlan(int64_t source, int64_t target) : target_(target), patches_(divide_up(target, kHeadTile)) {
  const auto& matrix = head_transforms().input;
  for (int64_t t = 0; t < count(); ++t) {
    const int64_t first = t * kHeadTile - 1;
    const Span pixels = {std::max<int64_t>(first, 0), std::min(first + kHeadPatch, target)};
    const Position last = position_of(pixels.end - 1, source, target);
    Patch& patch = patches_[t];
    patch.sources = {position_of(pixels.begin, source, target).low, last.low + (last.has_high() ? 2 : 1)};
    double weights[kMaxPatchSources][kHeadPatch] = {};
    for (int i = 0; i < kHeadPatch; ++i) {
      double inside = 0;
      for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
        const Position at = position_of(pixel, source, target);
        const double factor = matrix[i][pixel - first];
        weights[at.low - patch.sources.begin][i] += factor * at.low_weight;
        if (at.has_high()) weights[at.low + 1 - patch.sources.begin][i] += factor * at.high_weight;
        inside += factor;
      }
      patch.inside[i] = static_cast<float>(inside);
    }
    for (int64_t s = 0; s < patch.sources.size(); ++s)
      for (int i = 0; i < kHeadPatch; ++i) patch.weights[s * kHeadPatch + i] = static_cast<float>(weights[s][i]);
  }
}

void PatchPlan::transform(int64_t tile, const float* values, int64_t channels, float* out, int64_t out_stride) const {
  const auto& matrix = head_transforms().input;
  const int64_t first = tile * kHeadTile - 1;
  for (int i = 0; i < kHeadPatch; ++i)
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t pixel = std::max<int64_t>(first, 0); pixel < std::min(first + kHeadPatch, target_); ++pixel)
        sum += matrix[i][pixel - first] * values[pixel * channels + c];
      out[i * out_stride + c] = static_cast<float>(sum);
    }
}

namespace {

// The mean square of what float32 positions are off by, in pixels: PyTorch's are a scale times an index.
double position_error(int64_t source, int64_t target) {
  const float scale = target > 1 ? static_cast<float>(source - 1) / static_cast<float>(target - 1) : 0.f;
  double sum = 0;
  for (int64_t i = 0; i < target; ++i) {
    const Position exact = position_of(i, source, target);
    const double off = scale * static_cast<float>(i) - (static_cast<double>(exact.low) + exact.high_weight);
    sum += off * off;
  }
  return sum / static_cast<double>(target);
}

// In multiply-adds of a float32 matrix product; what is not one counts for as many as take its time.
double cost_by_rows(const Problem& p, double hidden, double of_product) {
  const auto in_pixels = static_cast<double>(p.in_height * p.in_width);
  const auto blends = static_cast<double>(p.in_height * p.width * 3 * kBlend + p.height * p.width * kBlend);
  return hidden * (in_pixels * kTaps * static_cast<double>(p.channels) * of_product + 4 * blends);
}

double cost_by_tiles(const Problem& p, double hidden) {
  const auto tiles = static_cast<double>(divide_up(p.height, kHeadTile) * divide_up(p.width, kHeadTile));
  const auto channels = static_cast<double>(p.channels);
  return tiles * (1.1 * kPlaces * hidden * channels + 1100 * channels + 400 * hidden);
}

}  // namespace

double interpolation_error(const Problem& p) {
  return std::sqrt(position_error(p.in_height, p.height) + position_error(p.in_width, p.width));
}

Formulation chosen_formulation(const Problem& p, const Kernels* kernels) {
  const bool fits_tiles = p.in_height <= p.height && p.in_width <= p.width;
  const bool has_x3 = kernels && kernels->bf16.gemm_x3;
  if (p.bf16) return Formulation::low_resolution;
  if (p.formulation == Formulation::winograd && fits_tiles) return p.formulation;
  if (p.formulation == Formulation::bf16x3 && has_x3) return p.formulation;
  if (p.formulation != Formulation::automatic) return Formulation::low_resolution;

  const double room = interpolation_error(p);
  const auto hidden = static_cast<double>(p.experts * p.expert_hidden + p.gate_hidden);
  Formulation best = Formulation::low_resolution;
  double least = cost_by_rows(p, hidden, 1);
  const auto consider = [&](Formulation other, double cost) {
    if (cost < least) best = other, least = cost;
  };
  if (has_x3 && room >= kRoughError) consider(Formulation::bf16x3, cost_by_rows(p, hidden, kernels->bf16.x3_cost));
  if (fits_tiles && room >= kTileError) consider(Formulation::winograd, cost_by_tiles(p, hidden));
  return best;
}

}  // namespace moe::cpu

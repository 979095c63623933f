#include "plan.h"

#include <algorithm>

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

}  // namespace moe::cpu

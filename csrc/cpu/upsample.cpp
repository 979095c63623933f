// Bilinear upsampling with aligned corners, alone and before a 3x3 convolution.
#include <algorithm>
#include <memory>
#include <vector>

#include "../decoder.h"
#include "hidden.h"
#include "parallel.h"
#include "select.h"

namespace moe::cpu {
namespace {

constexpr int64_t kChunk = 16;  // output rows whose low-resolution rows are packed together

// The layer as the first layer of one expert: HiddenRows asks for no more.
Problem as_problem(const UpsampledLayer& layer, const float* zeros) {
  Problem p = {};
  p.batch = layer.batch, p.channels = layer.in_channels, p.in_height = layer.height, p.in_width = layer.width;
  p.height = layer.out_height, p.width = layer.out_width;
  p.experts = 1, p.expert_hidden = layer.out_channels, p.outputs = 1;
  p.x = layer.x;
  const int64_t row = layer.width * layer.in_channels;
  p.x_strides[0] = layer.height * row, p.x_strides[1] = 1, p.x_strides[2] = row, p.x_strides[3] = layer.in_channels;
  p.expert_w1 = layer.weights, p.expert_b1 = p.expert_w2 = p.expert_b2 = zeros;
  p.isa = layer.isa, p.threads = layer.threads;
  return p;
}

class UpsampledRows {
 public:
  UpsampledRows(const UpsampledLayer& layer, const PackedHead& head, const RowPlan& rows, const ColumnPlan& columns)
      : p_(layer), rows_(head, rows, columns, kChunk), out_(kTileWidth * kGroup), groups_(head.groups()) {}

  void run(int64_t frame, Span rows) {
    rows_.begin_chunk(frame, rows);
    for (int64_t g = 0; g < groups_; ++g)
      for (int64_t Y = rows.begin; Y < rows.end; ++Y) {
        rows_.prepare(g, Y, nullptr);
        for (int kind = 0; kind < kEdgeKinds; ++kind)
          std::memcpy(bias_ + kind * kGroup,
                      p_.bias + (edge_kind(Y, p_.out_height) * kEdgeKinds + kind) * p_.out_channels + g * kGroup,
                      sizeof(float) * kGroup);
        for (int64_t t = 0; t < rows_.tiles(); ++t) {
          const Span columns = rows_.tile(t);
          rows_.read_linear(g, Y, t, bias_, out_.data());
          float* y = p_.y + ((frame * p_.out_height + Y) * p_.out_width + columns.begin) * p_.out_channels + g * kGroup;
          for (int64_t X = 0; X < columns.size(); ++X)
            std::memcpy(y + X * p_.out_channels, out_ + X * kGroup, sizeof(float) * kGroup);
        }
      }
  }

 private:
  const UpsampledLayer& p_;
  HiddenRows rows_;
  Buffer out_;
  alignas(64) float bias_[kEdgeKinds * kGroup];
  int64_t groups_;
};

void run(const UpsampledLayer& layer, const Kernels& kernels) {
  const Buffer no_weights = zeros(layer.out_channels);
  const Problem problem = as_problem(layer, no_weights.data());
  PackedHead head(problem, kernels, Numbers::float32);
  head.use(nullptr);
  const RowPlan rows(problem.in_height, problem.height);
  const ColumnPlan columns(problem.in_width, problem.width, round_up(problem.in_width, kernels.block_rows));
  const int64_t bands = std::min<int64_t>(layer.threads, layer.out_height), count = layer.batch * bands;
  std::vector<std::unique_ptr<UpsampledRows>> workers;
  for (int64_t slot = 0; slot < std::min<int64_t>(layer.threads, count); ++slot)
    workers.push_back(std::make_unique<UpsampledRows>(layer, head, rows, columns));
  parallel_for(count, layer.threads, [&](int64_t i, int slot) {
    const int64_t begin = i % bands * layer.out_height / bands, end = (i % bands + 1) * layer.out_height / bands;
    for (int64_t Y = begin; Y < end; Y += kChunk) workers[slot]->run(i / bands, {Y, std::min(Y + kChunk, end)});
  });
}

void run(const Upsampling& layer, const Kernels& kernels) {
  const int64_t channels = layer.in_channels, row_floats = layer.width * channels;
  parallel_for(layer.batch * layer.out_height, layer.threads, [&](int64_t i, int) {
    const Position row = position_of(i % layer.out_height, layer.height, layer.out_height);
    const float* top = layer.x + (i / layer.out_height * layer.height + row.low) * row_floats;
    const float* bottom = row.has_high() ? top + row_floats : top;
    for (int64_t X = 0; X < layer.out_width; ++X) {
      const Position column = position_of(X, layer.width, layer.out_width);
      const int64_t left = column.low * channels, right = left + (column.has_high() ? channels : 0);
      const float* corners[4] = {top + left, top + right, bottom + left, bottom + right};
      const float weights[4] = {static_cast<float>(row.low_weight * column.low_weight),
                                static_cast<float>(row.low_weight * column.high_weight),
                                static_cast<float>(row.high_weight * column.low_weight),
                                static_cast<float>(row.high_weight * column.high_weight)};
      kernels.blend_corners(corners, weights, channels, layer.y + (i * layer.out_width + X) * channels);
    }
  });
}

}  // namespace

Status upsampled(const UpsampledLayer& layer) {
  return with_kernels(layer.isa, [&](const Kernels& kernels) { run(layer, kernels); });
}

Status upsample(const Upsampling& layer) {
  return with_kernels(layer.isa, [&](const Kernels& kernels) { run(layer, kernels); });
}

}  // namespace moe::cpu

// The two passes over a batch: which kernels run on which band, in which pieces of the workspace.
#pragma once

#include "epilogues.h"
#include "features.h"
#include "gradients.h"
#include "mixture.h"

namespace moe::cuda {

// What a band may take of the workspace, beside what does not depend on the image. One frame of VGGT's in bfloat16 is
// one band of the forward pass. An image so wide that one row of tiles needs more gets that row.
struct BandBytes {
  static inline int64_t forward = 96 << 20, backward = 128 << 20;  // variables, because tests want small bands
};

#define MOE_TRY(call)                                                  \
  do {                                                                 \
    if (const Status status = (call); status != Status::ok) return status; \
  } while (false)

template <class Kernel>
Status launch(const typename Kernel::Params& params, void* stream) {
  return launch<Kernel>(params, Kernel::grid(params), 0, stream);
}

// Kernels that no arithmetic enters are compiled once, with head.h.
#define MOE_COMMON_KERNELS(prefix)                                                       \
  prefix template Status launch<PackColumns>(const PackColumns::Params&, void*);         \
  prefix template Status launch<Downsample>(const Downsample::Params&, void*);           \
  prefix template Status launch<Mix>(const Mix::Params&, void*);                         \
  prefix template Status launch<Reach>(const Reach::Params&, Grid, size_t, void*);       \
  prefix template Status launch<MixGradient>(const MixGradient::Params&, void*);         \
  prefix template Status launch<RowSums>(const RowSums::Params&, void*);                 \
  prefix template Status launch<CollectWeights>(const CollectWeights::Params&, void*);   \
  prefix template Status launch<CollectColumns>(const CollectColumns::Params&, void*);   \
  prefix template Status launch<CollectBiases>(const CollectBiases::Params&, void*);
MOE_COMMON_KERNELS(extern)

template <class Arithmetic, int kWidth, class Epilogue>
Status convolve_groups(const Operand<Arithmetic>* input, const Band& band, const Operand<Arithmetic>* weights,
                       int columns, Section section, const Epilogue& epilogue, int rows, int width, void* stream) {
  using Kernel = Convolution<Arithmetic, kWidth, Epilogue>;
  const typename Kernel::Params params = {input, weights, band, columns, section, epilogue};
  return launch<Kernel>(params, Kernel::grid(params, rows, width), Kernel::kSharedBytes, stream);
}

// `rows` x `width` pixels of every frame of a band, for the columns of a section.
template <class Arithmetic, class Epilogue>
Status convolve(const Operand<Arithmetic>* input, const Band& band, const Operand<Arithmetic>* weights, int columns,
                Section section, const Epilogue& epilogue, int rows, int width, void* stream) {
  if (section.columns == 0) return Status::ok;
  const auto run = section.width == kWide ? convolve_groups<Arithmetic, kWide, Epilogue>
                                          : convolve_groups<Arithmetic, kNarrow, Epilogue>;
  return run(input, band, weights, columns, section, epilogue, rows, width, stream);
}

inline bool reads_chunks(const Problem& p) {
  const int64_t size = p.x_element == Element::float32 ? 4 : 2, count = 16 / size;
  bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_strides[1] == 1 && p.channels % 8 == 0;
  for (int i : {0, 2, 3}) aligned = aligned && p.x_strides[i] % count == 0;
  return aligned;
}

inline float disagreement(const Problem& p) { return std::min(std::exp(p.gap), FLT_MAX); }

// Parameters as the kernels read them.
template <class Arithmetic>
struct Packed {
  Columns columns;
  int channels;  // of the input, padded
  Operand<Arithmetic>* w1;
  float *b1, *w2;

  Packed(const Problem& p, const Columns& columns, Arena& arena)
      : columns(columns), channels(static_cast<int>(round_up(p.channels, kStep<Arithmetic>))) {
    w1 = arena.take<Operand<Arithmetic>>(static_cast<int64_t>(columns.total) * channels * kTaps);
    b1 = arena.take<float>(columns.total);
    w2 = arena.take<float>(static_cast<int64_t>(columns.most_outputs()) * columns.total);
  }

  Status fill(const Problem& p, void* stream) const {
    MOE_TRY(launch<PackWeights<Arithmetic>>({p, columns, false, columns.total, channels, w1}, stream));
    return launch<PackColumns>({p, columns, b1, w2}, stream);
  }
};

// Forward: a band is some frames, or some rows of a frame, on a grid of tiles that is fixed to the image.
template <class Arithmetic>
class ForwardPass {
 public:
  ForwardPass(const Problem& p, void* workspace)
      : p_(p),
        skipping_(p.skip_below > 0 && p.experts > 1),
        plan_(plan_columns(p, skipping_)),
        arena_(workspace),
        packed_(p, plan_.columns, arena_) {
    tile_columns_ = static_cast<int>(divide_up(p.width, kTile));
    const int64_t tile_rows = divide_up(p.height, kTile);
    const int64_t pitch = tile_columns_ * kTile;
    const int64_t row_bytes = (pitch + 2) * packed_.channels * static_cast<int64_t>(sizeof(Operand<Arithmetic>)) +
                              pitch * plan_.columns.slots() * static_cast<int64_t>(sizeof(float));
    const int64_t rows = BandBytes::forward / row_bytes;
    frames_ = static_cast<int>(std::clamp<int64_t>(rows / (tile_rows * kTile + 2), 1, std::min<int64_t>(p.batch, 65535)));
    const int64_t most = std::clamp<int64_t>((rows - 2) / kTile, 1, tile_rows);
    rows_ = static_cast<int>(divide_up(tile_rows, divide_up(tile_rows, most))) * kTile;
    if (frames_ > 1) rows_ = static_cast<int>(tile_rows) * kTile;
    features_ = arena_.template take<Operand<Arithmetic>>(band(0, 0).pixels() * packed_.channels);
    slots_ = arena_.template take<float>(planes(0, 0).size() * plan_.columns.slots());
    if (skipping_) reached_ = arena_.template take<uint8_t>(frames_ * tiles() * p.experts);
  }

  int64_t bytes() const { return arena_.used(); }

  Status run(const Outputs& outputs, void* stream) const {
    MOE_TRY(packed_.fill(p_, stream));
    for (int frame = 0; frame < p_.batch; frame += frames_)
      for (int row = 0; row < p_.height; row += rows_) MOE_TRY(run_band(frame, row, outputs, stream));
    return Status::ok;
  }

 private:
  int frames_from(int frame) const { return static_cast<int>(std::min<int64_t>(frames_, p_.batch - frame)); }
  int64_t tiles() const { return static_cast<int64_t>(rows_ / kTile) * tile_columns_; }
  Band band(int frame, int row) const {
    return {frame, frames_from(frame), row - 1, rows_ + 2, tile_columns_ * kTile + 2, packed_.channels};
  }
  Planes planes(int frame, int row) const { return {frame, frames_from(frame), row, rows_, tile_columns_ * kTile}; }

  Status run_band(int frame, int row, const Outputs& outputs, void* stream) const {
    const Band band = this->band(frame, row);
    const Planes planes = this->planes(frame, row);
    const int width = static_cast<int>(p_.width);
    const int rows = static_cast<int>(std::min<int64_t>(rows_, p_.height - row));
    MOE_TRY(launch<Upsample<Arithmetic>>({p_, band, features_, reads_chunks(p_)}, stream));
    SecondLayer<Arithmetic> second = {
        plan_.columns, packed_.b1, packed_.w2, slots_, planes, nullptr, rows_ / kTile, tile_columns_, nullptr, {}};
    const auto compute = [&](Section section) {
      return convolve<Arithmetic>(features_, band, packed_.w1, plan_.columns.total, section, second, rows, width,
                                  stream);
    };
    Head head = {p_, plan_.columns, slots_, planes, nullptr, tile_columns_, disagreement(p_)};
    MOE_TRY(compute(plan_.first));
    if (skipping_) {
      // never so high that a tile loses its most probable expert, or "switch" one that has a say
      const float threshold = std::min({p_.skip_below, .5f / static_cast<float>(p_.experts), kSwitchMinWeight});
      const Reach::Params reach = {head, threshold, reached_};
      MOE_TRY(launch<Reach>(reach, Reach::grid(reach), Reach::shared_bytes(reach), stream));
      head.reached = second.reached = reached_;
      MOE_TRY(compute(plan_.second));
    }
    return launch<Mix>({head, outputs}, stream);
  }

  const Problem& p_;
  bool skipping_;
  ColumnPlan plan_;
  Arena arena_;
  Packed<Arithmetic> packed_;
  int tile_columns_, frames_, rows_;
  Operand<Arithmetic>* features_;
  float* slots_;
  uint8_t* reached_ = nullptr;
};

// Backward: a band is some rows of a frame, and is worked on with one more row above and below, because the
// convolution's adjoint reaches there.
template <class Arithmetic>
class BackwardPass {
 public:
  BackwardPass(const Problem& p, void* workspace)
      : p_(p), plan_(plan_columns(p, false)), arena_(workspace), packed_(p, plan_.columns, arena_) {
    using Type = Operand<Arithmetic>;
    const Columns& columns = plan_.columns;
    const int64_t size = sizeof(Type), channels = packed_.channels;
    const int width = group_width(channels);
    input_ = {0, static_cast<int>(round_up(channels, width)), width};
    pitch_ = static_cast<int>(round_up(p.width, kPixelChunk));
    const int64_t numbers = columns.slots() + columns.raw_outputs() + p.experts + input_.columns;
    const int64_t row_bytes = (pitch_ + 2) * (channels + columns.total) * size + pitch_ * numbers * 4;
    const int64_t most = std::clamp<int64_t>(BandBytes::backward / row_bytes / kTile, 1, divide_up(p.height + 2, kTile));
    const int64_t bands = divide_up(p.height, most * kTile - 2);
    tile_rows_ = static_cast<int>(divide_up(divide_up(p.height, bands) + 2, kTile)) * kTile;

    splits_ = std::min(kMostSplits, std::min(tile_rows_ - 2, static_cast<int>(p.height)));
    adjoint_ = arena_.template take<Type>(static_cast<int64_t>(input_.columns) * columns.total * kTaps);
    features_ = arena_.template take<Type>(feature_band(0, 0).pixels() * channels);
    hidden_ = arena_.template take<Type>(hidden_band(0, 0).pixels() * columns.total);
    slots_ = arena_.template take<float>(planes(0, 0).size() * columns.slots());
    raw_ = arena_.template take<float>(planes(0, 0).size() * (columns.raw_outputs() + p.experts));
    input_gradients_ = arena_.template take<float>(planes(0, 0).size() * input_.columns);
    sum_w1_ = arena_.template take<float>(splits_ * kTaps * channels * columns.total);
    sum_w2_ = arena_.template take<float>(static_cast<int64_t>(tile_rows_ + 2) * columns.most_outputs() * columns.total);
    sum_b1_ = arena_.template take<float>(static_cast<int64_t>(tile_rows_ + 2) * columns.total);
    sum_b2_ = arena_.template take<float>(static_cast<int64_t>(tile_rows_) * columns.raw_outputs());
  }

  int64_t bytes() const { return arena_.used(); }

  Status run(const Cotangents& given, const Gradients& wanted, void* stream) const {
    MOE_TRY(packed_.fill(p_, stream));
    if (wanted.x)
      MOE_TRY(launch<PackWeights<Arithmetic>>(
          {p_, plan_.columns, true, input_.columns, plan_.columns.total, adjoint_}, stream));
    const int own = tile_rows_ - 2;
    for (int frame = 0; frame < p_.batch; ++frame)
      for (int row = 0; row < p_.height; row += own) MOE_TRY(run_band(frame, row, given, wanted, stream));
    return collect(wanted, stream);
  }

 private:
  static constexpr int kPixelChunk = WeightGradient<Arithmetic, kNarrow>::kPixels;
  static constexpr int kMostSplits = 16;  // partial sums of the 3x3 weights' gradient

  // the band's own rows from `row` on, one above and below; features have yet another, for the convolution
  Band feature_band(int frame, int row) const { return {frame, 1, row - 2, tile_rows_ + 2, pitch_ + 2, packed_.channels}; }
  Band hidden_band(int frame, int row) const {  // the last two rows are only read for what is thrown away
    return {frame, 1, row - 1, tile_rows_ + 2, pitch_ + 2, plan_.columns.total};
  }
  Planes planes(int frame, int row) const { return {frame, 1, row - 1, tile_rows_, pitch_}; }

  static bool first_layer(const Gradients& g) { return g.expert_w1 || g.gate_w1; }
  static bool others(const Gradients& g) {
    return g.expert_b1 || g.expert_w2 || g.expert_b2 || g.gate_b1 || g.gate_w2 || g.gate_b2;
  }

  Status run_band(int frame, int row, const Cotangents& given, const Gradients& wanted, void* stream) const {
    const Columns& columns = plan_.columns;
    const Band features = feature_band(frame, row), hidden = hidden_band(frame, row);
    const Planes planes = this->planes(frame, row);
    Band local = hidden;  // frames count from the band's own
    const int height = static_cast<int>(p_.height), width = static_cast<int>(p_.width);
    const int last = std::min(row + tile_rows_ - 2, height);
    const bool first = frame == 0 && row == 0;

    MOE_TRY(launch<Upsample<Arithmetic>>({p_, features, features_, reads_chunks(p_)}, stream));
    const SecondLayer<Arithmetic> second = {columns, packed_.b1, packed_.w2, slots_,  planes,
                                            nullptr, 0,          0,          hidden_, local};
    MOE_TRY(convolve<Arithmetic>(features_, features, packed_.w1, columns.total, plan_.first, second, tile_rows_,
                                 pitch_, stream));
    const Head head = {p_, columns, slots_, planes, nullptr, 0, disagreement(p_)};
    MOE_TRY(launch<MixGradient>({head, given, raw_, wanted.gate_logits, row, last}, stream));
    if (others(wanted))
      MOE_TRY(launch<RowSums>({raw_, planes, columns.raw_outputs(), width, row, last, first, sum_b2_}, stream));
    if (!first_layer(wanted) && !others(wanted) && !wanted.x) return Status::ok;
    float *const sum_w2 = others(wanted) ? sum_w2_ : nullptr, *const sum_b1 = others(wanted) ? sum_b1_ : nullptr;
    MOE_TRY(launch<HiddenGradient<Arithmetic>>({columns, packed_.w2, raw_, planes, hidden_, hidden, height, width, row,
                                                last, first, sum_w2, sum_b1}, stream));
    if (first_layer(wanted)) {
      const auto run = columns.total % kWide == 0 ? sum_weights<kWide> : sum_weights<kNarrow>;
      MOE_TRY(run(*this, features, hidden, last - row, first, stream));
    }
    return wanted.x ? to_source(frame, row, last, hidden, wanted.x, stream) : Status::ok;
  }

  template <int kWidth>
  static Status sum_weights(const BackwardPass& self, const Band& features, const Band& hidden, int rows, bool first,
                            void* stream) {
    using Kernel = WeightGradient<Arithmetic, kWidth>;
    const typename Kernel::Params params = {self.features_, self.hidden_, features, hidden, 1, 1, rows,
                                            self.pitch_ / Kernel::kPixels, self.splits_, first,
                                            self.sum_w1_};
    return launch<Kernel>(params, Kernel::grid(params), Kernel::kSharedBytes, stream);
  }

  Status to_source(int frame, int row, int last, const Band& hidden, float* grad_x, void* stream) const {
    const Planes own = {0, 1, row, last - row, pitch_};
    MOE_TRY(convolve<Arithmetic>(hidden_, hidden, adjoint_, input_.columns, input_,
                                 Store{input_gradients_, own, input_.columns}, last - row, pitch_, stream));
    const int64_t frame_size = p_.in_height * p_.in_width * p_.channels;
    return launch<Downsample>({p_, input_gradients_, own, input_.columns, row == 0, grad_x + frame * frame_size},
                              stream);
  }

  Status collect(const Gradients& wanted, void* stream) const {
    const Columns& columns = plan_.columns;
    if (first_layer(wanted))
      MOE_TRY(launch<CollectWeights>({columns, sum_w1_, splits_, packed_.channels, static_cast<int>(p_.channels),
                                      wanted.expert_w1, wanted.gate_w1}, stream));
    if (!others(wanted)) return Status::ok;
    MOE_TRY(launch<CollectColumns>({columns, tile_rows_ + 2, sum_w2_, sum_b1_, wanted.expert_b1, wanted.expert_w2,
                                    wanted.gate_b1, wanted.gate_w2}, stream));
    return launch<CollectBiases>({columns, tile_rows_, sum_b2_, wanted.expert_b2, wanted.gate_b2}, stream);
  }

  const Problem& p_;
  ColumnPlan plan_;
  Arena arena_;
  Packed<Arithmetic> packed_;
  Section input_;  // of the adjoint: the input's channels
  int pitch_, tile_rows_, splits_;
  Operand<Arithmetic>*adjoint_, *features_, *hidden_;
  float *slots_, *raw_, *input_gradients_, *sum_w1_, *sum_w2_, *sum_b1_, *sum_b2_;
};

// What the instances for one arithmetic offer; each is compiled in a file of its own.
template <class Arithmetic>
struct Passes {
  static int64_t forward_bytes(const Problem& p);
  static int64_t backward_bytes(const Problem& p);
  static Status forward(const Problem& p, const Outputs& outputs, const Execution& e);
  static Status backward(const Problem& p, const Cotangents& given, const Gradients& wanted, const Execution& e);
};

#define MOE_INSTANTIATE(Arithmetic)                                                                               \
  template <>                                                                                                     \
  int64_t Passes<Arithmetic>::forward_bytes(const Problem& p) {                                                   \
    return ForwardPass<Arithmetic>(p, nullptr).bytes();                                                           \
  }                                                                                                               \
  template <>                                                                                                     \
  int64_t Passes<Arithmetic>::backward_bytes(const Problem& p) {                                                  \
    return BackwardPass<Arithmetic>(p, nullptr).bytes();                                                          \
  }                                                                                                               \
  template <>                                                                                                     \
  Status Passes<Arithmetic>::forward(const Problem& p, const Outputs& outputs, const Execution& e) {              \
    return ForwardPass<Arithmetic>(p, e.workspace).run(outputs, e.stream);                                        \
  }                                                                                                               \
  template <>                                                                                                     \
  Status Passes<Arithmetic>::backward(const Problem& p, const Cotangents& given, const Gradients& wanted,         \
                                      const Execution& e) {                                                       \
    return BackwardPass<Arithmetic>(p, e.workspace).run(given, wanted, e.stream);                                 \
  }

}  // namespace moe::cuda

// The two passes over a batch: which kernels run on which band, in which pieces of the workspace.
#pragma once

#include "epilogues.h"
#include "features.h"
#include "gradients.h"
#include "low_resolution.h"
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
  prefix template Status launch<PositionParts>(const PositionParts::Params&, void*);     \
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

// Whether the forward pass takes the low-resolution formulation. It can where nothing is made smaller (every pixel of x
// then has a place among the upsampled columns, and rows are read one after another), all experts are wanted, and its
// shared memory suffices, part of which grows with the number of columns between two of x's pixels. It pays where the
// products that it saves take longer than what it adds. In multiply-adds of the direct kernel a row of a strip takes,
// by count (bench/NOTES-native.md), for each group of hidden channels 6,000 a channel of x on the tensor cores
// and 1.4 million more (0.7 in tf32, where they take twice the time); on the vector units 12,000 and 150,000.
template <class Arithmetic>
bool uses_low_resolution(const Problem& p, const Device& device) {
  const bool enlarges = p.in_height <= p.height && p.in_width <= p.width && p.in_height * p.in_width > 0;
  if (!enlarges || (p.skip_below > 0 && p.experts > 1) || p.formulation == Formulation::direct) return false;
  const int64_t slots = slots_per_pixel(p.in_width, p.width);
  const Strips strips(static_cast<int>(p.in_width), static_cast<int>(p.width));
  const int64_t channels = round_up(p.channels, kStep<Arithmetic>), groups = group_columns(p).total / kGroup;
  const int64_t shared = LowResolution<Arithmetic>::shared_bytes(channels, slots, strips.widest);
  if (shared > device.block_shared_bytes || strips.count * groups > INT32_MAX) return false;
  if (p.formulation == Formulation::low_resolution) return true;
  constexpr bool kVector = std::is_same_v<Arithmetic, Ieee>;
  constexpr double kByChannel = kVector ? 12e3 : 6e3, kOthers = kVector ? 150e3 : 2.8e6 / sizeof(Operand<Arithmetic>);
  const auto wide = static_cast<double>(channels);
  const double low = static_cast<double>(strips.count * groups * p.in_height) * (kByChannel * wide + kOthers);
  const double pixels = static_cast<double>(round_up(p.height, kTile)) * static_cast<double>(round_up(p.width, kTile));
  return low < pixels * plan_columns(p, false).columns.total * kTaps * wide;
}

// Forward by the low-resolution formulation: a band is some frames, or some rows of a frame.
template <class Arithmetic>
class LowResolutionPass {
 public:
  using Kernel = LowResolution<Arithmetic>;
  using Type = Operand<Arithmetic>;

  LowResolutionPass(const Problem& p, void* workspace)
      : p_(p),
        columns_(group_columns(p)),
        strips_(static_cast<int>(p.in_width), static_cast<int>(p.width)),
        slots_(slots_per_pixel(p.in_width, p.width)),
        channels_(static_cast<int>(round_up(p.channels, kStep<Arithmetic>))),
        pitch_(static_cast<int>(round_up(p.width, kWarp))) {
    Arena arena(workspace);
    weights_ = arena.take<Type>(static_cast<int64_t>(columns_.total) * channels_ * kTaps);
    bias_ = arena.take<float>(columns_.total);
    second_ = arena.take<float>(static_cast<int64_t>(columns_.most_outputs()) * columns_.total);
    column_parts_ = arena.take<float>(4 * p.width * columns_.total);
    row_parts_ = arena.take<float>(4 * p.height * columns_.total);
    const int64_t row_bytes = pitch_ * columns_.slots() * static_cast<int64_t>(sizeof(float));
    const int64_t pixel_bytes = channels_ * static_cast<int64_t>(sizeof(Type));
    const int64_t source_bytes = reads_operands() ? 0 : source(0, 1).pixels() * pixel_bytes;
    frames_ = static_cast<int>(std::clamp<int64_t>(BandBytes::forward / (row_bytes * p.height + source_bytes), 1,
                                                   std::min<int64_t>(p.batch, 65535)));
    rows_ = static_cast<int>(p.height);
    if (frames_ == 1) {  // a frame that is read needs what it needs
      const int64_t most = std::clamp<int64_t>(BandBytes::forward / row_bytes, 1, p.height);
      rows_ = static_cast<int>(divide_up(p.height, divide_up(p.height, most)));
    }
    if (!reads_operands()) source_ = arena.take<Type>(source(0, frames_).pixels() * channels_);
    sums_ = arena.take<float>(Planes{0, frames_, 0, rows_, pitch_}.size() * columns_.slots());
    bytes_ = arena.used();
  }

  int64_t bytes() const { return bytes_; }

  Status run(const Outputs& outputs, const Device& device, void* stream) const {
    MOE_TRY(launch<PackFragments<Arithmetic>>({p_, columns_, channels_, weights_}, stream));
    MOE_TRY(launch<PackColumns>({p_, columns_, bias_, second_}, stream));
    MOE_TRY(launch<PositionParts>({p_, columns_, column_parts_, row_parts_}, stream));
    for (int frame = 0; frame < p_.batch; frame += frames_) {
      const int frames = static_cast<int>(std::min<int64_t>(frames_, p_.batch - frame));
      if (!reads_operands()) MOE_TRY(convert(frame, frames, stream));
      for (int row = 0; row < p_.height; row += rows_)
        MOE_TRY(run_band({frame, frames, row, rows_, pitch_}, outputs, device, stream));
    }
    return Status::ok;
  }

 private:
  // Whether the kernel can read x itself.
  bool reads_operands() const {
    const Element element = std::is_same_v<Arithmetic, Bf16>   ? Element::bfloat16
                            : std::is_same_v<Arithmetic, Half> ? Element::float16
                                                               : Element::float32;
    return !std::is_same_v<Arithmetic, Tf32> && p_.x_element == element && reads_chunks(p_) && p_.channels == channels_;
  }
  Band source(int frame, int frames) const {
    return {frame, frames, 0, static_cast<int>(p_.in_height), static_cast<int>(p_.in_width) + 2, channels_};
  }

  Status convert(int frame, int frames, void* stream) const {  // an upsampling to its own size
    Problem own = p_;
    own.height = p_.in_height, own.width = p_.in_width;
    own.pos_x = own.pos_y = nullptr;
    return launch<Upsample<Arithmetic>>({own, source(frame, frames), source_, reads_chunks(p_)}, stream);
  }

  Status run_band(const Planes& planes, const Outputs& outputs, const Device& device, void* stream) const {
    typename Kernel::Params params = {};
    const auto size = static_cast<int64_t>(sizeof(Type));
    if (reads_operands()) {
      params.x = static_cast<const char*>(p_.x) + planes.first_frame * p_.x_strides[0] * size;
      params.frame_bytes = p_.x_strides[0] * size, params.row_bytes = p_.x_strides[2] * size;
      params.pixel_bytes = p_.x_strides[3] * size;
    } else {
      const Band band = source(planes.first_frame, planes.frames);
      params.pixel_bytes = channels_ * size, params.row_bytes = band.pitch * params.pixel_bytes;
      params.frame_bytes = band.rows * params.row_bytes;
      params.x = reinterpret_cast<const char*>(source_) + params.pixel_bytes;
    }
    params.in_height = static_cast<int>(p_.in_height), params.in_width = static_cast<int>(p_.in_width);
    params.height = static_cast<int>(p_.height), params.width = static_cast<int>(p_.width);
    params.channels = channels_, params.weights = weights_;
    params.column_parts = column_parts_, params.row_parts = row_parts_, params.second = second_;
    params.columns = columns_, params.sums = sums_, params.planes = planes;
    params.rows = static_cast<int>(std::min<int64_t>(planes.rows, p_.height - planes.first_row));
    params.band_rows = band_rows(params.rows, planes.frames, device);
    params.slots = static_cast<int>(slots_), params.widest = strips_.widest;
    const auto shared = static_cast<size_t>(shared_bytes());
    MOE_TRY(launch<Kernel>(params, Kernel::grid(params, strips_), shared, stream));
    const Head head = {p_, columns_, sums_, planes, nullptr, 0, disagreement(p_)};
    return launch<Mix>({head, outputs}, stream);
  }

  int64_t shared_bytes() const { return Kernel::shared_bytes(channels_, slots_, strips_.widest); }

  // Rows of the output that a block works through: as many blocks as keep all processors busy to the end, though each
  // begins with rows of x that others need, too.
  int band_rows(int rows, int frames, const Device& device) const {
    constexpr double kOverlap = 3;
    constexpr int64_t kReserved = 1 << 10;  // of shared memory, for each block
    const int64_t together = device.shared_bytes / (shared_bytes() + kReserved);
    const int64_t resident = device.processors * std::clamp<int64_t>(together, 1, Kernel::kBlocks);
    const int64_t blocks = static_cast<int64_t>(strips_.count) * (columns_.total / kGroup) * frames;
    const double ratio = static_cast<double>(p_.in_height) / static_cast<double>(p_.height);
    int best = rows;
    double least = INFINITY;
    for (int bands = 1; bands <= rows && bands <= 64; ++bands) {
      const int each = static_cast<int>(divide_up(rows, bands));
      const auto rounds = static_cast<double>(divide_up(blocks * divide_up(rows, each), resident));
      const double time = rounds * (each * ratio + kOverlap);
      if (time < least) least = time, best = each;
    }
    return best;
  }

  const Problem& p_;
  Columns columns_;
  Strips strips_;
  int64_t slots_;
  int channels_, pitch_, frames_, rows_;
  Type *weights_, *source_ = nullptr;
  float *bias_, *second_, *column_parts_, *row_parts_, *sums_;
  int64_t bytes_;
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
  static Formulation formulation(const Problem& p);
  static int64_t forward_bytes(const Problem& p);
  static int64_t backward_bytes(const Problem& p);
  static Status forward(const Problem& p, const Outputs& outputs, const Execution& e);
  static Status backward(const Problem& p, const Cotangents& given, const Gradients& wanted, const Execution& e);
};

// Enough for both formulations where the device has a say.
template <class Arithmetic>
int64_t forward_bytes(const Problem& p) {
  const int64_t direct = ForwardPass<Arithmetic>(p, nullptr).bytes();
  if (!uses_low_resolution<Arithmetic>(p, kLargestDevice)) return direct;
  return std::max(direct, LowResolutionPass<Arithmetic>(p, nullptr).bytes());
}

template <class Arithmetic>
Status run_forward(const Problem& p, const Outputs& outputs, const Execution& e) {
  const Device device = current_device();
  if (uses_low_resolution<Arithmetic>(p, device))
    return LowResolutionPass<Arithmetic>(p, e.workspace).run(outputs, device, e.stream);
  return ForwardPass<Arithmetic>(p, e.workspace).run(outputs, e.stream);
}

#define MOE_INSTANTIATE(Arithmetic)                                                                               \
  template <>                                                                                                     \
  Formulation Passes<Arithmetic>::formulation(const Problem& p) {                                                 \
    return uses_low_resolution<Arithmetic>(p, kLargestDevice) ? Formulation::low_resolution : Formulation::direct; \
  }                                                                                                               \
  template <>                                                                                                     \
  int64_t Passes<Arithmetic>::forward_bytes(const Problem& p) {                                                   \
    return cuda::forward_bytes<Arithmetic>(p);                                                                    \
  }                                                                                                               \
  template <>                                                                                                     \
  int64_t Passes<Arithmetic>::backward_bytes(const Problem& p) {                                                  \
    return BackwardPass<Arithmetic>(p, nullptr).bytes();                                                          \
  }                                                                                                               \
  template <>                                                                                                     \
  Status Passes<Arithmetic>::forward(const Problem& p, const Outputs& outputs, const Execution& e) {              \
    return run_forward<Arithmetic>(p, outputs, e);                                                                \
  }                                                                                                               \
  template <>                                                                                                     \
  Status Passes<Arithmetic>::backward(const Problem& p, const Cotangents& given, const Gradients& wanted,         \
                                      const Execution& e) {                                                       \
    return BackwardPass<Arithmetic>(p, e.workspace).run(given, wanted, e.stream);                                 \
  }

}  // namespace moe::cuda

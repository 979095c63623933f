#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "parallel.h"

namespace moe::cpu {
namespace {

// Tiles lie on one grid for each frame. A cell of successive tiles is what an expert is left out of; a unit is what a thread
// works at: its transformed patches take half of a 1 MB L2, and the weights pass once a unit.
constexpr int64_t kCellTiles = 8, kUnitTiles = 24, kCells = kUnitTiles / kCellTiles;
constexpr int64_t kUnitWidth = kUnitTiles * kHeadTile;
constexpr int64_t kStagger = 16;  // floats between places, and between pixels: none compete for the same lines of a cache

// How the tiles of a call read the features and the position embedding.
struct Grid {
  explicit Grid(const TileHead& head)
      : rows(head.problem.in_height, head.problem.height),
        columns(head.problem.in_width, head.problem.width),
        half(head.layout.half_floats()),
        in_parts(interpolation_error(head.problem) < kRoughError) {
    const Problem& p = head.problem;
    if (!p.pos_x) return;
    position_x = transform(columns, p.pos_x, head.layout.half_channels(), p.threads);
    position_y = transform(rows, p.pos_y, head.layout.half_channels(), p.threads);
  }

  int64_t tiles() const { return rows.count() * columns.count(); }
  int64_t units() const { return divide_up(tiles(), kUnitTiles); }

  // Of kGroup channels from `channel` on, which is a place in the layout.
  PatchPosition position(int64_t row, int64_t column, int64_t channel) const {
    if (!position_x.data()) return {};
    const bool by_column = channel < half;
    const float* table = by_column ? position_x + column * kHeadPatch * half : position_y + row * kHeadPatch * half;
    const float* inside = by_column ? rows.inside(row) : columns.inside(column);
    return {table + channel % half, half, inside, by_column};
  }

  const PatchPlan rows, columns;
  const int64_t half;
  const bool in_parts;  // 3% slower, needed where the ratio leaves little room for rounding errors

 private:
  Buffer transform(const PatchPlan& plan, const float* table, int64_t channels, int threads) const {
    Buffer out = zeros(plan.count() * kHeadPatch * half);
    parallel_for(plan.count(), threads, [&](int64_t tile, int) {
      plan.transform(tile, table, channels, out + tile * kHeadPatch * half, half);
    });
    return out;
  }

  Buffer position_x, position_y;  // [tile][kHeadPatch][half]
};

class TileWorker {
 public:
  TileWorker(const TileHead& head, const Grid& grid, const Outputs& outputs)
      : head_(head),
        p_(head.problem),
        grid_(grid),
        depth_(head.layout.floats()),
        pixel_(depth_ + kStagger),
        patch_plane_(kUnitTiles * depth_ + kStagger),
        product_plane_(kUnitTiles * TileHead::kMaxColumns + kStagger),
        mixture_(head, outputs, kHeadTile * kUnitWidth),
        pixels_(zeros(kMaxPatchSources * kRunSources * pixel_)),
        rows_(kRunSources * kHeadPatch * kGroup),
        patches_(zeros(kPlaces * patch_plane_ + past_end() * depth_)),
        products_(kPlaces * product_plane_ + past_end() * TileHead::kMaxColumns),
        hidden_(kHeadTile * kHeadTile * kGroup),
        sums_(kUnitTiles * kGroup),
        kept_(kCells * p_.experts, 1) {
    runs_.reserve(kUnitTiles);  // the most of a unit: run() must take no memory
  }

  // finite [tile of the frame]: set to 0 where a number is not.
  void run(int64_t frame, int64_t unit, uint8_t* finite) {
    begin(frame, unit);
    for (const Run& run : runs_) transform(run);
    if (p_.has_gate()) run_branch(p_.experts);
    if (skips(p_)) find_kept();
    for (int64_t k = 0; k < p_.experts; ++k) run_branch(k);
    for_each_row([&](const Mixture::Run& row, uint8_t* kept) { mixture_.mix(row, kept); });
    for (int64_t slot = 0; slot < tiles_.size(); ++slot) finite[tiles_.begin + slot] = is_finite(slot);
  }

 private:
  static constexpr int64_t kRunSources = kCellTiles * kHeadTile + 3;  // columns, as there are no fewer pixels

  struct Run {  // neighbouring tiles of one cell; slots are places in the unit
    int64_t row, column, slot, count;
  };

  // Rows of products beyond the last tile's, where cells are no multiple of a block of rows.
  int64_t past_end() const { return head_.kernels.block_rows - 1; }
  uint8_t* kept(int64_t cell) { return kept_.data() + cell * p_.experts; }
  int64_t height(const Run& run) const { return std::min<int64_t>(kHeadTile, p_.height - run.row * kHeadTile); }
  int64_t width(const Run& run) const {
    return std::min(run.count * kHeadTile, p_.width - run.column * kHeadTile);
  }

  void begin(int64_t frame, int64_t unit) {
    frame_ = frame;
    tiles_ = {unit * kUnitTiles, std::min((unit + 1) * kUnitTiles, grid_.tiles())};
    runs_.clear();
    for (int64_t tile = tiles_.begin; tile < tiles_.end;) {
      const int64_t columns = grid_.columns.count(), slot = tile - tiles_.begin;
      const int64_t in_row = columns - tile % columns, in_cell = kCellTiles - slot % kCellTiles;
      const int64_t count = std::min({in_row, in_cell, tiles_.end - tile});
      runs_.push_back({tile / columns, tile % columns, slot, count});
      tile += count;
    }
    std::memset(sums_.data(), 0, kUnitTiles * kGroup * sizeof(float));
  }

  void transform(const Run& run) {
    const Span rows = grid_.rows.sources(run.row);
    const Span columns = {grid_.columns.sources(run.column).begin,
                          grid_.columns.sources(run.column + run.count - 1).end};
    const int64_t row_floats = columns.size() * pixel_;
    for (int64_t r = 0; r < rows.size(); ++r)
      pack_row(p_, head_.kernels, head_.layout, frame_, rows.begin + r, columns, pixel_, pixels_ + r * row_floats);
    for (int64_t channel = 0; channel < depth_; channel += kGroup) {
      head_.kernels.transform_rows(pixels_ + channel, row_floats, rows.size(), pixel_, columns.size(),
                                   grid_.rows.weights(run.row), rows_.data());
      for (int64_t i = 0; i < run.count; ++i) {
        const int64_t column = run.column + i;
        const Span sources = grid_.columns.sources(column);
        head_.kernels.transform_columns(rows_ + (sources.begin - columns.begin) * kHeadPatch * kGroup, sources.size(),
                                        grid_.columns.weights(column), grid_.position(run.row, column, channel),
                                        patches_ + (run.slot + i) * depth_ + channel, patch_plane_);
      }
    }
  }

  // z of one branch, in the cells where it is kept.
  void run_branch(int64_t branch) {
    const auto is_kept = [&](int64_t cell) { return !head_.is_expert(branch) || kept(cell)[branch]; };
    const int64_t cells = divide_up(tiles_.size(), kCellTiles);
    for (int64_t cell = 0; cell < cells; ++cell) {
      if (!is_kept(cell)) continue;
      const int64_t first = cell;
      while (cell + 1 < cells && is_kept(cell + 1)) ++cell;
      const Span slots = {first * kCellTiles, (cell + 1) * kCellTiles};
      for (const Product& product : head_.products())
        if (product.branch == branch) run_product(product, slots);
    }
  }

  void run_product(const Product& product, Span slots) {
    for (int64_t place = 0; place < kPlaces; ++place) multiply(product, place, slots);
    for (const Run& run : runs_)
      if (run.slot >= slots.begin && run.slot < slots.end)
        for (int64_t i = 0; i < run.count; ++i)
          for (int64_t g = 0; g < product.groups; ++g) finish(run, i, product, g);
  }

  void multiply(const Product& product, int64_t place, Span slots) {
    Gemm gemm = {};
    gemm.a = patches_ + place * patch_plane_ + slots.begin * depth_;
    gemm.a_row = depth_;
    gemm.a_depth = 1;
    gemm.b = head_.weights(product) + place * depth_ * product.columns;
    gemm.b_panel = depth_ * head_.kernels.narrow_panel;
    gemm.b_depth = head_.kernels.narrow_panel;
    gemm.c = products_ + place * product_plane_ + slots.begin * product.columns;
    gemm.c_row = product.columns;
    gemm.row_blocks = divide_up(slots.size(), head_.kernels.block_rows);
    gemm.panels = product.columns / head_.kernels.narrow_panel;
    gemm.depth = depth_;
    gemm.goes_on = true;
    (grid_.in_parts ? head_.kernels.gemm_in_parts : head_.kernels.gemm_narrow)(gemm);
  }

  // One tile and group of a product, through the 1x1 layer.
  void finish(const Run& run, int64_t i, const Product& product, int64_t group) {
    const int64_t slot = run.slot + i, g = product.first_group + group, padded = head_.padded_outputs(product.branch);
    head_.kernels.tile_hidden(products_ + slot * product.columns + group * kGroup, product_plane_, head_.b1(g),
                              hidden_.data(), sums_ + slot * kGroup);
    const float* start = head_.group(g).first_of_branch ? head_.b2(product.branch) : nullptr;
    const int64_t width = std::min<int64_t>(kHeadTile, p_.width - (run.column + i) * kHeadTile);
    for (int64_t row = 0; row < height(run); ++row)
      head_.kernels.second_layer(hidden_ + row * kHeadTile * kGroup, width, head_.w2(g), padded, start,
                                 mixture_.z(product.branch, row * kUnitWidth + slot * kHeadTile), padded);
  }

  void find_kept() {
    std::fill(kept_.begin(), kept_.end(), uint8_t{0});
    for_each_row([&](const Mixture::Run& row, uint8_t* kept) { mixture_.find_kept(row, kept); });
  }

  // function(pixels of one output row, what is kept in their cell)
  template <typename Function>
  void for_each_row(Function function) {
    for (const Run& run : runs_)
      for (int64_t i = 0; i < height(run); ++i) {
        const int64_t pixel = (run.row * kHeadTile + i) * p_.width + run.column * kHeadTile;
        function({frame_, pixel, i * kUnitWidth + run.slot * kHeadTile, width(run)}, kept(run.slot / kCellTiles));
      }
  }

  bool is_finite(int64_t slot) const {
    const float* sum = sums_ + slot * kGroup;
    return std::all_of(sum, sum + kGroup, [](float value) { return std::isfinite(value); });
  }

  const TileHead& head_;
  const Problem& p_;
  const Grid& grid_;
  const int64_t depth_;                        // floats of a pixel
  const int64_t pixel_;                        // floats from one to the next
  const int64_t patch_plane_, product_plane_;  // floats from one of the kPlaces to the next
  Mixture mixture_;
  Buffer pixels_;    // what a run reads: [row][column][pixel_]
  Buffer rows_;      // its rows transformed, for kGroup channels: [column][kHeadPatch][kGroup]
  Buffer patches_;   // [place][slot][depth]
  Buffer products_;  // [place][slot][product's columns]
  Buffer hidden_;    // of a tile: [kHeadTile * kHeadTile][kGroup]
  Buffer sums_;      // [slot][kGroup]: finite only if everything before the bias is
  std::vector<uint8_t> kept_;  // [cell][expert]
  std::vector<Run> runs_;
  int64_t frame_ = 0;
  Span tiles_ = {0, 0};
};

}  // namespace

TileHead::TileHead(const Problem& p, const Kernels& k) : Branches(p, k), layout(p.channels, Numbers::float32, kGroup) {
  const int64_t step = std::max<int64_t>(kGroup, k.narrow_panel), groups = kMaxColumns / kGroup;
  for (int64_t i = 0; i < branches(); ++i) {
    const int64_t branch = (i + problem.experts) % branches();  // the gate first, as they are used
    const Span all = branch_groups(branch);
    for (int64_t g = all.begin; g < all.end; g += groups) {
      const int64_t count = std::min(groups, all.end - g), columns = round_up(count * kGroup, step);
      products_.push_back({branch, g, count, columns, packed_floats_});
      packed_floats_ += kPlaces * layout.floats() * columns;
    }
  }
}

void TileHead::use(const float* packed) {
  if (!packed) {
    own_weights_ = Buffer(packed_floats_);
    pack(own_weights_.data());
  }
  weights_ = packed ? packed : own_weights_.data();
}

void TileHead::pack(float* out) const {
  std::memset(out, 0, packed_floats_ * sizeof(float));
  parallel_for(static_cast<int64_t>(products_.size()), problem.threads,
               [&](int64_t i, int) { pack_product(products_[i], out + products_[i].offset); });
}

// G w G^T in double, for all of the product's columns at once.
void TileHead::pack_product(const Product& product, float* out) const {
  const auto& matrix = head_transforms().weights;
  const int64_t channels = problem.channels, panel = kernels.narrow_panel, depth = layout.floats();
  const int64_t first = group(product.first_group).first_channel;
  const int64_t count = std::min(hidden(product.branch) - first, kMaxColumns);
  const float* w1_in = w1(product.branch) + first * channels * kTaps;
  for (int64_t c = 0; c < channels; ++c) {
    double taps[kTaps][kMaxColumns] = {}, rows[kHeadPatch][3][kMaxColumns];
    for (int64_t n = 0; n < count; ++n)
      for (int tap = 0; tap < kTaps; ++tap) taps[tap][n] = w1_in[(n * channels + c) * kTaps + tap];
    for (int i = 0; i < kHeadPatch; ++i)
      for (int dx = 0; dx < 3; ++dx)
        for (int64_t n = 0; n < kMaxColumns; ++n)
          rows[i][dx][n] = matrix[i][0] * taps[dx][n] + matrix[i][1] * taps[3 + dx][n] + matrix[i][2] * taps[6 + dx][n];
    for (int i = 0; i < kHeadPatch; ++i)
      for (int j = 0; j < kHeadPatch; ++j) {
        float* to = out + ((i * kHeadPatch + j) * product.columns) * depth + layout.place(c) * panel;
        for (int64_t n = 0; n < count; ++n)
          to[n / panel * panel * depth + n % panel] = static_cast<float>(
              matrix[j][0] * rows[i][0][n] + matrix[j][1] * rows[i][1][n] + matrix[j][2] * rows[i][2][n]);
      }
  }
}

std::vector<Band> forward_by_tiles(const TileHead& head, const Outputs& outputs) {
  const Problem& p = head.problem;
  const Grid grid(head);
  const int64_t count = p.batch * grid.units();
  std::vector<uint8_t> finite(p.batch * grid.tiles());
  std::vector<std::unique_ptr<TileWorker>> workers;  // made here: an exception must not leave a thread of the team
  for (int64_t slot = 0; slot < std::min<int64_t>(p.threads, count); ++slot)
    workers.push_back(std::make_unique<TileWorker>(head, grid, outputs));
  parallel_for(count, p.threads, [&](int64_t i, int slot) {
    const int64_t frame = i / grid.units();
    workers[slot]->run(frame, i % grid.units(), finite.data() + frame * grid.tiles());
  });

  std::vector<Band> bad;
  for (int64_t row = 0; row < p.batch * grid.rows.count(); ++row) {
    const auto tiles = finite.begin() + row * grid.columns.count();
    if (std::all_of(tiles, tiles + grid.columns.count(), [](uint8_t tile) { return tile; })) continue;
    const int64_t first = row % grid.rows.count() * kHeadTile;
    bad.push_back({row / grid.rows.count(), {first, std::min(first + kHeadTile, p.height)}});
  }
  return bad;
}

}  // namespace moe::cpu

// The matrix product in bfloat16 pairs by AMX's tile registers: one instruction multiplies 16 rows by 16 columns, 16 pairs
// deep. Weights and pixels lie as for kernels_avx512_bf16.cpp, which also takes what does not fill half a tile's depth.
#include "bf16.h"

#ifdef __AMX_BF16__  // the compiler was asked for it: see CMakeLists.txt

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace moe::cpu {
namespace {

constexpr int kSide = 16;  // rows and columns of a tile of sums, and the most pairs of a tile's depth
constexpr int kPanelTiles = kBf16Panel / kSide;

// The tile registers' shapes: 0 to 3 hold sums, 4 and 5 pixels, 6 and 7 weights. While it lives, this thread may use them.
class Tiles {
 public:
  explicit Tiles(int64_t pairs) {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shapes = {};
    static_assert(sizeof shapes == 64);
    shapes.palette = 1;
    for (int r = 0; r < 8; ++r) {
      shapes.rows[r] = static_cast<uint8_t>(r < 6 ? kSide : pairs);
      shapes.row_bytes[r] = static_cast<uint16_t>((r == 4 || r == 5 ? pairs : kSide) * sizeof(float));
    }
    __asm__ volatile("" : : "r"(&shapes) : "memory");  // GCC believes that the next line reads but 8 bytes
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }  // or every switch to another thread would save 8 KB
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

constexpr int64_t kFloat = sizeof(float);

template <bool TwoDown>
void load_pixels(const Gemm& g, const float* a) {
  _tile_loadd(4, a, g.a_row * kFloat);
  if (TwoDown) _tile_loadd(5, a + kSide * g.a_row, g.a_row * kFloat);
}

template <bool TwoAcross>
void load_weights(const Gemm& g, const float* const* b, int64_t at) {
  _tile_loadd(6, b[0] + at, g.b_depth * kFloat);
  if (TwoAcross) _tile_loadd(7, b[1] + at, g.b_depth * kFloat);
}

template <bool TwoDown, bool TwoAcross>
void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  if (TwoAcross) _tile_dpbf16ps(1, 4, 7);
  if (TwoDown) _tile_dpbf16ps(2, 5, 6);
  if (TwoDown && TwoAcross) _tile_dpbf16ps(3, 5, 7);
}

// One or two tiles of sums down, one or two across; a and b are their first tiles' beginnings. Of low parts, if there are
// any, those of b come first, then those of a, so that each tile of a high part is loaded but once.
template <bool X3, bool TwoDown, bool TwoAcross>
void multiply_tiles(const Gemm& g, int64_t pairs, const float* a, const float* const* b, float* const* c) {
  _tile_zero(0);
  if (TwoAcross) _tile_zero(1);
  if (TwoDown) _tile_zero(2);
  if (TwoDown && TwoAcross) _tile_zero(3);
  for (int64_t k = 0; k < g.depth; k += pairs) {
    load_pixels<TwoDown>(g, a + k);
    if (X3) {
      load_weights<TwoAcross>(g, b, g.b_low + k * g.b_depth);
      add_products<TwoDown, TwoAcross>();
    }
    load_weights<TwoAcross>(g, b, k * g.b_depth);
    add_products<TwoDown, TwoAcross>();
    if (X3) {
      load_pixels<TwoDown>(g, a + g.a_low + k);
      add_products<TwoDown, TwoAcross>();
    }
  }
  _tile_stored(0, c[0], g.c_row * kFloat);
  if (TwoAcross) _tile_stored(1, c[1], g.c_row * kFloat);
  if (TwoDown) _tile_stored(2, c[0] + kSide * g.c_row, g.c_row * kFloat);
  if (TwoDown && TwoAcross) _tile_stored(3, c[1] + kSide * g.c_row, g.c_row * kFloat);
}

// The most pairs of a tile that divide the depth, so that no tile is ragged.
int64_t tile_pairs(int64_t depth) {
  int64_t pairs = depth < kSide ? depth : kSide;
  while (depth % pairs != 0) --pairs;
  return pairs;
}

bool may_use_tiles() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // of CPUID's leaf 7, EDX
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  // Linux gives a process the registers when it asks for them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Shallow tiles are left to the other instruction.
template <bool X3>
void gemm(const Gemm& g) {
  const int64_t pairs = tile_pairs(g.depth);
  if (g.accumulate || pairs < kSide / 2) {
    const Bf16Products other = avx512_bf16();
    Gemm blocks = g;
    blocks.row_blocks *= kSide / other.block_rows;
    return (X3 ? other.gemm_x3 : other.gemm)(blocks);
  }
  const Tiles tiles(pairs);
  const int64_t across = g.panels * kPanelTiles;
  for (int64_t n = 0; n < across; n += 2) {
    const bool two_across = n + 1 < across;
    const float* b[2];
    float* c[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t at = n + i < across ? n + i : n;
      b[i] = g.b + at / kPanelTiles * g.b_panel + at % kPanelTiles * kSide;
      c[i] = g.c + at * kSide;
    }
    for (int64_t block = 0; block < g.row_blocks; block += 2) {
      const float* a = g.a + block * kSide * g.a_row;
      float* rows[2] = {c[0] + block * kSide * g.c_row, c[1] + block * kSide * g.c_row};
      const bool two_down = block + 1 < g.row_blocks;
      const auto multiply = two_down ? (two_across ? multiply_tiles<X3, true, true> : multiply_tiles<X3, true, false>)
                                     : (two_across ? multiply_tiles<X3, false, true> : multiply_tiles<X3, false, false>);
      multiply(g, pairs, a, b, rows);
    }
  }
}

}  // namespace

Bf16Products amx_bf16() {
  static const bool may = may_use_tiles() && avx512_bf16().gemm;
  if (!may) return {};
  constexpr int kColumns = 96;  // a third of the weights' traffic of 32 columns
  constexpr double kX3Cost = .45;  // 16 times the multiply-adds of an instruction, but its operands must come from L1
  return {gemm<false>, gemm<true>, kSide, kColumns, kX3Cost};
}

}  // namespace moe::cpu

#else

namespace moe::cpu {
Bf16Products amx_bf16() { return {}; }
}  // namespace moe::cpu

#endif

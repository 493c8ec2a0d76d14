// The row of 64-bit ARM processors with dot products (Cortex-A55 and A76, Neoverse N1): sdot adds
// four products of signed bytes to every sum of int32, exactly.
//
// Levels are unsigned. 128 is taken off them (one operation for sixteen), and
//
//   sum of a * w = sum of (a - 128) * w + 128 * sum of w,
//
// of which the last is made of a tile's weights once per call. usdot, which would take levels as
// they are, came with i8mm. Everything but the products is the neon row's.
#include <arm_neon.h>

#include <cstring>

#include "cpu/isa/neon/neon.hpp"
#include "cpu/isa/shared/unrolled.hpp"

namespace adalayer::cpu {
namespace dotprod {
namespace {

#include "cpu/isa/neon/bytes128.inl"
// Each of the next two builds on it.
#include "cpu/isa/neon/gemv.inl"
#include "cpu/isa/neon/products.inl"

/// What is to be added to the sums of a tile.
struct TileSums {
  int32x4_t correction[4];

  TileSums(const GemmArgs& g, const int8_t* tile) {
    const int8x16_t ones = vdupq_n_s8(1);
    for (auto& sum : correction)
      sum = vdupq_n_s32(0);
    for (int64_t s = 0; s < g.steps; ++s) {
      const int8_t* w = tile + s * formats::kTileBytes;
      for (int quad = 0; quad < g.live_quads[s]; ++quad, w += kQuadBytes)
        unrolled<0, 4>([&](auto part) __attribute__((always_inline)) {
          correction[part.value] =
              vdotq_s32(correction[part.value], vld1q_s8(w + part.value * 16), ones);
        });
    }
    for (auto& sum : correction)
      sum = vshlq_n_s32(sum, 7);
  }
};

struct Dots {
  static constexpr int kRows = 6, kColumns = 16;  // 24 of 32 registers hold sums, 6 levels
  static constexpr int kUnitsTogether = 1;
  using Columns = TileSums;

  static uint8x16_t levels(uint8x16_t v) { return veorq_u8(v, vdupq_n_u8(128)); }

  template <int kPassRows>
  struct Sums {
    int32x4_t sums[kPassRows][4];

    void zero() {
      unrolled<0, kPassRows * 4>([&](auto i) __attribute__((always_inline)) {
        sums[i.value / 4][i.value % 4] = vdupq_n_s32(0);
      });
    }
    template <int kQuads, bool, bool>
    [[gnu::always_inline]] void multiply(const uint8x16_t (&levels)[kPassRows], const int8_t* w) {
      unrolled<0, kQuads * 4>([&](auto i) __attribute__((always_inline)) {
        constexpr int quad = i.value / 4, part = i.value % 4;
        const int8x16_t v = vld1q_s8(w + i.value * 16);
        unrolled<0, kPassRows>([&](auto r) __attribute__((always_inline)) {
          sums[r.value][part] =
              vdotq_laneq_s32(sums[r.value][part], v, vreinterpretq_s8_u8(levels[r.value]), quad);
        });
      });
    }
    void store(const TileSums& tile, int, int32_t* to) const {
      unrolled<0, kPassRows * 4>([&](auto i) __attribute__((always_inline)) {
        constexpr int r = i.value / 4, part = i.value % 4;
        vst1q_s32(to + r * kBlockCols + 4 * part, vaddq_s32(sums[r][part], tile.correction[part]));
      });
    }
  };
};

/// Of matrix times vector.
struct UnsignedDot {
  using Sum = uint32x4_t;
  static constexpr int kRegisters = 1;
  static Sum zero() { return vdupq_n_u32(0); }
  static uint32x4_t total(Sum sum) { return sum; }
  template <int kBits>
  static void dot(Sum& sum, uint8x16_t a0, uint8x16_t w0, uint8x16_t a1, uint8x16_t w1) {
    sum = vdotq_u32(vdotq_u32(sum, w0, a0), w1, a1);
  }
};

void gemm(const GemmArgs& g) {
  for_tiles(g, [&](const int8_t* tile, int32_t* sums) {
    product_of_tile<Dots>(g, tile, TileSums(g, tile), sums);
  });
}

}  // namespace

void gemv(const GemvArgs& g) { gemv_of<UnsignedDot>(g); }

}  // namespace dotprod

const KernelRow kDotprodRow{.name = "dotprod",
                            .isa = Isa::Dotprod,
                            .quantize_row = neon::quantize_row,
                            .quantize_planar = neon::quantize_planar,
                            .fake_quantize = neon::fake_quantize,
                            .unpack_tiles = neon::unpack_tiles,
                            .gemm = dotprod::gemm,
                            .gemm_rows = kGemmRows,  // as in the neon row
                            .gemv = dotprod::gemv,
                            .store = neon::store,
                            .requantize = neon::requantize,
                            .grouped = &neon::kGrouped,
                            .winograd = &neon::kWinograd,
                            .winograd_bytes = &dotprod::kWinogradBytes,
                            .direct_products = 4.0,
                            .image = &kNeonImage};

}  // namespace adalayer::cpu

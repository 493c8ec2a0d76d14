// The row of 64-bit ARM processors with matrix products of bytes (Cortex-A710, Neoverse V1): usmmla
// multiplies two rows of eight levels by two columns of eight weights, of u8 and s8 as they are,
// and adds to four sums of int32, exactly.
//
// A column's eight weights are those of two quads, which lie 64 bytes apart: zip brings them
// together, once for all rows of a pass. Everything but the products is the neon row's, and a
// matrix times a vector, which has one row, is the dotprod row's.
#include <arm_neon.h>

#include <cstring>

#include "cpu/isa/neon/neon.hpp"
#include "cpu/isa/shared/unrolled.hpp"

namespace adalayer::cpu {
namespace i8mm {
namespace {

#include "cpu/isa/neon/products.inl"

struct NoColumns {};

/// sum = vusmmlaq_s32(sum, a, w), in its register: of the intrinsic GCC 12 makes a sum in another
/// one, which it copies back, a third more instructions in the loop.
[[gnu::always_inline]] inline void add_products(int32x4_t& sum, uint8x16_t a, int8x16_t w) {
  __asm__("usmmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(w));
}

struct Matrices {
  static constexpr int kRows = 8, kColumns = 8;  // 16 of 32 registers hold sums, 8 levels
  static constexpr int kUnitsTogether = 1;
  using Columns = NoColumns;

  static uint8x16_t levels(uint8x16_t v) { return v; }

  template <int kPassRows>
  struct Sums {
    static constexpr int kPairs = (kPassRows + 1) / 2, kParts = kColumns / 4;
    // Of two rows and two columns each.
    int32x4_t sums[kPairs][kParts * 2];

    void zero() {
      unrolled<0, kPairs * kParts * 2>([&](auto i) __attribute__((always_inline)) {
        sums[i.value / (kParts * 2)][i.value % (kParts * 2)] = vdupq_n_s32(0);
      });
    }
    /// Of an odd number of quads, the one behind them has levels of 0.
    template <int kQuads, bool, bool>
    [[gnu::always_inline]] void multiply(const uint8x16_t (&levels)[kPassRows], const int8_t* w) {
      uint8x16_t a[2][kPairs];
      unrolled<0, kPairs>([&](auto p) __attribute__((always_inline)) {
        // A row without another one is multiplied twice.
        constexpr int second = 2 * p.value + 1 < kPassRows ? 2 * p.value + 1 : 2 * p.value;
        const uint64x2_t x = vreinterpretq_u64_u8(levels[2 * p.value]);
        const uint64x2_t y = vreinterpretq_u64_u8(levels[second]);
        a[0][p.value] = vreinterpretq_u8_u64(vzip1q_u64(x, y));
        a[1][p.value] = vreinterpretq_u8_u64(vzip2q_u64(x, y));
      });
      unrolled<0, (kQuads + 1) / 2 * kParts>([&](auto i) __attribute__((always_inline)) {
        constexpr int half = i.value / kParts, part = i.value % kParts;
        const int8_t* at = w + half * 2 * kQuadBytes + part * 16;
        const int32x4_t u = vreinterpretq_s32_s8(vld1q_s8(at));
        const int32x4_t v = vreinterpretq_s32_s8(vld1q_s8(at + kQuadBytes));
        const int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(u, v));
        const int8x16_t second = vreinterpretq_s8_s32(vzip2q_s32(u, v));
        unrolled<0, kPairs>([&](auto p) __attribute__((always_inline)) {
          auto& sum = sums[p.value];
          add_products(sum[2 * part], a[half][p.value], first);
          add_products(sum[2 * part + 1], a[half][p.value], second);
        });
      });
    }
    void store(const NoColumns&, int, int32_t* to) const {
      unrolled<0, kPairs * kParts>([&](auto i) __attribute__((always_inline)) {
        constexpr int p = i.value / kParts, part = i.value % kParts;
        const int64x2_t x = vreinterpretq_s64_s32(sums[p][2 * part]);
        const int64x2_t y = vreinterpretq_s64_s32(sums[p][2 * part + 1]);
        int32_t* at = to + 2 * p * kBlockCols + 4 * part;
        vst1q_s32(at, vreinterpretq_s32_s64(vzip1q_s64(x, y)));
        if constexpr (2 * p + 1 < kPassRows)
          vst1q_s32(at + kBlockCols, vreinterpretq_s32_s64(vzip2q_s64(x, y)));
      });
    }
  };
};

void gemm(const GemmArgs& g) {
  for_tiles(g, [&](const int8_t* tile, int32_t* sums) {
    product_of_tile<Matrices>(g, tile, NoColumns{}, sums);
  });
}

}  // namespace
}  // namespace i8mm

const KernelRow kI8mmRow{.name = "i8mm",
                         .isa = Isa::I8mm,
                         .quantize_row = neon::quantize_row,
                         .quantize_planar = neon::quantize_planar,
                         .fake_quantize = neon::fake_quantize,
                         .unpack_tiles = neon::unpack_tiles,
                         .gemm = i8mm::gemm,
                         .gemv = dotprod::gemv,
                         .store = neon::store,
                         .requantize = neon::requantize,
                         .grouped = &neon::kGrouped,
                         .winograd = &neon::kWinograd,
                         .winograd_bytes = &i8mm::kWinogradBytes,
                         .direct_products = 8.0,
                         .image = &kNeonImage};

}  // namespace adalayer::cpu

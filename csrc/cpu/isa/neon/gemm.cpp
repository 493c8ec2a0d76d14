// Matrix products with the instructions of every 64-bit ARM processor.
//
// smull and smlal multiply eight signed bytes by eight others to int16; sadalp adds pairs of those
// to int32. Levels are unsigned, so 128 is taken off them, and
//
//   sum of a * w = sum of (a - 128) * w + 128 * sum of w,
//
// of which the last is made of a tile's weights, once per call. A product lies between -128 * m and
// 128 * m, where m is the largest |w| of the tile, so that int16 holds 32767 / (128 m) of them: two
// of eight bits (one, if a weight is -128), four of seven, sixteen of four. That many are added
// there before sadalp; the tile's own weights decide, not their width.
#include <arm_neon.h>

#include <cstring>

#include "cpu/isa/neon/neon.hpp"
#include "cpu/isa/shared/unrolled.hpp"

namespace adalayer::cpu::neon {
namespace {

#include "cpu/isa/neon/bytes128.inl"
// Each of the next two builds on it.
#include "cpu/isa/neon/gemv.inl"
#include "cpu/isa/neon/products.inl"

/// What is to be added to the sums of a tile, and the largest |w|.
struct TileSums {
  int32_t correction[formats::kTileWidth];
  int most;

  TileSums(const GemmArgs& g, const int8_t* tile) {
    int32x4_t sums[4];
    for (auto& sum : sums)
      sum = vdupq_n_s32(0);
    uint8x16_t largest = vdupq_n_u8(0);
    for (int64_t s = 0; s < g.steps; ++s) {
      const int8_t* w = tile + s * formats::kTileBytes;
      for (int quad = 0; quad < g.live_quads[s]; ++quad, w += kQuadBytes)
        unrolled<0, 4>([&](auto part) __attribute__((always_inline)) {
          const int8x16_t v = vld1q_s8(w + part.value * 16);
          sums[part.value] = vpadalq_s16(sums[part.value], vpaddlq_s8(v));
          largest = vmaxq_u8(largest, vreinterpretq_u8_s8(vabsq_s8(v)));  // of -128: 128
        });
    }
    for (int part = 0; part < 4; ++part)
      vst1q_s32(correction + 4 * part, vshlq_n_s32(sums[part], 7));
    most = vmaxvq_u8(largest);
  }
};

/// int16 holds kRun quads' products.
template <int kRun>
struct Bytes {
  static constexpr int kRows = 3, kColumns = 8;
  static constexpr int kUnitsTogether = kRun > kUnitQuads ? kRun / kUnitQuads : 1;
  using Columns = TileSums;

  static int8x16_t as_signed(uint8x16_t v) { return vreinterpretq_s8_u8(v); }
  static uint8x16_t levels(uint8x16_t v) { return veorq_u8(v, vdupq_n_u8(128)); }

  template <int kPassRows>
  struct Sums {
    // Of two columns each, and of each the products of bytes 0 and 1, 2 and 3 of the quads.
    int32x4_t sums[kPassRows][4];
    int16x8_t run[kPassRows][4];

    void zero() {
      unrolled<0, kPassRows * 4>([&](auto i) __attribute__((always_inline)) {
        sums[i.value / 4][i.value % 4] = vdupq_n_s32(0);
      });
    }
    template <int kQuads, bool kFirst, bool kLast>
    [[gnu::always_inline]] void multiply(const uint8x16_t (&levels)[kPassRows], const int8_t* w) {
      unrolled<0, kQuads>([&](auto quad) __attribute__((always_inline)) {
        constexpr int q = quad.value;
        constexpr bool kBegins = kRun >= kUnitQuads ? kFirst && q == 0 : q % kRun == 0;
        constexpr bool kEnds =
            kRun >= kUnitQuads ? kLast && q == kQuads - 1 : q % kRun == kRun - 1 || q == kQuads - 1;
        const int8x16_t w0 = vld1q_s8(w + q * kQuadBytes);
        const int8x16_t w1 = vld1q_s8(w + q * kQuadBytes + 16);
        unrolled<0, kPassRows>([&](auto r) __attribute__((always_inline)) {
          const int8x16_t a = as_signed(
              vreinterpretq_u8_u32(vdupq_laneq_u32(vreinterpretq_u32_u8(levels[r.value]), q)));
          auto& to = run[r.value];
          if constexpr (kBegins) {
            to[0] = vmull_s8(vget_low_s8(w0), vget_low_s8(a));
            to[1] = vmull_high_s8(w0, a);
            to[2] = vmull_s8(vget_low_s8(w1), vget_low_s8(a));
            to[3] = vmull_high_s8(w1, a);
          } else {
            to[0] = vmlal_s8(to[0], vget_low_s8(w0), vget_low_s8(a));
            to[1] = vmlal_high_s8(to[1], w0, a);
            to[2] = vmlal_s8(to[2], vget_low_s8(w1), vget_low_s8(a));
            to[3] = vmlal_high_s8(to[3], w1, a);
          }
          if constexpr (kEnds)
            unrolled<0, 4>([&](auto i) __attribute__((always_inline)) {
              sums[r.value][i.value] = vpadalq_s16(sums[r.value][i.value], to[i.value]);
            });
        });
      });
    }
    void store(const TileSums& tile, int column, int32_t* to) const {
      for (int half = 0; half < 2; ++half) {
        const int32x4_t correction = vld1q_s32(tile.correction + column + 4 * half);
        unrolled<0, kPassRows>([&](auto r) __attribute__((always_inline)) {
          const int32x4_t sum = vpaddq_s32(sums[r.value][2 * half], sums[r.value][2 * half + 1]);
          vst1q_s32(to + r.value * kBlockCols + 4 * half, vaddq_s32(sum, correction));
        });
      }
    }
  };
};

struct Dot {
  struct Sum {
    uint32x4_t low, high;  // of two columns each, in halves
  };
  static constexpr int kRegisters = 2;
  static Sum zero() { return {vdupq_n_u32(0), vdupq_n_u32(0)}; }
  static uint32x4_t total(const Sum& sum) { return vpaddq_u32(sum.low, sum.high); }
  template <int kBits>
  static void dot(Sum& sum, uint8x16_t a0, uint8x16_t w0, uint8x16_t a1, uint8x16_t w1) {
    uint16x8_t low = vmull_u8(vget_low_u8(w0), vget_low_u8(a0));
    uint16x8_t high = vmull_high_u8(w0, a0);
    // 2 * 255 * 127 fit uint16, 2 * 255 * 255 do not.
    if constexpr (kBits == 8) {
      sum.low = vpadalq_u16(sum.low, low);
      sum.high = vpadalq_u16(sum.high, high);
      low = vmull_u8(vget_low_u8(w1), vget_low_u8(a1));
      high = vmull_high_u8(w1, a1);
    } else {
      low = vmlal_u8(low, vget_low_u8(w1), vget_low_u8(a1));
      high = vmlal_high_u8(high, w1, a1);
    }
    sum.low = vpadalq_u16(sum.low, low);
    sum.high = vpadalq_u16(sum.high, high);
  }
};

template <int kRun>
void multiply(const GemmArgs& g, const int8_t* tile, const TileSums& columns, int32_t* sums) {
  product_of_tile<Bytes<kRun>>(g, tile, columns, sums);
}

}  // namespace

void gemm(const GemmArgs& g) {
  for_tiles(g, [&](const int8_t* tile, int32_t* sums) {
    const TileSums columns(g, tile);
    if (columns.most < 16)
      multiply<16>(g, tile, columns, sums);
    else if (columns.most < 32)
      multiply<8>(g, tile, columns, sums);
    else if (columns.most < 64)
      multiply<4>(g, tile, columns, sums);
    else if (columns.most < 128)
      multiply<2>(g, tile, columns, sums);
    else
      multiply<1>(g, tile, columns, sums);
  });
}

void gemv(const GemvArgs& g) { gemv_of<Dot>(g); }

void unpack_tiles(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  unpack_planar<Bytes128>(packed, bits, count, out);
}

}  // namespace adalayer::cpu::neon

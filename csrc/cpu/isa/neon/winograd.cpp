// Winograd with the instructions of every 64-bit ARM processor.
//
// smlal multiplies four int16 factors of one channel's outputs by that channel's factor of a tile,
// which it takes from a lane. Taps lie in pairs of channels: ld2 takes those apart, once for all
// tiles of a pass. There is no instruction that adds the two products of a pair, and none is
// needed.
#include <arm_neon.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/isa/neon/neon.hpp"
#include "cpu/isa/shared/unrolled.hpp"
#include "cpu/winograd_kernels.hpp"

namespace adalayer::cpu::neon {
namespace {

struct Vec {
  using T = int32x4_t;
  static constexpr int kLevels = 8;  // levels, or factors, of a vector
  static constexpr int kSums = 4;
  static constexpr int kGroups = 1, kRows = 4;  // 16 of 32 registers hold sums

  static int16x8_t words(T v) { return vreinterpretq_s16_s32(v); }
  static T dwords(int16x8_t v) { return vreinterpretq_s32_s16(v); }
  static T load(const void* p) {
    return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
  }
  static void store(void* p, T v) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(v)); }
  static T load_levels(const uint8_t* p) { return vreinterpretq_s32_u16(vmovl_u8(vld1_u8(p))); }
  static T load_narrow(const uint8_t* p) {
    return dwords(vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))));
  }
  /// int16 that fit int8.
  static void store_narrow(uint8_t* p, T v) { vst1_u8(p, vreinterpret_u8_s8(vmovn_s16(words(v)))); }
  static T set32(int32_t v) { return vdupq_n_s32(v); }
  static T add16(T a, T b) { return dwords(vaddq_s16(words(a), words(b))); }
  static T sub16(T a, T b) { return dwords(vsubq_s16(words(a), words(b))); }
  template <int kBits>
  static T shl16(T a) {
    return dwords(vshlq_n_s16(words(a), kBits));
  }
  static T add32(T a, T b) { return vaddq_s32(a, b); }
  static T sub32(T a, T b) { return vsubq_s32(a, b); }
  static T mul32(T a, T b) { return vmulq_s32(a, b); }
  template <int kBits>
  static T sra32(T a) {
    return vshrq_n_s32(a, kBits);
  }
};

#include "cpu/isa/shared/winograd.inl"

/// Both channels of a pair, 16 outputs of each.
struct Taps {
  int16x8_t low[2], high[2];

  template <bool kNarrow>
  static Taps load(const uint8_t* p) {
    if constexpr (kNarrow) {
      const int8x16x2_t v = vld2q_s8(reinterpret_cast<const int8_t*>(p));
      return {{vmovl_s8(vget_low_s8(v.val[0])), vmovl_s8(vget_low_s8(v.val[1]))},
              {vmovl_high_s8(v.val[0]), vmovl_high_s8(v.val[1])}};
    } else {
      const auto* at = reinterpret_cast<const int16_t*>(p);
      const int16x8x2_t v = vld2q_s16(at), w = vld2q_s16(at + 16);
      return {{v.val[0], v.val[1]}, {w.val[0], w.val[1]}};
    }
  }
};

/// Channel kLane of the factors, and of a pair of taps.
template <int kLane>
[[gnu::always_inline]] inline void add_products(T (&sums)[4], const Taps& taps, int16x8_t factors) {
  constexpr int c = kLane % 2;
  sums[0] = vmlal_laneq_s16(sums[0], vget_low_s16(taps.low[c]), factors, kLane);
  sums[1] = vmlal_high_laneq_s16(sums[1], taps.low[c], factors, kLane);
  sums[2] = vmlal_laneq_s16(sums[2], vget_low_s16(taps.high[c]), factors, kLane);
  sums[3] = vmlal_high_laneq_s16(sums[3], taps.high[c], factors, kLane);
}

constexpr int kFactorPairs = 4;  // of channels in a register

/// kRows tiles by the outputs of a group, whose sums stay in registers.
template <int kRows, bool kNarrow>
void multiply_rows(const WinogradProductArgs& a, int row) {
  constexpr int64_t kPairBytes = kWinogradGroup * 2 * (kNarrow ? 1 : 2);
  const int16_t* factors = a.factors + row * a.factor_stride;
  const uint8_t* taps = a.taps;
  T sums[kRows][4];
  unrolled<0, kRows * 4>([&](auto i) __attribute__((always_inline)) {
    sums[i.value / 4][i.value % 4] = vdupq_n_s32(0);
  });
  int64_t pairs = a.pairs;
  for (; pairs >= kFactorPairs; pairs -= kFactorPairs) {
    int16x8_t f[kRows];
    unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
      f[r.value] = vld1q_s16(factors + r.value * a.factor_stride);
    });
    __builtin_prefetch(taps + kFactorPairs * kPairBytes * 8);
    unrolled<0, kFactorPairs>([&](auto pair) __attribute__((always_inline)) {
      const Taps w = Taps::load<kNarrow>(taps + pair.value * kPairBytes);
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        add_products<2 * pair.value>(sums[r.value], w, f[r.value]);
        add_products<2 * pair.value + 1>(sums[r.value], w, f[r.value]);
      });
    });
    factors += 2 * kFactorPairs;
    taps += kFactorPairs * kPairBytes;
  }
  for (; pairs > 0; --pairs, factors += 2, taps += kPairBytes) {
    const Taps w = Taps::load<kNarrow>(taps);
    unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
      int32_t pair;
      std::memcpy(&pair, factors + r.value * a.factor_stride, sizeof pair);
      const int16x8_t f = vreinterpretq_s16_s32(vdupq_n_s32(pair));
      add_products<0>(sums[r.value], w, f);
      add_products<1>(sums[r.value], w, f);
    });
  }
  int32_t* products = a.products + row * kWinogradGroup;
  unrolled<0, kRows * 4>([&](auto i) __attribute__((always_inline)) {
    vst1q_s32(products + i.value * 4, sums[i.value / 4][i.value % 4]);
  });
}

/// All rows, in passes of nearly equal size.
template <bool kNarrow, int... kRow>
void multiply_all(const WinogradProductArgs& a, std::integer_sequence<int, kRow...>) {
  static constexpr void (*kPass[])(const WinogradProductArgs&,
                                   int) = {multiply_rows<kRow + 1, kNarrow>...};
  const int passes = (a.rows + Vec::kRows - 1) / Vec::kRows;
  const int rows = a.rows / passes, more = a.rows % passes;  // the first `more` have one more
  for (int pass = 0, row = 0; pass < passes; ++pass) {
    kPass[rows - (pass < more ? 0 : 1)](a, row);
    row += rows + (pass < more ? 1 : 0);
  }
}

void multiply(const WinogradProductArgs& a) {
  constexpr auto kRows = std::make_integer_sequence<int, Vec::kRows>();
  a.narrow ? multiply_all<true>(a, kRows) : multiply_all<false>(a, kRows);
}

/// One axis of F(2x2), modulo 256.
[[gnu::always_inline]] inline void byte_axis(const uint8x16_t (&d)[4], uint8x16_t (&v)[4]) {
  v[0] = vsubq_u8(d[0], d[2]);
  v[1] = vaddq_u8(d[1], d[2]);
  v[2] = vsubq_u8(d[2], d[1]);
  v[3] = vsubq_u8(d[1], d[3]);
}

template <bool kOfTwo>
void byte_input(const WinogradByteInputArgs& a) {
  for (int64_t c = 0; c < a.channels; c += 16) {
    uint8x16_t half[4][4];
    unrolled<0, 4>([&](auto x) __attribute__((always_inline)) {
      uint8x16_t d[4], v[4];
      unrolled<0, 4>([&](auto y) __attribute__((always_inline)) {
        d[y.value] = vld1q_u8(a.rows[y.value] + x.value * a.pitch + c);
      });
      byte_axis(d, v);
      unrolled<0, 4>([&](auto i)
                         __attribute__((always_inline)) { half[i.value][x.value] = v[i.value]; });
    });
    auto* out = reinterpret_cast<uint8_t*>(a.factors) + (kOfTwo ? 2 * c : c);
    unrolled<0, 4>([&](auto i) __attribute__((always_inline)) {
      uint8x16_t v[4];
      byte_axis(half[i.value], v);
      unrolled<0, 4>([&](auto j) __attribute__((always_inline)) {
        uint8x16_t factor = v[j.value];
        if constexpr (4 * i.value + j.value == reference::kWinogradSumTap)
          factor = vsubq_u8(factor, vdupq_n_u8(reference::kWinogradSumOffset));
        if constexpr (kOfTwo) {
          vst1_u8(out, vget_low_u8(factor));
          vst1_u8(out + 16, vget_high_u8(factor));
        } else {
          vst1q_u8(out, factor);
        }
        out += a.tap_stride;
      });
    });
  }
}

}  // namespace

void winograd_byte_input(const WinogradByteInputArgs& a) { byte_input<false>(a); }
void winograd_byte_input_of_two(const WinogradByteInputArgs& a) { byte_input<true>(a); }

const WinogradKernels kWinograd = kernels_named("neon");

}  // namespace adalayer::cpu::neon

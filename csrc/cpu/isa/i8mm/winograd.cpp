// F(2x2) with products of bytes for processors with matrix products: smmla multiplies the cells of
// eight channels of two tiles by those of two outputs. Factors are written, and taps packed, as it
// wants them: two cells beside each other, so that nothing is left to do but load and multiply.
#include <arm_neon.h>

#include <utility>

#include "cpu/isa/neon/neon.hpp"
#include "cpu/isa/shared/unrolled.hpp"

namespace adalayer::cpu::i8mm {
namespace {

constexpr int kMostPairs = 3;  // of rows: 24 of 32 registers hold sums of two rows and two outputs
constexpr int kCell = 8, kCellBytes = kWinogradGroup * kCell;
constexpr int kColumns = kWinogradGroup / 2;  // pairs of outputs

/// sum = vmmlaq_s32(sum, a, w), in its register (row.cpp).
[[gnu::always_inline]] inline void add_products(int32x4_t& sum, int8x16_t a, int8x16_t w) {
  __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(w));
}

template <int kPairs>
void multiply_pairs(const WinogradByteProductArgs& a, int pair) {
  const int8_t* factors = a.factors + pair * 2 * a.depth;
  const int8_t* taps = a.taps;
  int32x4_t sums[kPairs][kColumns];
  unrolled<0, kPairs * kColumns>([&](auto i) __attribute__((always_inline)) {
    constexpr int column = i.value % kColumns;
    sums[i.value / kColumns][column] =
        a.base == nullptr
            ? vdupq_n_s32(0)
            : vcombine_s32(vld1_s32(a.base + 2 * column), vld1_s32(a.base + 2 * column));
  });
  for (int64_t cell = 0; cell < a.cells; ++cell) {
    int8x16_t f[kPairs];
    unrolled<0, kPairs>([&](auto p) __attribute__((always_inline)) {
      f[p.value] = vld1q_s8(factors + p.value * 2 * a.depth);
    });
    __builtin_prefetch(taps + kCellBytes * 8);
    int8x16_t next = vld1q_s8(taps);
    unrolled<0, kColumns>([&](auto column) __attribute__((always_inline)) {
      const int8x16_t w = next;
      if constexpr (column.value + 1 < kColumns)
        next = vld1q_s8(taps + (column.value + 1) * 2 * kCell);
      unrolled<0, kPairs>([&](auto p) __attribute__((always_inline)) {
        add_products(sums[p.value][column.value], f[p.value], w);
      });
    });
    factors += 2 * kCell;
    taps += kCellBytes;
  }
  unrolled<0, kPairs>([&](auto p) __attribute__((always_inline)) {
    const int row = 2 * (pair + p.value);
    int32_t* to = a.products + row * a.product_stride;
    const bool both = row + 1 < a.rows;
    unrolled<0, kColumns / 2>([&](auto i) __attribute__((always_inline)) {
      const int64x2_t x = vreinterpretq_s64_s32(sums[p.value][2 * i.value]);
      const int64x2_t y = vreinterpretq_s64_s32(sums[p.value][2 * i.value + 1]);
      vst1q_s32(to + 4 * i.value, vreinterpretq_s32_s64(vzip1q_s64(x, y)));
      if (both)
        vst1q_s32(to + a.product_stride + 4 * i.value, vreinterpretq_s32_s64(vzip2q_s64(x, y)));
    });
  });
}

/// All pairs of rows, in passes of nearly equal size. Of an odd number, what the last one's
/// neighbour would be is computed and dropped.
template <int... kPair>
void multiply_all(const WinogradByteProductArgs& a, std::integer_sequence<int, kPair...>) {
  static constexpr void (*kPass[])(const WinogradByteProductArgs&,
                                   int) = {multiply_pairs<kPair + 1>...};
  const int all = (a.rows + 1) / 2, passes = (all + kMostPairs - 1) / kMostPairs;
  const int pairs = all / passes, more = all % passes;  // the first `more` have one more
  for (int pass = 0, pair = 0; pass < passes; ++pass) {
    kPass[pairs - (pass < more ? 0 : 1)](a, pair);
    pair += pairs + (pass < more ? 1 : 0);
  }
}

void multiply(const WinogradByteProductArgs& a) {
  multiply_all(a, std::make_integer_sequence<int, kMostPairs>());
}

}  // namespace

const WinogradByteKernels kWinogradBytes{.cell = kCell,
                                         .together = 2,
                                         .rows = 2 * kMostPairs,
                                         .input = neon::winograd_byte_input_of_two,
                                         .multiply = multiply};

}  // namespace adalayer::cpu::i8mm

// F(2x2) with products of bytes for processors with dot products: sdot adds four products of a cell
// of four channels, one output's taps by one tile's factors, which it takes from a lane.
#include <arm_neon.h>

#include <cstring>
#include <utility>

#include "cpu/isa/neon/neon.hpp"
#include "cpu/isa/shared/unrolled.hpp"

namespace adalayer::cpu::dotprod {
namespace {

constexpr int kMostRows = 5;  // 20 of 32 registers hold sums, 5 factors
// Registers of taps that are loaded before they are needed: processors that start instructions in
// order would wait.
constexpr int kAhead = 3;
constexpr int kCell = 4, kCellBytes = kWinogradGroup * kCell;
constexpr int kTogether = 4;  // cells of factors in a register

template <int kRows>
void multiply_rows(const WinogradByteProductArgs& a, int row) {
  const int8_t* factors = a.factors + row * a.depth;
  const int8_t* taps = a.taps;
  int32x4_t sums[kRows][4];
  unrolled<0, kRows * 4>([&](auto i) __attribute__((always_inline)) {
    sums[i.value / 4][i.value % 4] =
        a.base == nullptr ? vdupq_n_s32(0) : vld1q_s32(a.base + 4 * (i.value % 4));
  });
  int64_t cells = a.cells;
  for (; cells >= kTogether; cells -= kTogether) {
    int8x16_t f[kRows];
    unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
      f[r.value] = vld1q_s8(factors + r.value * a.depth);
    });
    __builtin_prefetch(taps + kTogether * kCellBytes * 4);
    int8x16_t w[kAhead];
    unrolled<0, kAhead>(
        [&](auto i) __attribute__((always_inline)) { w[i.value] = vld1q_s8(taps + i.value * 16); });
    unrolled<0, kTogether * 4>([&](auto i) __attribute__((always_inline)) {
      constexpr int later = i.value + kAhead;
      const int8x16_t now = w[i.value % kAhead];
      if constexpr (later < kTogether * 4) w[i.value % kAhead] = vld1q_s8(taps + later * 16);
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        int32x4_t& sum = sums[r.value][i.value % 4];
        sum = vdotq_laneq_s32(sum, now, f[r.value], i.value / 4);
      });
    });
    factors += kTogether * kCell;
    taps += kTogether * kCellBytes;
  }
  for (; cells > 0; --cells, factors += kCell, taps += kCellBytes)
    unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
      int32_t cell;
      std::memcpy(&cell, factors + r.value * a.depth, sizeof cell);
      const int8x16_t f = vreinterpretq_s8_s32(vdupq_n_s32(cell));
      unrolled<0, 4>([&](auto part) __attribute__((always_inline)) {
        int32x4_t& sum = sums[r.value][part.value];
        sum = vdotq_s32(sum, vld1q_s8(taps + part.value * 16), f);
      });
    });
  unrolled<0, kRows * 4>([&](auto i) __attribute__((always_inline)) {
    vst1q_s32(a.products + (row + i.value / 4) * a.product_stride + 4 * (i.value % 4),
              sums[i.value / 4][i.value % 4]);
  });
}

/// All rows, in passes of nearly equal size.
template <int... kRow>
void multiply_all(const WinogradByteProductArgs& a, std::integer_sequence<int, kRow...>) {
  static constexpr void (*kPass[])(const WinogradByteProductArgs&,
                                   int) = {multiply_rows<kRow + 1>...};
  const int passes = (a.rows + kMostRows - 1) / kMostRows;
  const int rows = a.rows / passes, more = a.rows % passes;  // the first `more` have one more
  for (int pass = 0, row = 0; pass < passes; ++pass) {
    kPass[rows - (pass < more ? 0 : 1)](a, row);
    row += rows + (pass < more ? 1 : 0);
  }
}

void multiply(const WinogradByteProductArgs& a) {
  multiply_all(a, std::make_integer_sequence<int, kMostRows>());
}

}  // namespace

const WinogradByteKernels kWinogradBytes{.cell = kCell,
                                         .together = 1,
                                         .rows = kMostRows,
                                         .input = neon::winograd_byte_input,
                                         .multiply = multiply};

}  // namespace adalayer::cpu::dotprod

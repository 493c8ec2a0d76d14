// Depthwise and grouped convolutions with AVX-512-VNNI, also for the AMX row.
#include <immintrin.h>

#include "cpu/grouped_kernels.hpp"

namespace adalayer::cpu::avx512vnni {
namespace {

#include "cpu/isa/shared/grouped.inl"

#include "cpu/isa/avx512/grouped512.inl"

struct Vnni512 : Grouped512 {
  static constexpr int kRows = 4, kHalves = 1;

  /// Four rows of bytes to dwords of four vertical neighbours: 4 channels of each 128-bit piece in
  /// every vector, in order.
  static void interleave(const I* row, uint8_t* to) {
    I pair[2];
    interleave_half<0>(row, pair);
    store(to, pair[0]);
    store(to + 64, pair[1]);
    interleave_half<1>(row, pair);
    store(to + 128, pair[0]);
    store(to + 192, pair[1]);
  }
  /// Vectors 2 * kHalf and 2 * kHalf + 1 of them.
  template <int kHalf>
  static void interleave_half(const I* row, I* to) {
    const I top =
        kHalf == 0 ? _mm512_unpacklo_epi8(row[0], row[1]) : _mm512_unpackhi_epi8(row[0], row[1]);
    const I bottom =
        kHalf == 0 ? _mm512_unpacklo_epi8(row[2], row[3]) : _mm512_unpackhi_epi8(row[2], row[3]);
    to[0] = _mm512_unpacklo_epi16(top, bottom);
    to[1] = _mm512_unpackhi_epi16(top, bottom);
  }
  static I dot(I sum, I data, I w) {
#ifdef __AVX512VNNI__
    // Operands of the intrinsic are copied between registers by g++ 12, at every use.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(data), "vm"(w));
    return sum;
#else  // in tests, over instructions in software
    return _mm512_dpbusd_epi32(sum, data, w);
#endif
  }
  static I dot_column(I sum, I data, I w) { return dot(sum, data, w); }
  static I half(I v, int) { return v; }
};

using V = Vnni512;
using I = Vnni512::I;
using F = Vnni512::F;

// Kernels of up to 4 x 3, the usual ones: weights stay in registers, and three interleaved columns
// slide over the row.

template <int kSplit>
void load_rows(const GroupedTile& t, int64_t column, I* row) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
    row[k] = V::load_split<kSplit>(t.rows + k, 4, column * t.pitch);
}

/// Half the vectors of two output rows, stride 1. The first half leaves words for the second.
template <int kHalf, int kSplit, bool kClamp>
void two_rows_of_three(const GroupedTile& t, const Finish<V>& finish) {
  const auto* weights = static_cast<const I*>(t.weights) + kHalf * 2 * 3 * 2;
  I w[2][3][2], correction[2];
  F scale[2], bias[2];
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    correction[v] = V::load_constant(t.constants, 2 * kHalf + v);
    scale[v] = V::as_floats(V::load_constant(t.constants, 4 + 2 * kHalf + v));
    bias[v] = V::as_floats(V::load_constant(t.constants, 8 + 2 * kHalf + v));
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx)
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r)
        w[v][kx][r] = V::load(weights + (v * 3 + kx) * 2 + r);
  }
  const auto column = [&](int64_t x, I* to) __attribute__((always_inline)) {
    I row[4];
    load_rows<kSplit>(t, x, row);
    V::interleave_half<kHalf>(row, to);
  };
  const auto emit = [&](int64_t x, const I* a, const I* b,
                        const I* c) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      I q[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        I sum = V::dot(correction[v], a[v], w[v][0][r]);
        sum = V::dot(sum, b[v], w[v][1][r]);
        sum = V::dot(sum, c[v], w[v][2][r]);
        F y = V::fma(V::to_floats(sum), scale[v], bias[v]);
        y = V::mul_floats(y, finish.inv_scale);
        if constexpr (kClamp) y = finish.clamp(y);
        q[v] = V::round(y);
      }
      const I words = finish.words(q[0], q[1]);
      uint8_t* waiting = t.scratch + (2 * x + r) * 64;
      if constexpr (kHalf == 0)
        V::store(waiting, words);
      else
        V::store_split<kSplit>(t.out + r, 2, x * t.out_pitch, finish.bytes(V::load(waiting), words),
                               t.bytes);
    }
  };
  I a[2], b[2], c[2];
  column(0, a);
  column(1, b);
  int64_t x = 0;
  for (; x + 3 <= t.count; x += 3) {
    column(x + 2, c);
    emit(x, a, b, c);
    column(x + 3, a);
    emit(x + 1, b, c, a);
    column(x + 4, b);
    emit(x + 2, c, a, b);
  }
  if (x == t.count) return;
  column(x + 2, c);
  emit(x, a, b, c);
  if (x + 1 == t.count) return;
  column(x + 3, a);
  emit(x + 1, b, c, a);
}

/// One output row. Neighbouring outputs share a column at stride 2, and none beyond.
template <int kSplit, bool kClamp>
void one_row_of_three(const GroupedTile& t, const Finish<V>& finish) {
  const auto* weights = static_cast<const I*>(t.weights);
  I w[4][3];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v)
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx)
      w[v][kx] = V::load(weights + (v * 3 + kx) * t.weight_rows);
  const auto column = [&](int64_t x, I* to) __attribute__((always_inline)) {
    I row[4];
    load_rows<kSplit>(t, x, row);
    V::interleave_half<0>(row, to);
    V::interleave_half<1>(row, to + 2);
  };
  const auto emit = [&](int64_t x, const I* a, const I* b,
                        const I* c) __attribute__((always_inline)) {
    I q[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      I sum = V::dot(V::load_constant(t.constants, v), a[v], w[v][0]);
      sum = V::dot(sum, b[v], w[v][1]);
      sum = V::dot(sum, c[v], w[v][2]);
      F y = V::fma(V::to_floats(sum), V::as_floats(V::load_constant(t.constants, 4 + v)),
                   V::as_floats(V::load_constant(t.constants, 8 + v)));
      y = V::mul_floats(y, finish.inv_scale);
      if constexpr (kClamp) y = finish.clamp(y);
      q[v] = V::round(y);
    }
    V::store_split<kSplit>(t.out, 1, x * t.out_pitch,
                           finish.bytes(finish.words(q[0], q[1]), finish.words(q[2], q[3])),
                           t.bytes);
  };
  I a[4], b[4], c[4];
  if (t.stride_w > 2) {
    for (int64_t x = 0; x < t.count; ++x) {
      column(x * t.stride_w, a);
      column(x * t.stride_w + 1, b);
      column(x * t.stride_w + 2, c);
      emit(x, a, b, c);
    }
    return;
  }
  column(0, a);
  int64_t x = 0;
  for (; x + 2 <= t.count; x += 2) {
    column(2 * x + 1, b);
    column(2 * x + 2, c);
    emit(x, a, b, c);
    column(2 * x + 3, b);
    column(2 * x + 4, a);
    emit(x + 1, c, b, a);
  }
  if (x == t.count) return;
  column(2 * x + 1, b);
  column(2 * x + 2, c);
  emit(x, a, b, c);
}

template <int kSplit, bool kClamp>
void rows_of_three(const GroupedTile& t) {
  const Finish<V> finish(t);
  if (t.out_rows == 1) return one_row_of_three<kSplit, kClamp>(t, finish);
  two_rows_of_three<0, kSplit, kClamp>(t, finish);
  two_rows_of_three<1, kSplit, kClamp>(t, finish);
}

void any_depthwise(const GroupedTile& t) {
  const bool sliding = t.out_rows == 2 ? t.stride_w == 1 : t.stride_w > 1;
  if (t.row_count != 4 || t.kernel_w != 3 || t.dilation_w != 1 || !sliding ||
      t.residual != nullptr || t.expand != nullptr || t.sums != nullptr)
    return depthwise<V>(t);
  const bool clamp = !t.bounded;
  if (t.splits == 1)
    clamp ? rows_of_three<1, true>(t) : rows_of_three<1, false>(t);
  else if (t.splits == 2)
    clamp ? rows_of_three<2, true>(t) : rows_of_three<2, false>(t);
  else
    clamp ? rows_of_three<4, true>(t) : rows_of_three<4, false>(t);
}

}  // namespace

const GroupedKernels kGrouped{V::kLanes,     V::kRows,   V::kHalves,
                              any_depthwise, in_lane<V>, broadcast<V>};

}  // namespace adalayer::cpu::avx512vnni

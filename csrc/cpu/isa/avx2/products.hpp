// What the matrix products of the AVX2 row have in common: passes of rows.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/isa/shared/unrolled.hpp"
#include "cpu/kernel_table.hpp"

// For files with instruction-set flags: nothing in here may be one function for the whole program.
namespace adalayer::cpu {
namespace {

constexpr int kMostAbs = 128;  // of the weights of one sign in an int16 sum
static_assert(255 * kMostAbs <= 32767);

constexpr int pairs_in_int16(int bits) { return kMostAbs / (2 << (bits - 1)); }

constexpr int kTileCols = formats::kTileWidth;
constexpr int kVectorCols = 8;  // columns of a vector of sums
constexpr int kQuadBytes = kTileCols * 4;
constexpr int kVectorBytes = 32;

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline __m256i broadcast(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

/// The levels of a quad in every dword, of 8 quads or as many as there are: no byte behind those is
/// read.
inline __m256i load_quads(const uint8_t* levels, int64_t quads) {
  if (quads >= 8) return load(levels);
  const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_epi32(
      reinterpret_cast<const int*>(levels),
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(quads)), numbers));
}

/// Levels in 16 bits, of 8 quads or as many as there are: those numbered 0 and 2 of each quad, and
/// `plane` bytes behind them 1 and 3.
inline void widen_quads(const uint8_t* levels, int64_t quads, uint8_t* to, int64_t plane) {
  const __m256i v = load_quads(levels, quads);
  store(to, _mm256_and_si256(v, _mm256_set1_epi16(255)));
  store(to + plane, _mm256_srli_epi16(v, 8));
}

// Sums that stay in their registers. Of the intrinsics GCC makes a sum in another register, which
// it copies back: a fifth more instructions in loops that the decoders bound.
[[gnu::always_inline]] inline void add16(__m256i& sum, __m256i v) {
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v));
}
[[gnu::always_inline]] inline void add32(__m256i& sum, __m256i v) {
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v));
}

/// Where the levels of a pass over kRows rows are.
template <int kRows>
struct Rows {
  const uint8_t* at[kRows];

  Rows(const GemmArgs& g, int row) {
    for (int r = 0; r < kRows; ++r)
      at[r] = g.activations + g.row_offsets[row + r];
  }
};

/// fn(row, rows) for stretches of at most kMost rows that are nearly equal.
template <int kMost, class Fn>
inline void for_stretches(int rows, const Fn& fn) {
  const int stretches = (rows + kMost - 1) / kMost;
  if (stretches == 0) return;
  const int least = rows / stretches, larger = rows % stretches;
  for (int i = 0, row = 0; i < stretches; ++i) {
    const int count = i < larger ? least + 1 : least;
    fn(row, count);
    row += count;
  }
}

/// The same with their number known to the compiler: fn(row, Index<rows>{}).
template <int kMost, class Fn>
inline void for_passes(int rows, const Fn& fn) {
  for_stretches<kMost>(rows, [&](int row, int count) {
    unrolled<1, kMost + 1>([&](auto n) {
      if (count == n.value) fn(row, n);
    });
  });
}

/// Adds the products of one quad of levels with two vectors of its weights to their int16 sums.
[[gnu::always_inline]] inline void add_quad(const uint8_t* levels, __m256i w0, __m256i w1,
                                            __m256i& sum0, __m256i& sum1) {
  __m256i v, products;
  __asm__(
      "vpbroadcastd %[levels], %[v]\n\t"
      "vpmaddubsw %[w0], %[v], %[products]\n\t"
      "vpmaddubsw %[w1], %[v], %[v]\n\t"
      "vpaddw %[products], %[sum0], %[sum0]\n\t"
      "vpaddw %[v], %[sum1], %[sum1]"
      : [v] "=&x"(v), [products] "=&x"(products), [sum0] "+x"(sum0), [sum1] "+x"(sum1)
      : [levels] "m"(*reinterpret_cast<const uint8_t (*)[4]>(levels)), [w0] "x"(w0), [w1] "x"(w1));
}

/// Where a quad (a group of four levels and their weights) has its levels, in bytes from a row's
/// start, and its weights, from wherever a list has its own.
struct Quad {
  int32_t level, weights;
  uint32_t order;  // of the levels (arrange.hpp); 0 is their own
};

/// Quads of two vectors of weights each, of which int16 holds `run` together.
struct Runs {
  const int8_t* weights;
  const Quad* begin;
  int count;
  int run;
};

/// sums[r][..] of kRows rows plus, or if `first` equal to, the products of all quads. The int16
/// sums have the registers; the int32 ones are in memory.
template <int kRows>
[[gnu::always_inline]] inline void multiply_runs(const Rows<kRows>& rows, const Runs& runs,
                                                 bool first, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  const Quad *quad = runs.begin, *const end = quad + runs.count;
  while (quad != end) {
    const Quad* const last = end - quad > runs.run ? quad + runs.run : end;
    __m256i pairs[kRows][2];
    const auto step = [&](auto is_first) __attribute__((always_inline)) {
      const int8_t* weights = runs.weights + quad->weights;
      const __m256i w0 = load(weights), w1 = load(weights + kVectorBytes);
      const int64_t at = quad->level;
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        const uint8_t* levels = rows.at[r.value] + at;
        if constexpr (is_first.value != 0) {
          const __m256i v = broadcast(levels);
          pairs[r.value][0] = _mm256_maddubs_epi16(v, w0);
          pairs[r.value][1] = _mm256_maddubs_epi16(v, w1);
        } else {
          add_quad(levels, w0, w1, pairs[r.value][0], pairs[r.value][1]);
        }
      });
      ++quad;
    };
    step(Index<1>{});
    while (quad != last)
      step(Index<0>{});
    unrolled<0, 2>([&](auto half) __attribute__((always_inline)) {
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        int32_t* sum = sums + r.value * kBlockCols + half.value * kVectorCols;
        const __m256i products = _mm256_madd_epi16(pairs[r.value][half.value], ones);
        store(sum, first ? products : _mm256_add_epi32(load(sum), products));
      });
    });
    first = false;
  }
}

}  // namespace
}  // namespace adalayer::cpu

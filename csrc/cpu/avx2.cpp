// AVX2 with FMA. There is no exact u8 x s8 dot product here: vpmaddubsw adds pairs of products in
// int16, where two products of 8-bit weights may saturate. Narrower weights leave room instead, so
// that several pairs are added before they are widened to int32.
#include <immintrin.h>

#include <cstring>

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace avx2 {
namespace {

#include "cpu/avx2.inl"

/// How many pairs of products of `bits`-bit weights are added in int16. 2 * 255 * 2^(bits-1) * n
/// must not exceed 2^15 - 1: 1, 2, 4, 8, ... for 7, 6, 5, 4, ... bits. Those below are as many as
/// pay.
constexpr int pairs_in_int16(int bits) { return bits == 7 ? 1 : bits >= 5 ? 2 : 8; }
static_assert(2 * 255 * 64 * pairs_in_int16(7) <= 32767);
static_assert(2 * 255 * 32 * pairs_in_int16(6) <= 32767);
static_assert(2 * 255 * 8 * pairs_in_int16(4) <= 32767);

// ------------------------------------------------------------------------------------------ gemm

// Quads (groups of four levels and their weights) that are prepared together: 64 of a column tile
// are 4 KiB, so that with the activations they stay in the first-level cache.
constexpr int kChunk = 64;

struct Quads {
  int count = 0;
  int64_t level[kChunk];         // byte offset in a row of activations
  const int8_t* weight[kChunk];  // 64 weights each

  void add(int64_t at, const int8_t* w) {
    level[count] = at;
    weight[count++] = w;
  }
};

/// sums[kRows][16] += factor * products of all quads, of which kRun may be added in int16.
template <int kRun, int kRows>
void multiply(const Quads& quads, const uint8_t* a, const int32_t* offsets, int factor,
              int32_t* sums) {
  // The empty assembly keeps these values in registers as they stand: the compiler would compute
  // the row addresses anew for every quad, and carry a running sum through memory.
  const uint8_t* rows[kRows];
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    rows[r.value] = a + offsets[r.value];
    __asm__("" : "+r"(rows[r.value]));
  });
  const __m256i factors = _mm256_set1_epi16(static_cast<int16_t>(factor));
  const auto at = [&](int r, int half) __attribute__((always_inline)) {
    return reinterpret_cast<__m256i*>(sums + r * kBlockCols + half * 8);
  };
  __m256i acc[kRows][2];
  int i = 0;
  if constexpr (kRun <= 2) {
    // int32 sums in registers; the weights of a run are operands in memory.
    unrolled<0, kRows * 2>([&](auto k) __attribute__((always_inline)) {
      acc[k.value / 2][k.value % 2] = _mm256_loadu_si256(at(k.value / 2, k.value % 2));
    });
    const auto run = [&](auto length) __attribute__((always_inline)) {
      const int8_t* weight[2] = {quads.weight[i], nullptr};
      int64_t level[2] = {quads.level[i], 0};
      if constexpr (length.value == 2) {
        weight[1] = quads.weight[i + 1];
        level[1] = quads.level[i + 1];
      }
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        __m256i pairs[2];
        unrolled<0, length.value * 2>([&](auto k) __attribute__((always_inline)) {
          constexpr int j = k.value / 2, half = k.value % 2;
          const __m256i product =
              _mm256_maddubs_epi16(Bytes256::broadcast(rows[r.value] + level[j]),
                                   Bytes256::load_weights(weight[j] + half * 32));
          pairs[half] = j == 0 ? product : _mm256_add_epi16(pairs[half], product);
        });
        unrolled<0, 2>([&](auto half) __attribute__((always_inline)) {
          __m256i& sum = acc[r.value][half.value];
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs[half.value], factors));
          __asm__("" : "+x"(sum));
        });
      });
      i += length.value;
    };
    while (i + kRun <= quads.count)
      run(Index<kRun>{});
    while (i < quads.count)
      run(Index<1>{});
    unrolled<0, kRows * 2>([&](auto k) __attribute__((always_inline)) {
      _mm256_storeu_si256(at(k.value / 2, k.value % 2), acc[k.value / 2][k.value % 2]);
    });
  } else {
    // int16 sums in registers, of which every run adds its own to the int32 sums in memory.
    while (i < quads.count) {
      const int last = i + kRun < quads.count ? i + kRun : quads.count;
      unrolled<0, kRows * 2>([&](auto k) __attribute__((always_inline)) {
        acc[k.value / 2][k.value % 2] = _mm256_setzero_si256();
        __asm__("" : "+x"(acc[k.value / 2][k.value % 2]));
      });
      for (; i < last; ++i) {
        const int8_t* weight = quads.weight[i];
        const int64_t level = quads.level[i];
        const __m256i w[2] = {Bytes256::load_weights(weight), Bytes256::load_weights(weight + 32)};
        unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
          const __m256i v = Bytes256::broadcast(rows[r.value] + level);
          unrolled<0, 2>([&](auto half) __attribute__((always_inline)) {
            __m256i& sum = acc[r.value][half.value];
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(v, w[half.value]));
            __asm__("" : "+x"(sum));
          });
        });
      }
      unrolled<0, kRows * 2>([&](auto k) __attribute__((always_inline)) {
        constexpr int r = k.value / 2, half = k.value % 2;
        _mm256_storeu_si256(at(r, half),
                            _mm256_add_epi32(_mm256_loadu_si256(at(r, half)),
                                             _mm256_madd_epi16(acc[r][half], factors)));
      });
    }
  }
}

template <int kRun>
void multiply_rows(const Quads& quads, const uint8_t* a, const int32_t* offsets, int rows,
                   int factor, int32_t* sums) {
  if (quads.count == 0) return;
  switch (rows) {
    case 1:
      return multiply<kRun, 1>(quads, a, offsets, factor, sums);
    case 2:
      return multiply<kRun, 2>(quads, a, offsets, factor, sums);
    case 3:
      return multiply<kRun, 3>(quads, a, offsets, factor, sums);
    default:
      return multiply<kRun, 4>(quads, a, offsets, factor, sums);
  }
}

/// Eight-bit weights, sorted by what makes their products exact.
///
/// vpmaddubsw adds two products: 255 * (w0 + w1) at worst where the signs are equal, less where
/// they are not. So |w0 + w1| <= 128 for all pairs of a quad is enough, and true for almost all
/// quads of trained layers. The others are split into w = 16 * high + low with both in -8..8: two
/// products of half the width, eight pairs of which an int16 holds.
struct Sorted {
  Quads whole, high, low;
  alignas(32) int8_t parts[2][kChunk][64];

  void add(int64_t level, const int8_t* weight) {
    const __m256i w[2] = {Bytes256::load_weights(weight), Bytes256::load_weights(weight + 32)};
    const __m256i ones = Bytes256::set1(1), limit = _mm256_set1_epi16(128);
    __m256i beyond = _mm256_setzero_si256();
    for (const __m256i& half : w) {
      const __m256i pairs = _mm256_abs_epi16(_mm256_maddubs_epi16(ones, half));
      beyond = _mm256_or_si256(beyond, _mm256_cmpgt_epi16(pairs, limit));
    }
    if (_mm256_testz_si256(beyond, beyond)) return whole.add(level, weight);
    int8_t* to_high = parts[0][high.count];
    int8_t* to_low = parts[1][low.count];
    const __m256i nibble = Bytes256::set1(15), eight = Bytes256::set1(8), one = Bytes256::set1(1);
    for (int half = 0; half < 2; ++half) {
      // low is the signed lower nibble; where it is negative, high is one more than w >> 4.
      const __m256i l = _mm256_and_si256(w[half], nibble);
      const __m256i h = _mm256_and_si256(_mm256_srli_epi16(w[half], 4), nibble);
      const __m256i carry = _mm256_and_si256(_mm256_srli_epi16(w[half], 3), one);
      const auto extended = [&](__m256i v) {
        return _mm256_sub_epi8(_mm256_xor_si256(v, eight), eight);
      };
      Bytes256::store(to_high + half * 32, _mm256_add_epi8(extended(h), carry));
      Bytes256::store(to_low + half * 32, extended(l));
    }
    high.add(level, to_high);
    low.add(level, to_low);
  }
};

// Nibbles of -8..8: the same bound as for four bits.
constexpr int kNibblePairs = pairs_in_int16(4);
constexpr int kRowsAtOnce = 4;

/// Calls fn(chunk) for every kChunk quads of the reduction; begin() and add(level, weight offset)
/// fill one.
template <class Begin, class Add, class Fn>
inline void for_chunks(const GemmArgs& g, const Begin& begin, const Add& add, const Fn& fn) {
  int filled = 0;
  begin();
  for (int64_t s = 0; s < g.steps; ++s) {
    if (filled + g.live_quads[s] > kChunk) {
      fn();
      begin();
      filled = 0;
    }
    for (int quad = 0; quad < g.live_quads[s]; ++quad)
      add(g.step_offsets[s] + quad * 4, s * formats::kTileBytes + quad * 64);
    filled += g.live_quads[s];
  }
  fn();
}

/// Calls fn(row, rows, column tile) for all sums of the block.
template <class Fn>
inline void for_blocks(const GemmArgs& g, const Fn& fn) {
  for (int row = 0; row < g.rows; row += kRowsAtOnce)
    for (int c = 0; c < (g.tile1 != nullptr ? 2 : 1); ++c)
      fn(row, g.rows - row < kRowsAtOnce ? g.rows - row : kRowsAtOnce, c);
}

template <int kRun>
void gemm_narrow(const GemmArgs& g) {
  Quads quads[2];
  for_chunks(
      g, [&] { quads[0].count = quads[1].count = 0; },
      [&](int64_t level, int64_t weight) {
        quads[0].add(level, g.tile0 + weight);
        if (g.tile1 != nullptr) quads[1].add(level, g.tile1 + weight);
      },
      [&] {
        for_blocks(g, [&](int row, int rows, int c) {
          multiply_rows<kRun>(quads[c], g.activations, g.row_offsets + row, rows, 1,
                              g.sums + row * kBlockCols + c * 16);
        });
      });
}

void gemm_wide(const GemmArgs& g) {
  Sorted sorted[2];
  for_chunks(
      g,
      [&] {
        for (Sorted& s : sorted)
          s.whole.count = s.high.count = s.low.count = 0;
      },
      [&](int64_t level, int64_t weight) {
        sorted[0].add(level, g.tile0 + weight);
        if (g.tile1 != nullptr) sorted[1].add(level, g.tile1 + weight);
      },
      [&] {
        for_blocks(g, [&](int row, int rows, int c) {
          const uint8_t* a = g.activations;
          const int32_t* offsets = g.row_offsets + row;
          int32_t* sums = g.sums + row * kBlockCols + c * 16;
          multiply_rows<1>(sorted[c].whole, a, offsets, rows, 1, sums);
          multiply_rows<kNibblePairs>(sorted[c].high, a, offsets, rows, 16, sums);
          multiply_rows<kNibblePairs>(sorted[c].low, a, offsets, rows, 1, sums);
        });
      });
}

void gemm(const GemmArgs& g) {
  std::memset(g.sums, 0, static_cast<size_t>(g.rows) * kBlockCols * sizeof(int32_t));
  switch (g.weight_bits) {
    case 8:
      return gemm_wide(g);
    case 7:
      return gemm_narrow<pairs_in_int16(7)>(g);
    case 6:
    case 5:
      return gemm_narrow<pairs_in_int16(6)>(g);
    default:
      return gemm_narrow<pairs_in_int16(4)>(g);
  }
}

// ------------------------------------------------------------------------------------------ gemv

struct Dot256 : Bytes256 {
  /// As many as an int16 holds, but no more than the vectors of a tile.
  template <int kBits>
  static constexpr int kRun = kBits >= 7   ? 1
                              : kBits == 2 ? 16
                                           : 1 << (7 - kBits);
  static T product(T a, T w) { return _mm256_maddubs_epi16(a, w); }
  static T add_products(T p, T q) { return _mm256_add_epi16(p, q); }
  static T add_to(T sum, T products) {
    return add(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
  static T dot(T sum, T a, T w) { return add_to(sum, product(a, w)); }
};

struct WideDot256 : Bytes256 {
  template <int kBits>
  static constexpr int kRun = 1;
  /// Eight-bit weights, on bytes widened to int16.
  static T dot(T sum, T a, T w) {
    const T even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0x00FF)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    const T odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(w, 8));
    return add(sum, add(even, odd));
  }
};

void gemv(const GemvArgs& g) {
  if (g.bits == 8)
    gemv_bits<WideDot256, 8>(g);
  else
    gemv_narrow<Dot256>(g);
}

}  // namespace
}  // namespace avx2

const KernelRow kAvx2Row{.name = "avx2",
                         .isa = Isa::Avx2,
                         .quantize_row = avx2::quantize_row,
                         .quantize_planar = avx2::quantize_planar,
                         .fake_quantize = avx2::fake_quantize,
                         .unpack_tiles = avx2::unpack_tiles,
                         .begin = avx2::nothing,
                         .end = avx2::nothing,
                         .gemm = avx2::gemm,
                         .gemm_requantize = nullptr,
                         .gemv = avx2::gemv,
                         .store = avx2::store,
                         .block = nullptr,
                         .requantize = requantize_avx2,
                         .stem = {},
                         .grouped = &avx2::kGrouped};

}  // namespace adalayer::cpu

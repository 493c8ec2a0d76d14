// Matrix products with AVX-512 without VNNI, exact at every width.
//
// As with AVX2 (avx2/gemm.cpp), vpmaddubsw adds pairs of products in int16, which holds
// 2^(7 - bits) pairs of b-bit weights before vpmaddwd widens them. Pairs of eight-bit weights may
// be beyond it: where too few are not, so that sorting them gains nothing (gemm_arranged.cpp), they
// are multiplied in 16 bits throughout, two at once with vpmaddwd.
#include <immintrin.h>

#include <cstring>

#include "cpu/isa/avx512/avx512.hpp"
#include "cpu/isa/shared/arranged.hpp"
#include "cpu/isa/shared/unrolled.hpp"

namespace adalayer::cpu::avx512 {
namespace {

#include "cpu/isa/avx512/bytes512.inl"
#include "cpu/isa/shared/passes.inl"
#include "cpu/isa/shared/planar.inl"

constexpr int kQuadsOfStep = 16, kQuadBytes = formats::kTileWidth * 4;

/// Pairs of products that an int16 holds: 255 * 2^(bits - 1) * 2 each, and no more than a step has.
constexpr int pairs_in_int16(int bits) {
  const int pairs = 128 >> bits;
  return pairs < kQuadsOfStep ? pairs : kQuadsOfStep;
}

/// Weights below eight bits.
struct Narrow512 : Bytes512 {
  template <int kBits>
  static constexpr int kRun = pairs_in_int16(kBits);
  static T product(T a, T w) { return _mm512_maddubs_epi16(a, w); }
  static T add_products(T p, T q) { return _mm512_add_epi16(p, q); }
  static T add_to(T sum, T products) {
    return add(sum, _mm512_madd_epi16(products, _mm512_set1_epi16(1)));
  }
  static T dot(T sum, T a, T w) { return add_to(sum, product(a, w)); }
};

/// Eight-bit weights: four of them, or levels, as two pairs of 16 bits.
struct Wide512 : Bytes512 {
  struct Pairs {
    T even, odd;  // bytes 0 and 2 of every dword, 1 and 3
  };
  static Pairs levels(T a) {
    return {_mm512_and_si512(a, _mm512_set1_epi16(255)), _mm512_srli_epi16(a, 8)};
  }
  static Pairs weights(T w) {
    return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
  }
  static T dot(T sum, const Pairs& a, const Pairs& w) {
    return add(add(sum, _mm512_madd_epi16(a.even, w.even)), _mm512_madd_epi16(a.odd, w.odd));
  }
  template <int kBits>
  static constexpr int kRun = 1;
  static T dot(T sum, T a, T w) { return dot(sum, levels(a), weights(w)); }
};

/// The sums of kRows rows from `row` on by one or two column tiles, and the fetching of weights
/// that goes with them.
template <int kRows, int kTiles>
struct Pass {
  const GemmArgs& g;
  const int32_t* offsets;
  const uint8_t* fetch;  // rows have equal shares
  int32_t* out;
  __m512i sums[kRows][kTiles];

  Pass(const GemmArgs& args, int row)
      : g(args),
        offsets(args.row_offsets + row),
        fetch(args.fetch + row * args.fetch_row),
        out(args.sums + row * kBlockCols) {
    each([&](auto r, auto c)
             __attribute__((always_inline)) { sums[r.value][c.value] = _mm512_setzero_si512(); });
  }
  /// fn(r, c) for every row and tile.
  template <class Fn>
  [[gnu::always_inline]] static void each(const Fn& fn) {
    unrolled<0, kRows * kTiles>([&](auto i) __attribute__((always_inline)) {
      fn(Index<i.value / kTiles>{}, Index<i.value % kTiles>{});
    });
  }
  [[gnu::always_inline]] void fetch_lines() {
    for (int line = 0; line < g.fetch_lines; ++line, fetch += 64)
      _mm_prefetch(reinterpret_cast<const char*>(fetch), _MM_HINT_T1);
  }
  /// Of step s and the live quads before it.
  [[gnu::always_inline]] static const int8_t* weights(const GemmArgs& g, int tile, int64_t s,
                                                      int64_t before) {
    return (tile == 0 ? g.tile0 : g.tile1) +
           (g.arranged ? before * kQuadBytes : s * formats::kTileBytes);
  }
  void store() const {
    each([&](auto r, auto c) __attribute__((always_inline)) {
      _mm512_storeu_si512(out + r.value * kBlockCols + c.value * formats::kTileWidth,
                          sums[r.value][c.value]);
    });
  }
};

/// Pairs are summed in int16, `run` quads of each step at a time.
template <int kRows, int kTiles>
[[gnu::noinline]] void narrow_pass(const GemmArgs& g, int row, int run) {
  Pass<kRows, kTiles> pass(g, row);
  int64_t before = 0;  // live quads
  for (int64_t s = 0; s < g.steps; before += g.live_quads[s++]) {
    const uint8_t* a = g.activations + g.step_offsets[s];
    const int8_t* weights[kTiles];
    for (int t = 0; t < kTiles; ++t)
      weights[t] = pass.weights(g, t, s, before);
    pass.fetch_lines();
    const int live = g.live_quads[s];
    for (int quad = 0; quad < live;) {
      __m512i pairs[kRows][kTiles];
      const auto multiply = [&](auto first) __attribute__((always_inline)) {
        __m512i w[kTiles];
        unrolled<0, kTiles>([&](auto c) __attribute__((always_inline)) {
          w[c.value] = Bytes512::load_weights(weights[c.value] + quad * kQuadBytes);
        });
        unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
          const __m512i v = Bytes512::broadcast(a + pass.offsets[r.value] + quad * 4);
          unrolled<0, kTiles>([&](auto c) __attribute__((always_inline)) {
            __m512i& pair = pairs[r.value][c.value];
            const __m512i products = Narrow512::product(v, w[c.value]);
            pair = first.value != 0 ? products : Narrow512::add_products(pair, products);
          });
        });
      };
      const int end = quad + run < live ? quad + run : live;
      multiply(Index<1>{});
      for (++quad; quad < end; ++quad)
        multiply(Index<0>{});
      pass.each([&](auto r, auto c) __attribute__((always_inline)) {
        __m512i& sum = pass.sums[r.value][c.value];
        sum = Narrow512::add_to(sum, pairs[r.value][c.value]);
      });
    }
  }
  pass.store();
}

template <int kRows, int kTiles>
[[gnu::noinline]] void wide_pass(const GemmArgs& g, int row) {
  Pass<kRows, kTiles> pass(g, row);
  int64_t before = 0;  // live quads
  for (int64_t s = 0; s < g.steps; before += g.live_quads[s++]) {
    const uint8_t* a = g.activations + g.step_offsets[s];
    const int8_t* weights[kTiles];
    for (int t = 0; t < kTiles; ++t)
      weights[t] = pass.weights(g, t, s, before);
    pass.fetch_lines();
    for (int quad = 0; quad < g.live_quads[s]; ++quad) {
      Wide512::Pairs w[kTiles];
      unrolled<0, kTiles>([&](auto c) __attribute__((always_inline)) {
        w[c.value] = Wide512::weights(Bytes512::load_weights(weights[c.value] + quad * kQuadBytes));
      });
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        const Wide512::Pairs v =
            Wide512::levels(Bytes512::broadcast(a + pass.offsets[r.value] + quad * 4));
        unrolled<0, kTiles>([&](auto c) __attribute__((always_inline)) {
          __m512i& sum = pass.sums[r.value][c.value];
          sum = Wide512::dot(sum, v, w[c.value]);
        });
      });
    }
  }
  pass.store();
}

// Rows of a pass: two tiles of sums, and of pairs, leave the 32 registers room for the operands.
constexpr int kNarrowRows = 6, kWideRows = 12;

/// A pass over `rows` rows, where kMost is the most that `rows` can be.
template <int kMost, int kTiles>
void narrow_rows(const GemmArgs& g, int row, int rows, int run) {
  if constexpr (kMost > 1)
    if (rows < kMost) return narrow_rows<kMost - 1, kTiles>(g, row, rows, run);
  narrow_pass<kMost, kTiles>(g, row, run);
}
template <int kMost, int kTiles>
void wide_rows(const GemmArgs& g, int row, int rows) {
  if constexpr (kMost > 1)
    if (rows < kMost) return wide_rows<kMost - 1, kTiles>(g, row, rows);
  wide_pass<kMost, kTiles>(g, row);
}

template <int kTiles>
void gemm_tiles(const GemmArgs& g, PlainForm form) {
  if (form == PlainForm::Words)
    return for_passes<kWideRows>(
        g.rows, [&](int row, int rows) { wide_rows<kWideRows, kTiles>(g, row, rows); });
  const int run = g.weight_bits < 8 ? pairs_in_int16(g.weight_bits) : 1;
  for_passes<kNarrowRows>(
      g.rows, [&](int row, int rows) { narrow_rows<kNarrowRows, kTiles>(g, row, rows, run); });
}

/// Of both tiles; None: they are to be taken in their lists' order.
PlainForm arranged_form(const GemmArgs& g) {
  const PlainForm form = arranged_table(g.tile0, g.steps, 0).plain_form;
  const bool both = g.tile1 == nullptr || arranged_table(g.tile1, g.steps, 0).plain_form == form;
  return both ? form : PlainForm::None;
}

}  // namespace

void unpack_tiles(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  unpack_planar<Bytes512>(packed, bits, count, out);
}

void gemm(const GemmArgs& g) {
  const PlainForm form = g.arranged ? arranged_form(g) : PlainForm::Bytes;
  if (form == PlainForm::None) return gemm_arranged(g);
  g.tile1 != nullptr ? gemm_tiles<2>(g, form) : gemm_tiles<1>(g, form);
}

void gemv(const GemvArgs& g) {
  if (g.bits == 8)
    gemv_bits<Wide512, 8>(g);
  else
    gemv_narrow<Narrow512>(g);
}

}  // namespace adalayer::cpu::avx512

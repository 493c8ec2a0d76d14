// Matrix product of the AVX2 row, exact at every width.
//
// vpmaddubsw multiplies 32 u8 levels by s8 weights and adds the products in pairs, saturating at
// int16. A pair of levels times the weights (w0, w1) lies between -255 * n and 255 * p, where n and
// p are the sums of the negative and of the positive ones of |w0| and |w1|: with both at most 128,
// an int16 holds it, and sums of several pairs as long as their n and p do together. So of b-bit
// weights 2^(7 - b) pairs can be added in int16 before vpmaddwd widens them. At 8 bits it depends
// on the weights, by which their quads were sorted (arrange.hpp, gemm_arranged.cpp).
//
// A vpmaddubsw costs as much as a vpmaddwd. Multiplications bound this kernel at 8 bits (two for 32
// products, or three for 64), and the fewer bits, the fewer of them are for widening.
#include "cpu/isa/avx2/gemm.hpp"

#include "cpu/isa/avx2/passes.hpp"

namespace adalayer::cpu {
namespace {

/// Quads of one column tile, all alike: the bound of their width decides.
struct Quads {
  const int8_t* weights;
  const Quad* begin;
  int count;
  bool first;  // nothing has been added to the sums yet, and they hold anything
};

template <int kRows>
void start(const Quads& quads, const int32_t* sums, __m256i (&registers)[kRows][2]) {
  unrolled<0, kRows * 2>([&](auto i) __attribute__((always_inline)) {
    constexpr int r = i.value / 2, half = i.value % 2;
    registers[r][half] =
        quads.first ? _mm256_setzero_si256() : load(sums + r * kBlockCols + half * kVectorCols);
  });
}

template <int kRows>
void finish(const __m256i (&registers)[kRows][2], int32_t* sums) {
  unrolled<0, kRows * 2>([&](auto i) __attribute__((always_inline)) {
    constexpr int r = i.value / 2, half = i.value % 2;
    store(sums + r * kBlockCols + half * kVectorCols, registers[r][half]);
  });
}

/// Adds products of which int16 holds kRun pairs, the last run being whatever is left.
template <int kRun, int kRows>
void multiply_short_runs(const Rows<kRows>& rows, const Quads& quads, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i registers[kRows][2];
  start(quads, sums, registers);
  const Quad *quad = quads.begin, *const end = quad + quads.count;
  const auto run_of = [&](auto run) __attribute__((always_inline)) {
    __m256i pairs[kRows][2];
    unrolled<0, run.value>([&](auto j) __attribute__((always_inline)) {
      const int8_t* weights = quads.weights + quad[j.value].weights;
      const __m256i w[2] = {load(weights), load(weights + kVectorBytes)};
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        const __m256i v = broadcast(rows.at[r.value] + quad[j.value].level);
        unrolled<0, 2>([&](auto half) __attribute__((always_inline)) {
          __m256i& sum = pairs[r.value][half.value];
          const __m256i products = _mm256_maddubs_epi16(v, w[half.value]);
          if constexpr (j.value == 0)
            sum = products;
          else
            add16(sum, products);
        });
      });
    });
    unrolled<0, kRows * 2>([&](auto i) __attribute__((always_inline)) {
      constexpr int r = i.value / 2, half = i.value % 2;
      add32(registers[r][half], _mm256_madd_epi16(pairs[r][half], ones));
    });
    quad += run.value;
  };
  while (end - quad >= kRun)
    run_of(Index<kRun>{});
  while (quad != end)
    run_of(Index<1>{});
  finish(registers, sums);
}

/// Narrow weights; kShort: pairs of a run whose sums stay in registers, or 0.
template <int kShort>
struct Narrow {
  // As many as leave the 16 registers room for the operands.
  static constexpr int kRows = kShort > 0 ? 3 : 6;
  static constexpr uint32_t kChunk = 512;

  explicit Narrow(const GemmArgs& args) : g(args) {}

  void look_up(uint32_t first, uint32_t end) {
    count = 0;
    uint32_t quad = 0;
    for (int64_t s = 0; s < g.steps && quad < end; ++s)
      for (int q = 0; q < g.live_quads[s] && quad < end; ++q, ++quad)
        if (quad >= first)
          list[count++] = {static_cast<int32_t>(g.step_offsets[s] + q * 4),
                           static_cast<int32_t>(s * formats::kTileBytes + q * kQuadBytes), 0};
  }
  template <int kPassRows>
  void multiply(const Rows<kPassRows>& rows, bool first, int32_t* sums) const {
    for (const int8_t* tile : {g.tile0, g.tile1}) {
      if (tile == nullptr) return;
      if constexpr (kShort > 0) {
        multiply_short_runs<kShort>(rows, Quads{tile, list, count, first}, sums);
      } else {
        const int run = pairs_in_int16(g.weight_bits);
        multiply_runs(rows, Runs{tile, list, count, run}, first, sums);
      }
      sums += kTileCols;
    }
  }

  const GemmArgs& g;
  int count = 0;
  Quad list[kChunk];
};

template <class Fn>
void with_form(const GemmArgs& g, const Fn& fn) {
  switch (g.weight_bits) {
    case 7:
      return fn(Narrow<pairs_in_int16(7)>(g));
    case 6:
      return fn(Narrow<pairs_in_int16(6)>(g));
    case 5:
      return fn(Narrow<pairs_in_int16(5)>(g));
    default:
      return fn(Narrow<0>(g));
  }
}

}  // namespace

void gemm_avx2(const GemmArgs& g) {
  if (g.arranged) return gemm_arranged_avx2(g);
  with_form(g, [&](auto form) { gemm(g, form); });
}

void gemm_requantize_avx2(const GemmArgs& g, const RequantizeArgs& q, Requantize requantize) {
  if (q.epilogue->finish.table != nullptr) {
    RequantizeArgs all = q;
    all.rows = g.rows;
    all.tiles = g.tile1 == nullptr ? 1 : 2;
    return with_table_behind(
        all, [&](const RequantizeArgs& plain) { gemm_requantize_avx2(g, plain, requantize); });
  }
  if (!g.arranged) return with_form(g, [&](auto form) { gemm_requantize(g, q, requantize, form); });
  if (!gemm_requantize_short_avx2(g, q, requantize))
    gemm_requantize_arranged_avx2(g, q, requantize);
}

}  // namespace adalayer::cpu

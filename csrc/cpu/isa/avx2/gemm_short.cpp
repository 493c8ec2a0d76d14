// Products of few steps (PlainForm in arrange.hpp): 6 rows by 16 columns in registers, from the
// first product to the requantized level.
#include "cpu/isa/avx2/arrange.hpp"
#include "cpu/isa/avx2/gemm.hpp"
#include "cpu/isa/avx2/passes.hpp"

namespace adalayer::cpu {
namespace {

constexpr int kRowsOfPass = 6;
// The levels of a row in 16 bits: those numbered 0 and 2 of every quad, then 1 and 3.
constexpr int kStepBytes = 4 * kQuadsPerStep;
constexpr int kPlane = kMostShortSteps * kStepBytes, kRow = 2 * kPlane;

template <int kRows>
void widen(const GemmArgs& g, const Rows<kRows>& rows, uint8_t* to) {
  for (int s = 0; s < g.steps; ++s)
    for (int quad = 0; quad < g.live_quads[s]; quad += 8)
      for (int r = 0; r < kRows; ++r)
        widen_quads(rows.at[r] + g.step_offsets[s] + quad * 4, g.live_quads[s] - quad,
                    to + r * kRow + s * kStepBytes + quad * 4, kPlane);
}

/// Adds the products of two levels with two vectors of their weights.
[[gnu::always_inline]] inline void add_pair(const uint8_t* levels, __m256i w0, __m256i w1,
                                            __m256i& sum0, __m256i& sum1) {
  __m256i v, products;
  __asm__(
      "vpbroadcastd %[levels], %[v]\n\t"
      "vpmaddwd %[w0], %[v], %[products]\n\t"
      "vpmaddwd %[w1], %[v], %[v]\n\t"
      "vpaddd %[products], %[sum0], %[sum0]\n\t"
      "vpaddd %[v], %[sum1], %[sum1]"
      : [v] "=&x"(v), [products] "=&x"(products), [sum0] "+x"(sum0), [sum1] "+x"(sum1)
      : [levels] "m"(*reinterpret_cast<const uint8_t (*)[4]>(levels)), [w0] "x"(w0), [w1] "x"(w1));
}

/// Adds the products of a quad of levels with two vectors of its weights, of which int16 holds one
/// pair.
[[gnu::always_inline]] inline void add_whole(const uint8_t* levels, __m256i w0, const int8_t* w1,
                                             __m256i ones, __m256i& sum0, __m256i& sum1) {
  __m256i v, products;
  __asm__(
      "vpbroadcastd %[levels], %[v]\n\t"
      "vpmaddubsw %[w0], %[v], %[products]\n\t"
      "vpmaddubsw %[w1], %[v], %[v]\n\t"
      "vpmaddwd %[ones], %[products], %[products]\n\t"
      "vpmaddwd %[ones], %[v], %[v]\n\t"
      "vpaddd %[products], %[sum0], %[sum0]\n\t"
      "vpaddd %[v], %[sum1], %[sum1]"
      : [v] "=&x"(v), [products] "=&x"(products), [sum0] "+x"(sum0), [sum1] "+x"(sum1)
      : [levels] "m"(*reinterpret_cast<const uint8_t (*)[4]>(levels)), [w0] "x"(w0),
        [w1] "m"(*reinterpret_cast<const int8_t (*)[kVectorBytes]>(w1)), [ones] "x"(ones));
}

/// Adds the products of kRows rows by one column tile, in bytes.
template <int kRows>
[[gnu::always_inline]] inline void multiply_bytes(const GemmArgs& g, const Rows<kRows>& rows,
                                                  const int8_t* weights,
                                                  __m256i (&sums)[kRows][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t s = 0; s < g.steps; ++s) {
    int64_t level = g.step_offsets[s];
    for (const int64_t end = level + g.live_quads[s] * 4; level != end; level += 4) {
      const __m256i w0 = load(weights);
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        add_whole(rows.at[r.value] + level, w0, weights + kVectorBytes, ones, sums[r.value][0],
                  sums[r.value][1]);
      });
      weights += kQuadBytes;
    }
  }
}

/// The same in 16 bits.
template <int kRows>
[[gnu::always_inline]] inline void multiply_words(const GemmArgs& g, const uint8_t* widened,
                                                  const int8_t* weights,
                                                  __m256i (&sums)[kRows][2]) {
  for (int64_t s = 0; s < g.steps; ++s) {
    const uint8_t* levels = widened + s * kStepBytes;
    for (const uint8_t* const end = levels + g.live_quads[s] * 4; levels != end; levels += 4)
      unrolled<0, 2>([&](auto plane) __attribute__((always_inline)) {
        const __m256i w0 = load(weights), w1 = load(weights + kVectorBytes);
        weights += 2 * kVectorBytes;
        unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
          add_pair(levels + r.value * kRow + plane.value * kPlane, w0, w1, sums[r.value][0],
                   sums[r.value][1]);
        });
      });
  }
}

template <PlainForm kForm, bool kResidual, bool kBounded, int kRows>
[[gnu::noinline]] void multiply_tile(const GemmArgs& g, const uint8_t* widened, int row, int tile,
                                     const Finish& finish, int32_t* memory) {
  __m256i sums[kRows][2];
  unrolled<0, kRows * 2>([&](auto i) __attribute__((always_inline)) {
    sums[i.value / 2][i.value % 2] = finish.initial(tile, i.value % 2);
  });
  const int8_t* weights = short_weights(tile == 0 ? g.tile0 : g.tile1, g.steps);
  if (kForm == PlainForm::Bytes)
    multiply_bytes(g, Rows<kRows>(g, row), weights, sums);
  else
    multiply_words(g, widened, weights, sums);
  if (finish.in_registers()) {
    unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
      finish.levels<kResidual, kBounded>(row + r.value, tile, sums[r.value][0], sums[r.value][1]);
    });
    return;
  }
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    int32_t* const at = memory + r.value * kBlockCols + tile * kTileCols;
    store(at, sums[r.value][0]);
    store(at + kVectorCols, sums[r.value][1]);
  });
}

}  // namespace

bool gemm_requantize_short_avx2(const GemmArgs& g, const RequantizeArgs& q, Requantize requantize) {
  if (g.steps == 0 || g.steps > kMostShortSteps) return false;
  PlainForm forms[2] = {};
  bool words = false;
  for (int t = 0; t < (g.tile1 == nullptr ? 1 : 2); ++t) {
    forms[t] = arranged_table(t == 0 ? g.tile0 : g.tile1, g.steps, 0).plain_form;
    if (forms[t] == PlainForm::None) return false;
    words = words || forms[t] == PlainForm::Words;
  }
  const Finish finish(g, q, requantize);
  alignas(kVectorBytes) int32_t sums[kRowsOfPass * kBlockCols];
  alignas(kVectorBytes) uint8_t widened[kRowsOfPass * kRow];
  finish.with_epilogue([&](auto residual, auto bounded) {
    for_passes<kRowsOfPass>(g.rows, [&](int row, auto n) {
      fetch(g, row, n.value);
      if (words) widen(g, Rows<n.value>(g, row), widened);
      for (int t = 0; t < finish.tiles(); ++t) {
        constexpr bool kResidual = residual.value != 0, kBounded = bounded.value != 0;
        if (forms[t] == PlainForm::Bytes)
          multiply_tile<PlainForm::Bytes, kResidual, kBounded, n.value>(g, widened, row, t, finish,
                                                                        sums);
        else
          multiply_tile<PlainForm::Words, kResidual, kBounded, n.value>(g, widened, row, t, finish,
                                                                        sums);
      }
      if (!finish.in_registers()) finish(row, n.value, sums);
    });
  });
  return true;
}

}  // namespace adalayer::cpu

// Matrix product of the AVX2 row, exact at every width.
//
// vpmaddubsw multiplies 32 u8 levels by s8 weights and adds the products in pairs, saturating at
// int16. A pair of levels times the weights (w0, w1) lies between -255 * n and 255 * p, where n and
// p are the sums of the negative and of the positive ones of |w0| and |w1|: with both at most 128,
// an int16 holds it, and sums of several pairs as long as their n and p do together. So of b-bit
// weights 2^(7 - b) pairs can be added in int16 before vpmaddwd widens them. At 8 bits it depends
// on the weights, by which their quads were sorted (arrange.hpp).
//
// A vpmaddubsw costs as much as a vpmaddwd. Multiplications bound this kernel at 8 bits (two for 32
// products, or three for 64), and the fewer bits, the fewer of them are for widening.
#include <immintrin.h>

#include <cstring>

#include "cpu/isa/avx2/arrange.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

constexpr int kMostAbs = 128;  // of the weights of one sign in an int16 sum
static_assert(255 * kMostAbs <= 32767);

constexpr int pairs_in_int16(int bits) { return kMostAbs / (2 << (bits - 1)); }

// Quads (groups of four levels and their weights) that are multiplied by all rows before the next
// are: their weights, and the levels of a pass, stay in the first-level cache.
constexpr int kChunk = 256;
constexpr int kTileCols = formats::kTileWidth;
constexpr int kVectorCols = 8;  // columns of a vector of sums
constexpr int kQuadBytes = kTileCols * 4;
constexpr int kVectorBytes = 32;

/// Where a quad's levels are, in bytes from a row's start, and its weights, from wherever the list
/// has its own: 32 or 64 bytes.
struct Quad {
  int32_t level, weights;
  uint32_t order;  // of the levels (arrange.hpp); 0 is their own
};

struct Quads {
  const int8_t* weights;
  const Quad* begin;
  int count;
};

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};

/// fn(Index<kBegin>{}), ..., fn(Index<kEnd - 1>{})
template <int kBegin, int kEnd, class Fn>
[[gnu::always_inline]] inline void unrolled(const Fn& fn) {
  if constexpr (kBegin < kEnd) {
    fn(Index<kBegin>{});
    unrolled<kBegin + 1, kEnd>(fn);
  }
}

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
__m256i broadcast(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// Sums that stay in their registers. Of the intrinsics GCC makes a sum in another register, which
// it copies back: a fifth more instructions in loops that the decoders bound.
[[gnu::always_inline]] inline void add16(__m256i& sum, __m256i v) {
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v));
}
[[gnu::always_inline]] inline void add32(__m256i& sum, __m256i v) {
  __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v));
}

/// Where the levels and the sums of a pass over kRows rows are.
template <int kRows>
struct Pass {
  const uint8_t* rows[kRows];
  int32_t* sums;

  Pass(const GemmArgs& g, int row, int column) : sums(g.sums + row * kBlockCols + column) {
    for (int r = 0; r < kRows; ++r)
      rows[r] = g.activations + g.row_offsets[row + r];
  }
  int32_t* at(int r, int vector) const { return sums + r * kBlockCols + vector * kVectorCols; }
};

__m256i order_control(const Quad& quad) {
  return _mm256_broadcastsi128_si256(
      _mm_load_si128(reinterpret_cast<const __m128i*>(kOrder[quad.order])));
}

/// Adds the products of one quad, of which int16 holds one pair; kOrdered: its levels have an order
/// of their own.
template <bool kOrdered, int kRows>
[[gnu::always_inline]] inline void add_one(const Pass<kRows>& pass, const int8_t* weights,
                                           const Quad& quad, __m256i (&sums)[kRows]) {
  const __m256i ones = _mm256_set1_epi16(1), w = load(weights + quad.weights);
  [[maybe_unused]] const __m256i control = kOrdered ? order_control(quad) : ones;
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    __m256i v = broadcast(pass.rows[r.value] + quad.level);
    if constexpr (kOrdered) v = _mm256_shuffle_epi8(v, control);
    add32(sums[r.value], _mm256_madd_epi16(_mm256_maddubs_epi16(v, w), ones));
  });
}

/// Adds the products of two quads that int16 holds together; kOrdered: the second one's levels have
/// an order of their own.
template <bool kOrdered, int kRows>
[[gnu::always_inline]] inline void add_two(const Pass<kRows>& pass, const int8_t* weights,
                                           const Quad* quad, __m256i (&sums)[kRows]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i w0 = load(weights + quad[0].weights), w1 = load(weights + quad[1].weights);
  [[maybe_unused]] const __m256i control = kOrdered ? order_control(quad[1]) : ones;
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    __m256i pairs = _mm256_maddubs_epi16(broadcast(pass.rows[r.value] + quad[0].level), w0);
    __m256i v = broadcast(pass.rows[r.value] + quad[1].level);
    if constexpr (kOrdered) v = _mm256_shuffle_epi8(v, control);
    add16(pairs, _mm256_maddubs_epi16(v, w1));
    add32(sums[r.value], _mm256_madd_epi16(pairs, ones));
  });
}

/// Adds the products of one quad whose weights are too large for int16 sums: all of them in 16
/// bits, where a vpmaddwd adds two at once. Its weights are those of the levels 0 and 2, then of 1
/// and 3.
template <int kRows>
[[gnu::always_inline]] inline void add_wide(const Pass<kRows>& pass, const int8_t* weights,
                                            const Quad& quad, __m256i (&sums)[kRows]) {
  const __m256i low_byte = _mm256_set1_epi16(255);
  const __m256i even = load(weights + quad.weights);
  const __m256i odd = load(weights + quad.weights + kVectorBytes);
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    const __m256i v = broadcast(pass.rows[r.value] + quad.level);
    add32(sums[r.value], _mm256_madd_epi16(_mm256_and_si256(v, low_byte), even));
    add32(sums[r.value], _mm256_madd_epi16(_mm256_srli_epi16(v, 8), odd));
  });
}

/// Quads of eight columns by kind: each ends where the next one begins. In pairs: an even number.
struct Kinds {
  const int8_t* weights;
  const Quad* begin;
  int paired, mixed, whole, ordered, wide;  // ends
  const int8_t* wide_weights;
  bool first;  // nothing has been added to the sums yet, and they hold anything
};

template <int kRows>
void multiply_kinds(const Pass<kRows>& pass, const Kinds& kinds) {
  __m256i sums[kRows];
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    sums[r.value] = kinds.first ? _mm256_setzero_si256() : load(pass.at(r.value, 0));
  });
  const Quad* quad = kinds.begin;
  for (const Quad* end = kinds.begin + kinds.paired; quad != end; quad += 2)
    add_two<false>(pass, kinds.weights, quad, sums);
  for (const Quad* end = kinds.begin + kinds.mixed; quad != end; quad += 2)
    add_two<true>(pass, kinds.weights, quad, sums);
  for (const Quad* end = kinds.begin + kinds.whole; quad != end; ++quad)
    add_one<false>(pass, kinds.weights, *quad, sums);
  for (const Quad* end = kinds.begin + kinds.ordered; quad != end; ++quad)
    add_one<true>(pass, kinds.weights, *quad, sums);
  for (const Quad* end = kinds.begin + kinds.wide; quad != end; ++quad)
    add_wide(pass, kinds.wide_weights, *quad, sums);
  unrolled<0, kRows>(
      [&](auto r) __attribute__((always_inline)) { store(pass.at(r.value, 0), sums[r.value]); });
}

/// Adds products of which int16 holds kRun pairs to sixteen columns; quads.count is a multiple of
/// kRun.
template <int kRun, int kRows>
void multiply_runs(const Pass<kRows>& pass, const Quads& quads) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums[kRows][2];
  unrolled<0, kRows * 2>([&](auto i) __attribute__((always_inline)) {
    constexpr int r = i.value / 2, half = i.value % 2;
    sums[r][half] = load(pass.at(r, half));
  });
  for (const Quad *quad = quads.begin, *end = quad + quads.count; quad != end; quad += kRun) {
    __m256i pairs[kRows][2];
    unrolled<0, kRun>([&](auto j) __attribute__((always_inline)) {
      const Quad& q = quad[j.value];
      const int8_t* weights = quads.weights + q.weights;
      const __m256i w[2] = {load(weights), load(weights + kVectorBytes)};
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        const __m256i v = broadcast(pass.rows[r.value] + q.level);
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
      add32(sums[r][half], _mm256_madd_epi16(pairs[r][half], ones));
    });
  }
  unrolled<0, kRows * 2>([&](auto i) __attribute__((always_inline)) {
    constexpr int r = i.value / 2, half = i.value % 2;
    store(pass.at(r, half), sums[r][half]);
  });
}

/// How the two vectors of a quad's weights are added up.
struct Halves {
  int run;         // pairs that int16 holds
  int factors[2];  // of each half's products
  int second;      // vector of sums that the second half goes to; the first goes to 0
};

/// Adds products of which int16 holds many pairs: their sums have the registers, and every run adds
/// them to the int32 sums in memory.
template <int kRows>
void multiply_long_runs(const Pass<kRows>& pass, const Halves& halves, const Quads& quads) {
  const Quad *quad = quads.begin, *const end = quad + quads.count;
  while (quad != end) {
    const Quad* const last = end - quad > halves.run ? quad + halves.run : end;
    __m256i pairs[kRows][2];
    unrolled<0, kRows * 2>([&](auto i) __attribute__((always_inline)) {
      __m256i& sum = pairs[i.value / 2][i.value % 2];
      sum = _mm256_setzero_si256();
      __asm__("" : "+x"(sum));  // or the first addition is peeled off the loop
    });
    for (; quad != last; ++quad) {
      const int8_t* weights = quads.weights + quad->weights;
      const __m256i w[2] = {load(weights), load(weights + kVectorBytes)};
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        const __m256i v = broadcast(pass.rows[r.value] + quad->level);
        add16(pairs[r.value][0], _mm256_maddubs_epi16(v, w[0]));
        add16(pairs[r.value][1], _mm256_maddubs_epi16(v, w[1]));
      });
    }
    unrolled<0, kRows * 2>([&](auto i) __attribute__((always_inline)) {
      constexpr int r = i.value / 2, half = i.value % 2;
      const __m256i factor = _mm256_set1_epi16(static_cast<int16_t>(halves.factors[half]));
      int32_t* at = pass.at(r, half == 0 ? 0 : halves.second);
      store(at, _mm256_add_epi32(load(at), _mm256_madd_epi16(pairs[r][half], factor)));
    });
  }
}

/// fn(Pass<n>) over all rows, with n = kMost as long as there are so many, then less.
template <int kMost, class Fn>
void for_rows(const GemmArgs& g, int column, const Fn& fn, int row = 0) {
  for (; row + kMost <= g.rows; row += kMost)
    fn(Pass<kMost>(g, row, column));
  if constexpr (kMost > 1) for_rows<kMost / 2>(g, column, fn, row);
}

// Rows of a pass: as many as leave the 16 registers room for the operands.
constexpr int kWideningRows = 8, kRunRows = 3, kLongRunRows = 4;

/// The same in passes of nearly equal size.
template <int kMost, class Fn>
void for_even_rows(const GemmArgs& g, int column, const Fn& fn) {
  const auto one = [&](int row, int rows) {
    const auto pass = [&](auto n) { fn(Pass<n.value>(g, row, column)); };
    unrolled<1, kMost + 1>([&](auto n) {
      if (rows == n.value) pass(n);
    });
  };
  int row = 0;
  for (int passes = (g.rows + kMost - 1) / kMost; passes > 0; --passes) {
    const int rows = (g.rows - row + passes - 1) / passes;
    one(row, rows);
    row += rows;
  }
}

void add_kinds(const GemmArgs& g, int column, const Kinds& kinds) {
  if (kinds.wide == 0 && !kinds.first) return;
  for_even_rows<kWideningRows>(g, column, [&](const auto& pass) { multiply_kinds(pass, kinds); });
}

void add_widening(const GemmArgs& g, int column, const Quads& quads) {
  const int n = quads.count;
  add_kinds(g, column, {quads.weights, quads.begin, 0, 0, n, n, n, nullptr, false});
}

void add_long_runs(const GemmArgs& g, int column, const Halves& halves, const Quads& quads) {
  if (quads.count == 0) return;
  for_rows<kLongRunRows>(g, column,
                         [&](const auto& pass) { multiply_long_runs(pass, halves, quads); });
}

/// Weights of one column tile; all quads are alike, so the bound of their width decides.
struct Narrow {
  int bits;

  template <int kRun>
  static void add_runs(const GemmArgs& g, int column, const Quads& quads) {
    const int rest = quads.count % kRun, whole = quads.count - rest;
    for_rows<kRunRows>(g, column, [&](const auto& pass) {
      multiply_runs<kRun>(pass, {quads.weights, quads.begin, whole});
    });
    by_vectors(g, column, {quads.weights, quads.begin + whole, rest});
  }

  static void by_vectors(const GemmArgs& g, int column, const Quads& quads) {
    add_widening(g, column, quads);
    add_widening(g, column + kVectorCols, {quads.weights + kVectorBytes, quads.begin, quads.count});
  }

  void operator()(const GemmArgs& g, int column, const Quads& quads) const {
    switch (bits) {
      case 7:
        return by_vectors(g, column, quads);
      case 6:
        return add_runs<pairs_in_int16(6)>(g, column, quads);
      case 5:
        return add_runs<pairs_in_int16(5)>(g, column, quads);
      default:
        return add_long_runs(g, column, {pairs_in_int16(bits), {1, 1}, 1}, quads);
    }
  }
};

/// w = 16 * high + low with both in -8..8: two products of half the width, high first.
void split(__m256i w, int8_t* parts) {
  const __m256i nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
  const auto extended = [&](__m256i v) {
    return _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(v, nibble), eight), eight);
  };
  // low is the signed lower nibble; where it is negative, high is one more than w >> 4.
  const __m256i carry = _mm256_and_si256(_mm256_srli_epi16(w, 3), _mm256_set1_epi8(1));
  store(parts, _mm256_add_epi8(extended(_mm256_srli_epi16(w, 4)), carry));
  store(parts + kVectorBytes, extended(w));
}

/// Weights of the levels 0 and 2 of every column in 16 bits, then of the levels 1 and 3.
void widen(__m256i w, int8_t* parts) {
  store(parts, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  store(parts + kVectorBytes, _mm256_srai_epi16(w, 8));
}

// Nibbles of -8..8: the same bound as for four bits.
constexpr Halves kNibbles{pairs_in_int16(4), {16, 1}, 0};

// Quads of a half tile that are multiplied in 16 bits rather than in two parts.
constexpr uint32_t kMostWide = 64;

/// Weights to fetch into the second-level cache, a line with every quad that is looked up.
class Fetching {
 public:
  explicit Fetching(const GemmArgs& g) : at_(g.fetch), end_(g.fetch + g.rows * g.fetch_row) {}
  void line() {
    if (at_ >= end_) return;
    _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T1);
    at_ += 64;
  }

 private:
  const uint8_t *at_, *end_;
};

constexpr uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

/// Eight-bit weights of one column tile, in the order of arrange.hpp.
void add_arranged(const GemmArgs& g, const int8_t* tile, int column, Fetching& fetching) {
  constexpr int kParts = 2 * kVectorBytes;
  alignas(kParts) int8_t parts[kChunk * kParts];
  Quad quads[kChunk];
  for (int half = 0; half < 2; ++half) {
    const ArrangedTable& table = arranged_table(tile, g.steps, half);
    const int at = column + half * kVectorCols;
    const uint32_t paired = table.paired, mixed = paired + table.mixed;
    const uint32_t whole = mixed + table.whole, ordered = whole + table.ordered;
    // Few quads that need two products go through 16 bits, with the others; many pay for a pass of
    // their own, in which their sums stay in int16.
    const uint32_t wide = table.split <= kMostWide ? ordered + table.split : ordered;
    const uint32_t all = ordered + table.split;
    if (wide == 0) add_kinds(g, at, {nullptr, nullptr, 0, 0, 0, 0, 0, nullptr, true});
    for (uint32_t first = 0, end = 0; first < all; first = end) {
      const bool exact = first < wide;
      end = least(exact ? wide : all, first + kChunk);
      const int8_t* const slots = tile + half * kVectorBytes + int64_t{first} * kQuadBytes;
      for (uint32_t i = first; i < end; ++i) {
        const uint32_t entry = table.quads()[i], quad = entry & kQuadMask;
        quads[i - first] = {
            static_cast<int32_t>(g.step_offsets[quad / kQuadsPerStep] + quad % kQuadsPerStep * 4),
            static_cast<int32_t>(i - first) * kQuadBytes, entry >> kOrderBit};
        fetching.line();
      }
      // Quads from here on have their weights in `parts`.
      const auto count = static_cast<int>(end - first);
      for (int i = first < ordered ? static_cast<int>(ordered - first) : 0; i < count; ++i) {
        (exact ? widen : split)(load(slots + i * kQuadBytes), parts + i * kParts);
        quads[i].weights = i * kParts;
      }
      if (!exact) {
        add_long_runs(g, at, kNibbles, {parts, quads, count});
        continue;
      }
      const auto upto = [&](uint32_t kind) {
        return kind <= first ? 0 : static_cast<int>(least(kind, end) - first);
      };
      add_kinds(g, at,
                {slots, quads, upto(paired), upto(mixed), upto(whole), upto(ordered), count, parts,
                 first == 0});
    }
  }
}

/// Calls add(g, column, quads) for every column tile and at most kChunk quads of the reduction.
template <class Add>
void for_chunks(const GemmArgs& g, const Add& add) {
  Quad quads[kChunk];
  int count = 0;
  const auto flush = [&] {
    add(g, 0, {g.tile0, quads, count});
    if (g.tile1 != nullptr) add(g, kTileCols, {g.tile1, quads, count});
    count = 0;
  };
  for (int64_t s = 0; s < g.steps; ++s) {
    if (count + g.live_quads[s] > kChunk) flush();
    for (int quad = 0; quad < g.live_quads[s]; ++quad)
      quads[count++] = {static_cast<int32_t>(g.step_offsets[s] + quad * 4),
                        static_cast<int32_t>(s * formats::kTileBytes + quad * kQuadBytes), 0};
  }
  flush();
}

}  // namespace

void gemm_avx2(const GemmArgs& g) {
  if (!g.arranged) {
    std::memset(g.sums, 0, static_cast<size_t>(g.rows) * kBlockCols * sizeof(int32_t));
    return for_chunks(g, Narrow{g.weight_bits});
  }
  Fetching fetching(g);
  add_arranged(g, g.tile0, 0, fetching);
  if (g.tile1 != nullptr) add_arranged(g, g.tile1, kTileCols, fetching);
}

}  // namespace adalayer::cpu

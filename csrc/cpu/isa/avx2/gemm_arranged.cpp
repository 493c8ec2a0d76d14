// Matrix product of the AVX2 row with eight-bit weights in the order of arrange.hpp; gemm.cpp says
// what int16 holds.
#include "cpu/isa/avx2/arrange.hpp"
#include "cpu/isa/avx2/gemm.hpp"
#include "cpu/isa/avx2/passes.hpp"

namespace adalayer::cpu {
namespace {

// Of quads: their weights and a pass's levels stay near. No group of four is cut.
constexpr uint32_t kChunk = 128;
static_assert(kChunk % 4 == 0);
constexpr int kWideBytes = 2 * kVectorBytes;  // weights of a quad in 16 bits
constexpr int kStepBytes = 4 * kQuadsPerStep;
constexpr int kMostSteps = 16;  // whose levels are widened for a chunk

/// The levels of a pass in 16 bits: those numbered 0 and 2 of every quad, and behind them 1 and 3.
constexpr int kWidenedPlane = kMostSteps * kStepBytes, kWidenedRow = 2 * kWidenedPlane;

/// Some quads of eight columns by kind: each ends where the next one begins.
struct Chunk {
  int four, paired, mixed, whole, ordered, wide;  // ends
  const int8_t* slots;                            // weights of the quads up to `ordered`
  Quad quads[kChunk];
  alignas(kWideBytes) int8_t weights[kChunk * kWideBytes];  // of the quads from there on
};

__m256i order_control(const Quad& quad) {
  return _mm256_broadcastsi128_si256(
      _mm_load_si128(reinterpret_cast<const __m128i*>(kOrder[quad.order])));
}

/// Adds the products of quads that int16 holds together; kOrdered: the levels of the last one have
/// an order of their own.
template <int kQuads, bool kOrdered, int kRows>
[[gnu::always_inline]] inline void add_together(const Rows<kRows>& rows, const int8_t* weights,
                                                const Quad* quad, __m256i (&sums)[kRows]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i w[kQuads];
  unrolled<0, kQuads>([&](auto q) __attribute__((always_inline)) {
    w[q.value] = load(weights + quad[q.value].weights);
  });
  [[maybe_unused]] const __m256i control = kOrdered ? order_control(quad[kQuads - 1]) : ones;
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    __m256i pairs;
    unrolled<0, kQuads>([&](auto q) __attribute__((always_inline)) {
      __m256i v = broadcast(rows.at[r.value] + quad[q.value].level);
      if constexpr (kOrdered && q.value == kQuads - 1) v = _mm256_shuffle_epi8(v, control);
      const __m256i products = _mm256_maddubs_epi16(v, w[q.value]);
      if constexpr (q.value == 0)
        pairs = products;
      else
        add16(pairs, products);
    });
    add32(sums[r.value], _mm256_madd_epi16(pairs, ones));
  });
}

/// Adds the products of one quad whose weights are too large for int16 sums: all of them in 16
/// bits, where a vpmaddwd adds two at once. Its weights are those of the levels 0 and 2, then of 1
/// and 3. kWidened: its levels are ready in `widened`; else they are taken apart here.
template <bool kWidened, int kRows>
[[gnu::always_inline]] inline void add_wide(const Rows<kRows>& rows, const uint8_t* widened,
                                            const int8_t* weights, const Quad& quad,
                                            __m256i (&sums)[kRows]) {
  const __m256i low_byte = _mm256_set1_epi16(255);
  const __m256i even = load(weights + quad.weights);
  const __m256i odd = load(weights + quad.weights + kVectorBytes);
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    __m256i v, u;
    if constexpr (kWidened) {
      v = broadcast(widened + r.value * kWidenedRow + quad.order);
      u = broadcast(widened + r.value * kWidenedRow + quad.order + kWidenedPlane);
    } else {
      v = broadcast(rows.at[r.value] + quad.level);
      u = _mm256_srli_epi16(v, 8);
      v = _mm256_and_si256(v, low_byte);
    }
    add32(sums[r.value], _mm256_madd_epi16(v, even));
    add32(sums[r.value], _mm256_madd_epi16(u, odd));
  });
}

/// sums[r][0..7] plus, or if `first` equal to, the products of a chunk. `widened` may be null.
template <int kRows>
[[gnu::noinline]] void multiply(const Rows<kRows>& rows, const uint8_t* widened, const Chunk& chunk,
                                bool first, int32_t* to) {
  __m256i sums[kRows];
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    sums[r.value] = first ? _mm256_setzero_si256() : load(to + r.value * kBlockCols);
  });
  const Quad* quad = chunk.quads;
  const auto add = [&](auto together, auto ordered, int kind) __attribute__((always_inline)) {
    for (const Quad* end = chunk.quads + kind; quad != end; quad += together.value)
      add_together<together.value, ordered.value != 0>(rows, chunk.slots, quad, sums);
  };
  add(Index<4>{}, Index<0>{}, chunk.four);
  add(Index<2>{}, Index<0>{}, chunk.paired);
  add(Index<2>{}, Index<1>{}, chunk.mixed);
  add(Index<1>{}, Index<0>{}, chunk.whole);
  add(Index<1>{}, Index<1>{}, chunk.ordered);
  const Quad* const end = chunk.quads + chunk.wide;
  if (widened != nullptr)
    for (; quad != end; ++quad)
      add_wide<true>(rows, widened, chunk.weights, *quad, sums);
  else
    for (; quad != end; ++quad)
      add_wide<false>(rows, widened, chunk.weights, *quad, sums);
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    store(to + r.value * kBlockCols, sums[r.value]);
  });
}

/// Weights of the levels 0 and 2 of every column in 16 bits, then of the levels 1 and 3.
void widen(__m256i w, int8_t* to) {
  store(to, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  store(to + kVectorBytes, _mm256_srai_epi16(w, 8));
}

constexpr uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

/// Whether each step begins where the one before it ends.
bool are_neighbours(const GemmArgs& g) {
  for (int64_t s = 1; s < g.steps; ++s)
    if (g.step_offsets[s] != g.step_offsets[s - 1] + kStepBytes) return false;
  return true;
}

/// The slots [first, end) of one half of a column tile. neighbours: the steps are.
void look_up(const GemmArgs& g, bool neighbours, const int8_t* tile, int half, uint32_t first,
             uint32_t end, Chunk& chunk) {
  const ArrangedTable& table = arranged_table(tile, g.steps, half);
  const uint32_t four = table.four, paired = four + table.paired, mixed = paired + table.mixed;
  const uint32_t whole = mixed + table.whole, ordered = whole + table.ordered;
  const auto upto = [&](uint32_t kind) {
    return kind <= first ? 0 : static_cast<int>(least(kind, end) - first);
  };
  chunk.four = upto(four);
  chunk.paired = upto(paired);
  chunk.mixed = upto(mixed);
  chunk.whole = upto(whole);
  chunk.ordered = upto(ordered);
  chunk.wide = upto(ordered + table.wide);
  chunk.slots = tile + half * kVectorBytes + int64_t{first} * kQuadBytes;
  const uint32_t* const entries = table.quads() + first;
  const auto list = [&](auto level_of) {
    for (int i = 0; i < chunk.wide; ++i)
      chunk.quads[i] = {level_of(entries[i] & kQuadMask), i * kQuadBytes, entries[i] >> kOrderBit};
  };
  if (neighbours)
    list([&](uint32_t quad) { return static_cast<int32_t>(g.step_offsets[0] + quad * 4); });
  else
    list([&](uint32_t quad) {
      return static_cast<int32_t>(g.step_offsets[quad / kQuadsPerStep] + quad % kQuadsPerStep * 4);
    });
  for (int i = chunk.ordered; i < chunk.wide; ++i) {
    widen(load(chunk.slots + i * kQuadBytes), chunk.weights + i * kWideBytes);
    chunk.quads[i].weights = i * kWideBytes;
    chunk.quads[i].order = entries[i] * 4;
  }
}

/// The steps whose levels a pass should widen for the wide quads of a chunk: none where those are
/// too few to pay for it, or too far apart.
struct WidenedSteps {
  int64_t first = 0;
  int count = 0;

  WidenedSteps() = default;
  WidenedSteps(Chunk* chunks, int halves) {
    uint32_t begin = ~0u, end = 0;
    int quads = 0;
    for (int h = 0; h < halves; ++h) {
      const Chunk& c = chunks[h];
      if (c.wide == c.ordered) continue;
      quads += c.wide - c.ordered;
      begin = least(begin, c.quads[c.ordered].order);  // they ascend
      const uint32_t last = c.quads[c.wide - 1].order;
      end = end < last ? last : end;
    }
    if (quads == 0) return;
    first = begin / kStepBytes;
    const int64_t steps = end / kStepBytes + 1 - first;
    if (steps > kMostSteps || steps * kQuadsPerStep > 2 * quads) return;
    count = static_cast<int>(steps);
    for (int h = 0; h < halves; ++h)
      for (int i = chunks[h].ordered; i < chunks[h].wide; ++i)
        chunks[h].quads[i].order -= static_cast<uint32_t>(first) * kStepBytes;
  }

  template <int kRows>
  void widen(const GemmArgs& g, const Rows<kRows>& rows, uint8_t* to) const {
    for (int s = 0; s < count; ++s) {
      const int64_t offset = g.step_offsets[first + s];
      const int live = g.live_quads[first + s];
      for (int quad = 0; quad < live; quad += 8)
        for (int r = 0; r < kRows; ++r)
          widen_quads(rows.at[r] + offset + quad * 4, live - quad,
                      to + r * kWidenedRow + s * kStepBytes + quad * 4, kWidenedPlane);
    }
  }
};

struct Arranged {
  static constexpr uint32_t kChunk = cpu::kChunk;
  static constexpr int kRows = 8;  // as many as leave the 16 registers room for the operands

  explicit Arranged(const GemmArgs& args)
      : g(args), halves(args.tile1 == nullptr ? 2 : 4), neighbours(are_neighbours(args)) {}

  void look_up(uint32_t first, uint32_t end) {
    for (int h = 0; h < halves; ++h)
      cpu::look_up(g, neighbours, h < 2 ? g.tile0 : g.tile1, h % 2, first, end, chunks[h]);
    steps = WidenedSteps(chunks, halves);
  }
  template <int kPassRows>
  void multiply(const Rows<kPassRows>& rows, bool first, int32_t* sums) {
    steps.widen(g, rows, widened);
    for (int h = 0; h < halves; ++h)
      cpu::multiply(rows, steps.count > 0 ? widened : nullptr, chunks[h], first,
                    sums + h * kVectorCols);
  }

  const GemmArgs& g;
  int halves;  // of column tiles
  bool neighbours;
  WidenedSteps steps;
  Chunk chunks[4];
  alignas(kVectorBytes) uint8_t widened[kRows * kWidenedRow];
};

}  // namespace

void gemm_arranged_avx2(const GemmArgs& g) {
  Arranged form(g);
  gemm(g, form);
}

void gemm_requantize_arranged_avx2(const GemmArgs& g, const RequantizeArgs& q,
                                   Requantize requantize) {
  Arranged form(g);
  gemm_requantize(g, q, requantize, form);
}

}  // namespace adalayer::cpu

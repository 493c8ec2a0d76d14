// Products of eight-bit weights in the order of arranged.hpp: avx2/gemm.cpp says what int16 holds.
// Included in namespace adalayer::cpu, inside the unnamed namespace, of one ISA file only.
//
// V has a vector type T of kBytes bytes, the rows of a pass kRows (as many as leave the registers
// room for the operands), kMostSteps (whose levels are widened for a chunk: they stay near), and
// load, store, set1 of int16, broadcast of a quad of levels, multiply_bytes and multiply_words,
// add16 and add32 to a register, low_bytes, high_bytes and the same signed, control and shuffle.

// Of quads: their weights and a pass's levels stay near. No group of four is cut.
constexpr uint32_t kChunk = 128;
static_assert(kChunk % 4 == 0);
constexpr int kStepBytes = 4 * kQuadsPerStep;

/// The levels of a pass in 16 bits: those numbered 0 and 2 of every quad, and behind them 1 and 3.
template <class V>
constexpr int kWidenedPlane = V::kMostSteps * kStepBytes;
template <class V>
constexpr int kWidenedRow = 2 * kWidenedPlane<V>;

/// Some quads of a vector's columns by kind: each ends where the next one begins.
template <class V>
struct Chunk {
  static constexpr int kWideBytes = 2 * V::kBytes;  // weights of a quad in 16 bits
  int four, paired, mixed, whole, ordered, wide;    // ends
  const int8_t* slots;                              // weights of the quads up to `ordered`
  Quad quads[kChunk];
  alignas(kWideBytes) int8_t weights[kChunk * kWideBytes];  // of the quads from there on
};

/// Adds the products of quads that int16 holds together; kOrdered: the levels of the last one have
/// an order of their own.
template <class V, int kQuads, bool kOrdered, int kRows>
[[gnu::always_inline]] inline void add_together(const Rows<kRows>& rows, const int8_t* weights,
                                                const Quad* quad, typename V::T (&sums)[kRows]) {
  using T = typename V::T;
  const T ones = V::set1(1);
  T w[kQuads];
  unrolled<0, kQuads>([&](auto q) __attribute__((always_inline)) {
    w[q.value] = V::load(weights + quad[q.value].weights);
  });
  [[maybe_unused]] const T control = kOrdered ? V::control(kOrder[quad[kQuads - 1].order]) : ones;
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    T pairs;
    unrolled<0, kQuads>([&](auto q) __attribute__((always_inline)) {
      T v = V::broadcast(rows.at[r.value] + quad[q.value].level);
      if constexpr (kOrdered && q.value == kQuads - 1) v = V::shuffle(v, control);
      const T products = V::multiply_bytes(v, w[q.value]);
      if constexpr (q.value == 0)
        pairs = products;
      else
        V::add16(pairs, products);
    });
    V::add32(sums[r.value], V::multiply_words(pairs, ones));
  });
}

/// Adds the products of one quad whose weights are too large for int16 sums: all of them in 16
/// bits, where a vpmaddwd adds two at once. Its weights are those of the levels 0 and 2, then of 1
/// and 3. kWidened: its levels are ready in `widened`; else they are taken apart here.
template <class V, bool kWidened, int kRows>
[[gnu::always_inline]] inline void add_wide(const Rows<kRows>& rows, const uint8_t* widened,
                                            const int8_t* weights, const Quad& quad,
                                            typename V::T (&sums)[kRows]) {
  using T = typename V::T;
  const T even = V::load(weights + quad.weights);
  const T odd = V::load(weights + quad.weights + V::kBytes);
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    T v, u;
    if constexpr (kWidened) {
      v = V::broadcast(widened + r.value * kWidenedRow<V> + quad.order);
      u = V::broadcast(widened + r.value * kWidenedRow<V> + quad.order + kWidenedPlane<V>);
    } else {
      v = V::broadcast(rows.at[r.value] + quad.level);
      u = V::high_bytes(v);
      v = V::low_bytes(v);
    }
    V::add32(sums[r.value], V::multiply_words(v, even));
    V::add32(sums[r.value], V::multiply_words(u, odd));
  });
}

/// sums[r] of a vector's columns plus, or if `first` equal to, the products of a chunk. `widened`
/// may be null.
template <class V, int kRows>
[[gnu::noinline]] void multiply(const Rows<kRows>& rows, const uint8_t* widened,
                                const Chunk<V>& chunk, bool first, int32_t* to) {
  typename V::T sums[kRows];
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    sums[r.value] = first ? V::set1(0) : V::load(to + r.value * kBlockCols);
  });
  const Quad* quad = chunk.quads;
  const auto add = [&](auto together, auto ordered, int kind) __attribute__((always_inline)) {
    for (const Quad* end = chunk.quads + kind; quad != end; quad += together.value)
      add_together<V, together.value, ordered.value != 0>(rows, chunk.slots, quad, sums);
  };
  add(Index<4>{}, Index<0>{}, chunk.four);
  add(Index<2>{}, Index<0>{}, chunk.paired);
  add(Index<2>{}, Index<1>{}, chunk.mixed);
  add(Index<1>{}, Index<0>{}, chunk.whole);
  add(Index<1>{}, Index<1>{}, chunk.ordered);
  const Quad* const end = chunk.quads + chunk.wide;
  if (widened != nullptr)
    for (; quad != end; ++quad)
      add_wide<V, true>(rows, widened, chunk.weights, *quad, sums);
  else
    for (; quad != end; ++quad)
      add_wide<V, false>(rows, widened, chunk.weights, *quad, sums);
  unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
    V::store(to + r.value * kBlockCols, sums[r.value]);
  });
}

/// Weights of the levels 0 and 2 of every column in 16 bits, then of the levels 1 and 3.
template <class V>
void widen(typename V::T w, int8_t* to) {
  V::store(to, V::signed_low_bytes(w));
  V::store(to + V::kBytes, V::signed_high_bytes(w));
}

constexpr uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

/// Whether each step begins where the one before it ends.
bool are_neighbours(const GemmArgs& g) {
  for (int64_t s = 1; s < g.steps; ++s)
    if (g.step_offsets[s] != g.step_offsets[s - 1] + kStepBytes) return false;
  return true;
}

/// The slots [first, end) of one list of a column tile. neighbours: the steps are.
template <class V>
void look_up(const GemmArgs& g, bool neighbours, const int8_t* tile, int of, uint32_t first,
             uint32_t end, Chunk<V>& chunk) {
  constexpr int kWideBytes = Chunk<V>::kWideBytes;
  const ArrangedTable& table = arranged_table(tile, g.steps, of);
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
  chunk.slots = tile + of * V::kBytes + int64_t{first} * kQuadBytes;
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
    widen<V>(V::load(chunk.slots + i * kQuadBytes), chunk.weights + i * kWideBytes);
    chunk.quads[i].weights = i * kWideBytes;
    chunk.quads[i].order = entries[i] * 4;
  }
}

/// The steps whose levels a pass should widen for the wide quads of a chunk: none where those are
/// too few to pay for it, or too far apart.
template <class V>
struct WidenedSteps {
  int64_t first = 0;
  int count = 0;

  WidenedSteps() = default;
  WidenedSteps(Chunk<V>* chunks, int lists) {
    uint32_t begin = ~0u, end = 0;
    int quads = 0;
    for (int l = 0; l < lists; ++l) {
      const Chunk<V>& c = chunks[l];
      if (c.wide == c.ordered) continue;
      quads += c.wide - c.ordered;
      begin = least(begin, c.quads[c.ordered].order);  // they ascend
      const uint32_t last = c.quads[c.wide - 1].order;
      end = end < last ? last : end;
    }
    if (quads == 0) return;
    first = begin / kStepBytes;
    const int64_t steps = end / kStepBytes + 1 - first;
    if (steps > V::kMostSteps || steps * kQuadsPerStep > 2 * quads) return;
    count = static_cast<int>(steps);
    for (int l = 0; l < lists; ++l)
      for (int i = chunks[l].ordered; i < chunks[l].wide; ++i)
        chunks[l].quads[i].order -= static_cast<uint32_t>(first) * kStepBytes;
  }

  template <int kRows>
  void widen(const GemmArgs& g, const Rows<kRows>& rows, uint8_t* to) const {
    for (int s = 0; s < count; ++s) {
      const int64_t offset = g.step_offsets[first + s];
      const int live = g.live_quads[first + s];
      for (int quad = 0; quad < live; quad += 8)
        for (int r = 0; r < kRows; ++r)
          widen_quads(rows.at[r] + offset + quad * 4, live - quad,
                      to + r * kWidenedRow<V> + s * kStepBytes + quad * 4, kWidenedPlane<V>);
    }
  }
};

/// A form of the matrix product (passes.hpp).
template <class V>
struct Arranged {
  static constexpr uint32_t kChunk = ::adalayer::cpu::kChunk;
  static constexpr int kRows = V::kRows, kLists = kQuadBytes / V::kBytes;  // of a column tile

  explicit Arranged(const GemmArgs& args)
      : g(args),
        lists(args.tile1 == nullptr ? kLists : 2 * kLists),
        neighbours(are_neighbours(args)) {}

  void look_up(uint32_t first, uint32_t end) {
    for (int l = 0; l < lists; ++l)
      cpu::look_up<V>(g, neighbours, l < kLists ? g.tile0 : g.tile1, l % kLists, first, end,
                      chunks[l]);
    steps = WidenedSteps<V>(chunks, lists);
  }
  template <int kPassRows>
  void multiply(const Rows<kPassRows>& rows, bool first, int32_t* sums) {
    steps.widen(g, rows, widened);
    for (int l = 0; l < lists; ++l)
      cpu::multiply<V>(rows, steps.count > 0 ? widened : nullptr, chunks[l], first,
                       sums + l * (V::kBytes / 4));
  }

  const GemmArgs& g;
  int lists;  // of both column tiles
  bool neighbours;
  WidenedSteps<V> steps;
  Chunk<V> chunks[2 * kLists];
  alignas(V::kBytes) uint8_t widened[kRows * kWidenedRow<V>];
};

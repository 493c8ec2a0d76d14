// Matrix product on vpdpbusd of any vector length. Included inside the unnamed namespace of one ISA
// file only, after planar.inl, whose V it uses.
//
// V also offers kSums, the sums that its registers hold beside the operands, and load_weights(p).

#include "cpu/isa/shared/passes.inl"

// A vpdpbusd takes five cycles and two start in each: fewer than ten sums would wait for
// themselves.
constexpr int kSumsInFlight = 10;

/// Rows from `row` on, kRows of them, x kVectors vectors of sums over all steps: vector c
/// multiplies the weights at weights[c] and goes to sums[r][c * V::kBytes / 4]. Passes of few rows
/// keep several partial sums of each.
template <class V, int kRows, int kVectors>
__attribute__((noinline)) void gemm_pass(const GemmArgs& g, const int8_t* const* weights, int row,
                                         int32_t* sums, int sums_stride) {
  using T = typename V::T;
  constexpr int kProducts = kRows * kVectors;
  constexpr int kSplit = 4 * kProducts <= V::kSums && 2 * kProducts < kSumsInFlight ? 4
                         : 2 * kProducts <= V::kSums && kProducts < kSumsInFlight   ? 2
                                                                                    : 1;
  constexpr int kUnroll = kSplit > 2 ? kSplit : 2;
  const int32_t* const offsets = g.row_offsets + row;
  // Rows have equal shares.
  const uint8_t* fetch = g.fetch + row * g.fetch_row;
  T acc[kSplit][kRows][kVectors];
  unrolled<0, kSplit * kProducts>([&](auto i) __attribute__((always_inline)) {
    acc[i.value / kProducts][i.value / kVectors % kRows][i.value % kVectors] = V::zero();
  });
  for (int64_t s = 0; s < g.steps; ++s) {
    const uint8_t* a = g.activations + g.step_offsets[s];
    for (int line = 0; line < g.fetch_lines; ++line, fetch += 64)
      _mm_prefetch(reinterpret_cast<const char*>(fetch), _MM_HINT_T1);
    const int8_t* b[kVectors];
    unrolled<0, kVectors>([&](auto c) __attribute__((always_inline)) {
      b[c.value] = weights[c.value] + s * formats::kTileBytes;
    });
    const auto multiply = [&](auto part, auto quad) __attribute__((always_inline)) {
      T w[kVectors];
      unrolled<0, kVectors>([&](auto c) __attribute__((always_inline)) {
        const int8_t* p = b[c.value] + quad.value * 64;
        w[c.value] = V::load_weights(p);
        // The same quad of the next step: weights come from the second-level cache, which is too
        // far away for the few products between two loads.
        if constexpr (V::kBytes == 64 || c.value == 0)
          _mm_prefetch(reinterpret_cast<const char*>(p + formats::kTileBytes), _MM_HINT_T0);
      });
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        const T v = V::broadcast(a + offsets[r.value] + quad.value * 4);
        unrolled<0, kVectors>([&](auto c) __attribute__((always_inline)) {
          T& sum = acc[part.value][r.value][c.value];
          sum = V::dot(sum, v, w[c.value]);
        });
      });
    };
    const auto advance = [&](int quads) __attribute__((always_inline)) {
      a += quads * 4;
      unrolled<0, kVectors>([&](auto c)
                                __attribute__((always_inline)) { b[c.value] += quads * 64; });
    };
    int left = g.live_quads[s];
    for (; left >= kUnroll; left -= kUnroll) {
      unrolled<0, kUnroll>([&](auto quad) __attribute__((always_inline)) {
        multiply(Index<quad.value % kSplit>{}, quad);
      });
      advance(kUnroll);
    }
    for (; left > 0; --left) {
      multiply(Index<0>{}, Index<0>{});
      advance(1);
    }
  }
  unrolled<0, kProducts>([&](auto i) __attribute__((always_inline)) {
    constexpr int r = i.value / kVectors, c = i.value % kVectors;
    T sum = acc[0][r][c];
    unrolled<1, kSplit>([&](auto part) __attribute__((always_inline)) {
      sum = V::add(sum, acc[part.value][r][c]);
    });
    V::store_sums(sums + r * sums_stride + c * V::kBytes / 4, sum);
  });
}

/// A pass over `rows` rows, where kMost is the most that `rows` can be.
template <class V, int kMost, int kVectors>
void gemm_rows(const GemmArgs& g, const int8_t* const* weights, int row, int rows, int32_t* sums,
               int sums_stride) {
  if constexpr (kMost > 1) {
    if (rows < kMost)
      return gemm_rows<V, kMost - 1, kVectors>(g, weights, row, rows, sums, sums_stride);
  }
  gemm_pass<V, kMost, kVectors>(g, weights, row, sums, sums_stride);
}

template <class V, int kPassRows, int kVectors>
void gemm_passes(const GemmArgs& g, const int8_t* const* weights, int32_t* sums) {
  for_passes<kPassRows>(g.rows, [&](int row, int rows) {
    gemm_rows<V, kPassRows, kVectors>(g, weights, row, rows, sums + row * kBlockCols, kBlockCols);
  });
}

/// The same, and each pass is requantized before the next one: the processor then overlaps the two,
/// because products and conversions want different ports.
template <class V, int kPassRows, int kVectors>
void gemm_requantize_passes(const GemmArgs& g, const int8_t* const* weights, RequantizeArgs q,
                            Requantize requantize) {
  constexpr int kStride = kVectors * V::kBytes / 4;
  alignas(64) int32_t sums[kPassRows * kStride];
  q.sums = sums;
  q.tiles = kStride / formats::kTileWidth;
  const int32_t *const out = q.out_offset, *const residual = q.residual_offset;
  for_passes<kPassRows>(g.rows, [&](int row, int rows) {
    gemm_rows<V, kPassRows, kVectors>(g, weights, row, rows, sums, kStride);
    q.rows = rows;
    q.out_offset = out + row;
    if (residual != nullptr) q.residual_offset = residual + row;
    requantize(q);
  });
}

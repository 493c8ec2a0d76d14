// How a form of the AVX2 row's matrix product goes over quads and rows, and hands its sums on.
//
// A form has kRows, the rows of a pass; kChunk, the quads that a pass is multiplied by before the
// next one is, in all columns; look_up(first, end), which finds its quads [first, end); and
// multiply(rows, first, sums), which adds their products with a pass of rows to both column tiles'
// sums, or, if `first`, overwrites those.
#pragma once

#include "cpu/isa/avx2/finish.hpp"
#include "cpu/isa/avx2/products.hpp"

// For files with instruction-set flags: nothing in here may be one function for the whole program.
namespace adalayer::cpu {
namespace {

// Rows whose sums wait in the first-level cache for the next chunk, if there is one.
constexpr int kWaitingRows = 112;

/// The rest of the way of both tiles' sums.
class Finish {
 public:
  Finish(const GemmArgs& g, const RequantizeArgs& q, Requantize requantize)
      : q_(q),
        requantize_(requantize),
        tiles_(g.tile1 == nullptr ? 1 : 2),
        columns_{{*q.epilogue, q.channel}, {*q.epilogue, q.channel + (tiles_ - 1) * kTileCols}} {
    const int width = q.whole ? tiles_ * kTileCols : q.cols;
    in_registers_ = width == tiles_ * kTileCols && q.epilogue->finish.table == nullptr;
    q_.cols = width;
    q_.whole = false;
    q_.tiles = kBlockCols / kTileCols;
  }

  int tiles() const { return tiles_; }
  /// Whether levels() may take the sums from registers.
  bool in_registers() const { return in_registers_; }

  /// What levels() wants in the sums, for half a tile; if the sums go to memory: nothing.
  __m256i initial(int tile, int half) const {
    return in_registers_ ? columns_[tile].correction[half] : _mm256_setzero_si256();
  }

  /// Of one row and tile.
  template <bool kResidual, bool kBounded>
  [[gnu::always_inline]] void levels(int row, int tile, __m256i sums0, __m256i sums1) const {
    const int32_t at = q_.out_offset[row];
    if (at < 0) return;
    const int column = tile * kTileCols;
    const uint8_t* residual = kResidual ? q_.residual + q_.residual_offset[row] + column : nullptr;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q_.out + at + column),
                     columns_[tile].levels<kResidual, kBounded>(sums0, sums1, residual));
  }

  /// Of rows whose sums lie in memory, [rows][32].
  void operator()(int row, int rows, const int32_t* sums) const {
    if (!in_registers_) {
      RequantizeArgs part = q_;
      part.sums = sums;
      part.rows = rows;
      part.out_offset += row;
      if (part.residual != nullptr) part.residual_offset += row;
      return requantize_(part);
    }
    with_epilogue([&](auto residual, auto bounded) {
      for (int t = 0; t < tiles_; ++t)
        for (int r = 0; r < rows; ++r) {
          const int32_t* at = sums + r * kBlockCols + t * kTileCols;
          levels<residual.value != 0, bounded.value != 0>(row + r, t, columns_[t].corrected(at, 0),
                                                          columns_[t].corrected(at, 1));
        }
    });
  }

  /// fn(Index<has a residual>{}, Index<ConvEpilogue::bounded>{})
  template <class Fn>
  void with_epilogue(const Fn& fn) const {
    const bool bounded = q_.epilogue->bounded;
    if (q_.residual != nullptr)
      bounded ? fn(Index<1>{}, Index<1>{}) : fn(Index<1>{}, Index<0>{});
    else
      bounded ? fn(Index<0>{}, Index<1>{}) : fn(Index<0>{}, Index<0>{});
  }

 private:
  RequantizeArgs q_;
  Requantize requantize_;
  int tiles_;
  FinishColumns columns_[2];
  bool in_registers_;
};

/// Fetches the share of some rows of the weights that are wanted next into the second-level cache.
inline void fetch(const GemmArgs& g, int row, int rows) {
  if (g.fetch == nullptr) return;
  const uint8_t *at = g.fetch + row * g.fetch_row, *const end = at + rows * g.fetch_row;
  for (; at < end; at += 64)
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

inline uint32_t live_quads(const GemmArgs& g) {
  uint32_t quads = 0;
  for (int64_t s = 0; s < g.steps; ++s)
    quads += g.live_quads[s];
  return quads;
}

/// sums_at(row) is where the sums of a pass go; after(row, rows) follows its last chunk.
template <class Form, class SumsAt, class After>
inline void multiply_passes(const GemmArgs& g, uint32_t quads, Form& form, const SumsAt& sums_at,
                            const After& after) {
  for (uint32_t first = 0; first < quads; first += Form::kChunk) {
    const bool last = quads - first <= Form::kChunk;
    form.look_up(first, last ? quads : first + Form::kChunk);
    for_passes<Form::kRows>(g.rows, [&](int row, auto n) {
      if (last) fetch(g, row, n.value);
      form.multiply(Rows<n.value>(g, row), first == 0, sums_at(row));
      if (last) after(row, n.value);
    });
  }
}

/// KernelRow::gemm
template <class Form>
inline void gemm(const GemmArgs& g, Form& form) {
  const uint32_t quads = live_quads(g);
  if (quads == 0)
    std::memset(g.sums, 0, static_cast<size_t>(g.rows) * kBlockCols * sizeof(int32_t));
  multiply_passes(
      g, quads, form, [&](int row) { return g.sums + row * kBlockCols; }, [](int, int) {});
}

/// KernelRow::gemm_requantize
template <class Form>
inline void gemm_requantize(const GemmArgs& g, const RequantizeArgs& q, Requantize requantize,
                            Form& form) {
  alignas(kVectorBytes) int32_t sums[kWaitingRows * kBlockCols];
  const Finish finish(g, q, requantize);
  const uint32_t quads = live_quads(g);
  if (quads > 0 && quads <= Form::kChunk)
    return multiply_passes(
        g, quads, form, [&](int) { return sums; },
        [&](int row, int rows) { finish(row, rows, sums); });
  for_stretches<kWaitingRows>(g.rows, [&](int row, int rows) {
    GemmArgs part = g;
    part.row_offsets += row;
    part.rows = rows;
    part.sums = sums;
    if (g.fetch != nullptr) part.fetch += row * g.fetch_row;
    gemm(part, form);
    finish(row, rows, sums);
  });
}

}  // namespace
}  // namespace adalayer::cpu

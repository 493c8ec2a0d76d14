// The matrix product of the ARM rows: passes of a few rows over all steps, whose sums stay in
// registers. Included inside the unnamed namespace of one ISA file only, after
// cpu/isa/shared/unrolled.hpp and arm_neon.h.
//
// A form has
//   kRows, kColumns    of a pass: rows of levels by columns of one tile
//   kUnitsTogether     of 16 levels of a whole step that `multiply` takes one after the other
//   levels(v)          16 levels as it multiplies them
//   Columns            what it has to know about a tile: made of its weights once per call
//   Sums<rows>         with zero(), multiply<kQuads, kFirst, kLast>(levels, w): the products of the
//                      first quads of a unit with the weights at w, where kFirst and kLast say
//                      which end of kUnitsTogether it is; and store(columns, column, to)

#include "cpu/isa/shared/passes.inl"

constexpr int kQuadBytes = formats::kTileWidth * 4;  // of a quad of levels' weights
constexpr int kUnitQuads = 4;                        // of levels in a register

/// `quads` of four levels each, as a register that has zeros behind them. Nothing else is read.
inline uint8x16_t load_quads(const uint8_t* levels, int quads) {
  uint32x4_t v = vdupq_n_u32(0);
  uint32_t quad[3] = {};
  std::memcpy(&quad[0], levels, 4);
  if (quads > 1) std::memcpy(&quad[1], levels + 4, 4);
  if (quads > 2) std::memcpy(&quad[2], levels + 8, 4);
  v = vsetq_lane_u32(quad[0], v, 0);
  v = vsetq_lane_u32(quad[1], v, 1);
  v = vsetq_lane_u32(quad[2], v, 2);
  return vreinterpretq_u8_u32(v);
}

template <class Form, int kRows>
__attribute__((noinline)) void product_pass(const GemmArgs& g, const int8_t* tile,
                                            const typename Form::Columns& columns, int row,
                                            int32_t* to) {
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r)
    rows[r] = g.activations + g.row_offsets[row + r];
  const uint8_t* fetch = g.fetch + row * g.fetch_row;
  for (int column = 0; column < formats::kTileWidth; column += Form::kColumns) {
    typename Form::template Sums<kRows> sums;
    sums.zero();
    for (int64_t s = 0; s < g.steps; ++s) {
      const int8_t* w = tile + s * formats::kTileBytes + column * 4;
      const int64_t step = g.step_offsets[s];
      if (column == 0)
        for (int line = 0; line < g.fetch_lines; ++line, fetch += 64)
          __builtin_prefetch(fetch, 0, 2);
      const auto unit = [&](int64_t at, auto first, auto last) __attribute__((always_inline)) {
        uint8x16_t levels[kRows];
        unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
          levels[r.value] = Form::levels(vld1q_u8(rows[r.value] + at));
        });
        sums.template multiply<kUnitQuads, first.value != 0, last.value != 0>(levels, w);
        w += kUnitQuads * kQuadBytes;
      };
      int left = g.live_quads[s];
      int64_t at = step;
      constexpr int kTogether = Form::kUnitsTogether;
      if constexpr (kTogether > 1) {
        for (; left >= kTogether * kUnitQuads; left -= kTogether * kUnitQuads) {
          unrolled<0, kTogether>([&](auto u) __attribute__((always_inline)) {
            unit(at + u.value * 16, Index<u.value == 0>{}, Index<u.value == kTogether - 1>{});
          });
          at += kTogether * 16;
        }
      }
      for (; left >= kUnitQuads; left -= kUnitQuads, at += 16)
        unit(at, Index<1>{}, Index<1>{});
      if (left == 0) continue;
      uint8x16_t levels[kRows];
      unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
        levels[r.value] = Form::levels(load_quads(rows[r.value] + at, left));
      });
      if (left == 1)
        sums.template multiply<1, true, true>(levels, w);
      else if (left == 2)
        sums.template multiply<2, true, true>(levels, w);
      else
        sums.template multiply<3, true, true>(levels, w);
    }
    sums.store(columns, column, to + column);
  }
}

template <class Form, int kMost>
void product_rows(const GemmArgs& g, const int8_t* tile, const typename Form::Columns& columns,
                  int row, int rows, int32_t* to) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return product_rows<Form, kMost - 1>(g, tile, columns, row, rows, to);
  }
  product_pass<Form, kMost>(g, tile, columns, row, to);
}

template <class Form>
void product_of_tile(const GemmArgs& g, const int8_t* tile, const typename Form::Columns& columns,
                     int32_t* sums) {
  for_passes<Form::kRows>(g.rows, [&](int row, int rows) {
    product_rows<Form, Form::kRows>(g, tile, columns, row, rows, sums + row * kBlockCols);
  });
}

/// fn(tile, its sums) of both tiles.
template <class Fn>
void for_tiles(const GemmArgs& g, const Fn& fn) {
  fn(g.tile0, g.sums);
  if (g.tile1 != nullptr) fn(g.tile1, g.sums + formats::kTileWidth);
}

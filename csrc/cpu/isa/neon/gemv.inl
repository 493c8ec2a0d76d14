// Matrix times 1 to 4 vectors for the ARM rows. Included inside the unnamed namespace of one ISA
// file only, after bytes128.inl.
//
// Levels are u8 and weights s8, and the instructions that every machine of a row has multiply like
// by like. A weight of b bits plus 2^(b - 1) is unsigned, and one operation makes that of its
// packed field, where sign extension takes two. So both sides are unsigned here, and
//
//   sum of a * w = sum of a * (w + 2^(b - 1)) - 2^(b - 1) * sum of a,
//
// of which the last sum is one per row. Everything is modulo 2^32, as sums are: the result is exact
// because the true one fits (check_accumulator).
//
// D offers Sum, sums of four columns in kRegisters registers, with zero(); total(sum), the columns
// in one register; and dot<kBits>(sum, a0, w0, a1, w1), which adds the products of two quads.

struct Unsigned128 : Bytes128 {
  template <int kBits>
  static T finish(T u) {
    return veorq_u8(u, vdupq_n_u8(1 << (kBits - 1)));
  }
};

/// Sum of all levels of a row.
inline uint32_t level_sum(const GemvArgs& g, int row) {
  uint32x4_t sum = vdupq_n_u32(0);
  for (int64_t s = 0; s < g.steps; ++s) {
    const uint8_t* a = g.activations[row] + g.step_offsets[s];
    uint16x8_t words = vpaddlq_u8(vld1q_u8(a));
    for (int part = 16; part < formats::kTileDepth; part += 16)
      words = vpadalq_u8(words, vld1q_u8(a + part));
    sum = vpadalq_u16(sum, words);
  }
  return vaddvq_u32(sum);
}

/// kParts quarters of the columns of a tile, from column 4 * part on.
template <class D, int kBits, int kRows, int kParts>
[[gnu::noinline]] void gemv_parts(const GemvArgs& g, const uint8_t* tile, int part,
                                  typename D::Sum (&sums)[kRows][kParts]) {
  unrolled<0, kRows * kParts>([&](auto i) __attribute__((always_inline)) {
    sums[i.value / kParts][i.value % kParts] = D::zero();
  });
  for (int64_t s = 0; s < g.steps; ++s, tile += formats::kTileBytes / 8 * kBits) {
    const int64_t step = g.step_offsets[s];
    unrolled<0, kTileVectors / 2>([&](auto pair) __attribute__((always_inline)) {
      constexpr int v = 2 * pair.value;
      prefetch_line<kBits, v>(tile);
      prefetch_line<kBits, v + 1>(tile);
      uint8x16_t a[kRows][2];
      unrolled<0, kRows * 2>([&](auto i) __attribute__((always_inline)) {
        const uint8_t* at = g.activations[i.value / 2] + step + (v + i.value % 2) * 4;
        uint32_t quad;
        std::memcpy(&quad, at, 4);
        a[i.value / 2][i.value % 2] = vreinterpretq_u8_u32(vdupq_n_u32(quad));
      });
      unrolled<0, kParts>([&](auto p) __attribute__((always_inline)) {
        const int at = (part + p.value) * 16;
        uint8x16_t w0 = decode<Unsigned128, kBits, v>(tile, at);
        uint8x16_t w1 = decode<Unsigned128, kBits, v + 1>(tile, at);
        if constexpr (kBits == 8) {  // which are not decoded
          w0 = Unsigned128::finish<8>(w0);
          w1 = Unsigned128::finish<8>(w1);
        }
        unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
          D::template dot<kBits>(sums[r.value][p.value], a[r.value][0], w0, a[r.value][1], w1);
        });
      });
    });
  }
}

template <class D, int kBits, int kRows>
void gemv_of_rows(const GemvArgs& g) {
  // As many columns at once as leave the operands room beside their sums.
  constexpr int kParts = kRows * D::kRegisters > 4 ? 2 : 4;
  uint32_t offset[kRows];
  for (int r = 0; r < kRows; ++r)
    offset[r] = level_sum(g, r) << (kBits - 1);
  const int64_t tile_bytes = g.steps * (formats::kTileBytes / 8 * kBits);
  for (int64_t t = 0; t < g.column_tiles; ++t)
    for (int part = 0; part < 4; part += kParts) {
      typename D::Sum sums[kRows][kParts];
      gemv_parts<D, kBits, kRows, kParts>(g, g.packed + t * tile_bytes, part, sums);
      for (int r = 0; r < kRows; ++r)
        for (int p = 0; p < kParts; ++p) {
          const uint32x4_t total = vsubq_u32(D::total(sums[r][p]), vdupq_n_u32(offset[r]));
          vst1q_s32(g.sums + r * g.sums_stride + t * formats::kTileWidth + (part + p) * 4,
                    vreinterpretq_s32_u32(total));
        }
    }
}

template <class D, int kBits>
void gemv_of_bits(const GemvArgs& g) {
  switch (g.rows) {
    case 1:
      return gemv_of_rows<D, kBits, 1>(g);
    case 2:
      return gemv_of_rows<D, kBits, 2>(g);
    case 3:
      return gemv_of_rows<D, kBits, 3>(g);
    default:
      return gemv_of_rows<D, kBits, 4>(g);
  }
}

template <class D>
void gemv_of(const GemvArgs& g) {
  switch (g.bits) {
    case 2:
      return gemv_of_bits<D, 2>(g);
    case 3:
      return gemv_of_bits<D, 3>(g);
    case 4:
      return gemv_of_bits<D, 4>(g);
    case 5:
      return gemv_of_bits<D, 5>(g);
    case 6:
      return gemv_of_bits<D, 6>(g);
    case 7:
      return gemv_of_bits<D, 7>(g);
    default:
      return gemv_of_bits<D, 8>(g);
  }
}

// What image.inl needs of bytes and the x86 rows have alike. Included between their V and
// image.inl.

/// pshufb looks up 16 bytes and gives 0 where the index is negative. With the differences of
/// neighbouring pieces of the table, an index that loses 16 at each step collects, by XOR, exactly
/// the piece that it belongs to, and nothing once it is negative.
struct Pieces {
  V::I difference[16];
  explicit Pieces(const uint8_t* table) {
    for (int k = 0; k < 16; ++k) {
      const V::I piece = V::repeat16(table + 16 * k);
      // The halves of the table are looked up apart, by the lower seven bits.
      difference[k] = k % 8 == 0 ? piece : V::bit_xor(piece, V::repeat16(table + 16 * (k - 1)));
    }
  }
  V::I operator()(V::I index) const {
    V::I rest = V::bit_and(index, V::set8(0x7F));
    V::I low = V::zero(), high = V::zero();
    const V::I sixteen = V::set8(16);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      low = V::bit_xor(low, V::shuffle(difference[k], rest));
      high = V::bit_xor(high, V::shuffle(difference[8 + k], rest));
      rest = V::sub8(rest, sixteen);
    }
    return V::choose_by_sign(index, high, low);
  }
};

void interleave_sixteen(const uint8_t* a, const uint8_t* b, uint8_t* out) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(x, y));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm_unpackhi_epi8(x, y));
}

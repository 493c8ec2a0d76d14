// 64 bytes at a time with AVX-512, for planar.inl; what differs are the products. Included inside
// the unnamed namespace of one ISA file only.

struct Bytes512 {
  using T = __m512i;
  static constexpr int kBytes = 64;
  static T load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static T load_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
  static void store(int8_t* p, T v) { _mm512_storeu_si512(p, v); }
  static T bit_or(T a, T b) { return _mm512_or_si512(a, b); }
  template <int kBits, int kWidth, int kT, int kAt>
  static T field(T chunk) {
    // Shifts work on 16-bit lanes, so bits of the neighbouring byte come in; the mask drops them.
    constexpr int kShift = kAt - kT * kWidth;
    if constexpr (kShift > 0) chunk = _mm512_slli_epi16(chunk, kShift);
    if constexpr (kShift < 0) chunk = _mm512_srli_epi16(chunk, -kShift);
    return _mm512_and_si512(chunk, set1(((1 << kWidth) - 1) << kAt));
  }
  template <int kBits>
  static T finish(T u) {
    const T sign = set1(1 << (kBits - 1));
    return _mm512_sub_epi8(_mm512_xor_si512(u, sign), sign);
  }
  static T set1(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static T zero() { return _mm512_setzero_si512(); }
  static T broadcast(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static T add(T a, T b) { return _mm512_add_epi32(a, b); }
  static void store_sums(int32_t* p, T v) { _mm512_storeu_si512(p, v); }
};

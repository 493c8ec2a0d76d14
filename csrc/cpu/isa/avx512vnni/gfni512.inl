// 64 bytes at a time with AVX-512-VNNI and GFNI, for planar.inl. Included inside the unnamed
// namespace of one ISA file only.

/// Row i of an affine matrix (byte 7 - i of the quadword) selects the input bits of output bit i.
constexpr uint64_t affine_matrix(int bits, int width, int t, int at) {
  const bool top = at + width == bits;
  uint64_t matrix = 0;
  for (int i = at; i < (top ? 8 : at + width); ++i) {
    // Sign extension copies the top bit upwards.
    const int from = i - at < width ? i - at : width - 1;
    matrix |= uint64_t{1} << ((7 - i) * 8 + t * width + from);
  }
  return matrix;
}

struct Gfni512 {
  using T = __m512i;
  static constexpr int kBytes = 64;
  static T load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(int8_t* p, T v) { _mm512_storeu_si512(p, v); }
  static T bit_or(T a, T b) { return _mm512_or_si512(a, b); }
  template <int kBits, int kWidth, int kT, int kAt>
  static T field(T chunk) {
    constexpr uint64_t kMatrix = affine_matrix(kBits, kWidth, kT, kAt);
    return _mm512_gf2p8affine_epi64_epi8(chunk, _mm512_set1_epi64(static_cast<int64_t>(kMatrix)),
                                         0);
  }
  template <int kBits>
  static T finish(T u) {
    return u;
  }
  static T zero() { return _mm512_setzero_si512(); }
  static T broadcast(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  template <int kBits>
  static constexpr int kRun = 1;
  static T dot(T sum, T a, T w) { return _mm512_dpbusd_epi32(sum, a, w); }
  static T add(T a, T b) { return _mm512_add_epi32(a, b); }
  static void store_sums(int32_t* p, T v) { _mm512_storeu_si512(p, v); }
};

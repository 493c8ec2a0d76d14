// Vectors of 512 bits for winograd.inl, all but the dot product. Included inside the unnamed
// namespace of one ISA file only.

struct Vec512 {
  using T = __m512i;
  static constexpr int kLevels = 32;  // levels, or factors, of a vector
  static constexpr int kSums = 16;
  static constexpr int kGroups = 2, kRows = 12;  // 24 of 32 registers hold sums

  static T load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, T v) { _mm512_storeu_si512(p, v); }
  static T load_levels(const uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static T load_narrow(const uint8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  /// int16 that fit int8.
  static void store_narrow(uint8_t* p, T v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(v));
  }
  static T broadcast(const int16_t* pair) {
    int32_t both;
    std::memcpy(&both, pair, sizeof both);
    return _mm512_set1_epi32(both);
  }
  static T set32(int32_t v) { return _mm512_set1_epi32(v); }
  static T add16(T a, T b) { return _mm512_add_epi16(a, b); }
  static T sub16(T a, T b) { return _mm512_sub_epi16(a, b); }
  template <int kBits>
  static T shl16(T a) {
    return _mm512_slli_epi16(a, kBits);
  }
  static T add32(T a, T b) { return _mm512_add_epi32(a, b); }
  static T sub32(T a, T b) { return _mm512_sub_epi32(a, b); }
  static T mul32(T a, T b) { return _mm512_mullo_epi32(a, b); }
  template <int kBits>
  static T sra32(T a) {
    return _mm512_srai_epi32(a, kBits);
  }
};

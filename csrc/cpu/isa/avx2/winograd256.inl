// Vectors of 256 bits for winograd.inl, all but the dot product. Included inside the unnamed
// namespace of one ISA file only.

struct Vec256 {
  using T = __m256i;
  static constexpr int kLevels = 16;  // levels, or factors, of a vector
  static constexpr int kSums = 8;
  static constexpr int kGroups = 1, kRows = 6;  // 12 of 16 registers hold sums

  static T load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, T v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static T load_levels(const uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static T load_narrow(const uint8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  /// int16 that fit int8.
  static void store_narrow(uint8_t* p, T v) {
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  static T broadcast(const int16_t* pair) {
    int32_t both;
    std::memcpy(&both, pair, sizeof both);
    return _mm256_set1_epi32(both);
  }
  static T set32(int32_t v) { return _mm256_set1_epi32(v); }
  static T add16(T a, T b) { return _mm256_add_epi16(a, b); }
  static T sub16(T a, T b) { return _mm256_sub_epi16(a, b); }
  template <int kBits>
  static T shl16(T a) {
    return _mm256_slli_epi16(a, kBits);
  }
  static T add32(T a, T b) { return _mm256_add_epi32(a, b); }
  static T sub32(T a, T b) { return _mm256_sub_epi32(a, b); }
  static T mul32(T a, T b) { return _mm256_mullo_epi32(a, b); }
  template <int kBits>
  static T sra32(T a) {
    return _mm256_srai_epi32(a, kBits);
  }
};

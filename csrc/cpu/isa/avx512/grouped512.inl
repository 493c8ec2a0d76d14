// What grouped.inl asks of vectors of 512 bits, all but the products. Included inside the unnamed
// namespace of one ISA file only.

struct Grouped512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int kBytes = 64, kDwords = 16, kLanes = 4;
  static constexpr int kColumns = 8;
  static constexpr int kKnownTaps = 0;
  static constexpr int kInLaneColumns = 4, kBroadcastSums = 16;

  static I zero() { return _mm512_setzero_si512(); }
  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static I load_weights(const void* p) { return load(p); }
  static void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I load_constant(const void* p, int i) { return load(static_cast<const I*>(p) + i); }
  static F as_floats(I v) { return _mm512_castsi512_ps(v); }
  static I broadcast_granule(const uint8_t* p) { return _mm512_broadcast_i32x4(granule(p)); }
  static I broadcast_dword(const uint8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static I widen_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(granule(p)); }

  template <int kSplit>
  static I load_split(const uint8_t* const* p, int64_t step, int64_t offset) {
    if constexpr (kSplit == 1) return load(p[0] + offset);
    if constexpr (kSplit == 2)
      return _mm512_inserti64x4(_mm512_castsi256_si512(half_block(p[0] + offset)),
                                half_block(p[step] + offset), 1);
    I v = _mm512_castsi128_si512(granule(p[0] + offset));
    v = _mm512_inserti32x4(v, granule(p[step] + offset), 1);
    v = _mm512_inserti32x4(v, granule(p[2 * step] + offset), 2);
    return _mm512_inserti32x4(v, granule(p[3 * step] + offset), 3);
  }
  /// `bytes` of each piece exist.
  template <int kSplit>
  static void store_split(uint8_t* const* p, int64_t step, int64_t offset, I v, int64_t bytes) {
    if constexpr (kSplit == 1) {
      if (bytes == 64) return _mm512_storeu_si512(p[0] + offset, v);
      return _mm512_mask_storeu_epi8(p[0] + offset, (uint64_t{1} << bytes) - 1, v);
    }
    if constexpr (kSplit == 2) {
      const auto mask = static_cast<__mmask32>((uint64_t{1} << bytes) - 1);
      _mm256_mask_storeu_epi8(p[0] + offset, mask, _mm512_castsi512_si256(v));
      _mm256_mask_storeu_epi8(p[step] + offset, mask, _mm512_extracti64x4_epi64(v, 1));
    }
    if constexpr (kSplit == 4) {
      const auto mask = static_cast<__mmask16>((1u << bytes) - 1);
      _mm_mask_storeu_epi8(p[0] + offset, mask, _mm512_castsi512_si128(v));
      _mm_mask_storeu_epi8(p[step] + offset, mask, _mm512_extracti32x4_epi32(v, 1));
      _mm_mask_storeu_epi8(p[2 * step] + offset, mask, _mm512_extracti32x4_epi32(v, 2));
      _mm_mask_storeu_epi8(p[3 * step] + offset, mask, _mm512_extracti32x4_epi32(v, 3));
    }
  }
  /// The 128-bit pieces of one split lie 16 dwords apart: granule by granule.
  template <int kSplit>
  static void store_sums(int32_t* const* p, int64_t step, int64_t offset, I v) {
    constexpr int kPieces = 4 / kSplit;
    const auto at = [&](int piece) {
      return reinterpret_cast<__m128i*>(p[piece / kPieces * step] + offset + piece % kPieces * 16);
    };
    _mm_storeu_si128(at(0), _mm512_castsi512_si128(v));
    _mm_storeu_si128(at(1), _mm512_extracti32x4_epi32(v, 1));
    _mm_storeu_si128(at(2), _mm512_extracti32x4_epi32(v, 2));
    _mm_storeu_si128(at(3), _mm512_extracti32x4_epi32(v, 3));
  }
  static void store_dwords(int32_t* p, I v, int64_t count) {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1),
                             v);
  }
  static void store_dwords_as_bytes(uint8_t* p, I v, int64_t bytes) {
    const auto mask = static_cast<__mmask16>(bytes >= 16 ? 0xFFFF : (1u << bytes) - 1);
    _mm_mask_storeu_epi8(p, mask, _mm512_cvtepi32_epi8(v));
  }

  /// Dword kQuad of each group, in all dwords that belong to the group.
  template <int kQuads, int kQuad>
  static I quad_of_group(I v) {
    if constexpr (kQuads == 1) return v;
    if constexpr (kQuads == 2) {
      if constexpr (kQuad == 0) return _mm512_shuffle_epi32(v, _MM_PERM_ENUM(0xA0));
      return _mm512_shuffle_epi32(v, _MM_PERM_ENUM(0xF5));
    }
    return _mm512_shuffle_epi32(v, _MM_PERM_ENUM(kQuad * 0x55));
  }

  static F set1(float v) { return _mm512_set1_ps(v); }
  static I set1_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static I set1_words(int v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
  static I set1_dwords(int v) { return _mm512_set1_epi32(v); }
  static F to_floats(I v) { return _mm512_cvtepi32_ps(v); }
  static I round(F v) { return _mm512_cvtps_epi32(v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add_floats(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul_floats(F a, F b) { return _mm512_mul_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static I shuffle_bytes(I v, I by) { return _mm512_shuffle_epi8(v, by); }
  static I pack_words(I a, I b) { return _mm512_packs_epi32(a, b); }
  static I pack_bytes(I a, I b) { return _mm512_packus_epi16(a, b); }
  static I add_words(I a, I b) { return _mm512_adds_epi16(a, b); }
  static I add_dwords(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub_dwords(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I max_bytes(I a, I b) { return _mm512_max_epu8(a, b); }
  static I min_bytes(I a, I b) { return _mm512_min_epu8(a, b); }
  static I max_dwords(I a, I b) { return _mm512_max_epi32(a, b); }
  static I min_dwords(I a, I b) { return _mm512_min_epi32(a, b); }

 private:
  static __m128i granule(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static __m256i half_block(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
};

// Depthwise and grouped convolutions with AVX2: products of int16 pairs (vpmaddwd), since
// vpmaddubsw would saturate at eight-bit weights.
#include <immintrin.h>

#include "cpu/grouped_kernels.hpp"

namespace adalayer::cpu::avx2 {
namespace {

#include "cpu/isa/shared/grouped.inl"

struct Words256 {
  using I = __m256i;
  using F = __m256;
  static constexpr int kBytes = 32, kDwords = 8, kLanes = 2;
  static constexpr int kRows = 2, kHalves = 2;
  static constexpr int kColumns = 4;
  // Of a kernel whose loops are written out: offsets known to the compiler need no registers.
  static constexpr int kKnownTaps = 3;
  static constexpr int kInLaneColumns = 2, kBroadcastSums = 8;

  static I zero() { return _mm256_setzero_si256(); }
  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static I load_weights(const void* p) { return load(p); }
  static void store(void* p, I v) { _mm256_storeu_si256(static_cast<I*>(p), v); }
  static I load_constant(const void* p, int i) { return load(static_cast<const I*>(p) + i); }
  static F as_floats(I v) { return _mm256_castsi256_ps(v); }
  static I broadcast_granule(const uint8_t* p) { return _mm256_broadcastsi128_si256(granule(p)); }
  static I broadcast_dword(const uint8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static I widen_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }

  template <int kSplit>
  static I load_split(const uint8_t* const* p, int64_t step, int64_t offset) {
    if constexpr (kSplit == 1) return load(p[0] + offset);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(granule(p[0] + offset)),
                                   granule(p[step] + offset), 1);
  }
  template <int kSplit>
  static void store_split(uint8_t* const* p, int64_t step, int64_t offset, I v, int64_t bytes) {
    const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
    if constexpr (kSplit == 1) {
      if (bytes == 32) return _mm256_storeu_si256(reinterpret_cast<I*>(p[0] + offset), v);
      store_granule(p[0] + offset, low, bytes);
      if (bytes > 16) store_granule(p[0] + offset + 16, high, bytes - 16);
    } else {
      store_granule(p[0] + offset, low, bytes);
      store_granule(p[step] + offset, high, bytes);
    }
  }
  /// The 128-bit pieces of one split lie 16 dwords apart: granule by granule.
  template <int kSplit>
  static void store_sums(int32_t* const* p, int64_t step, int64_t offset, I v) {
    int32_t* second = kSplit == 1 ? p[0] + 16 : p[step];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p[0] + offset), _mm256_castsi256_si128(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(second + offset), _mm256_extracti128_si256(v, 1));
  }
  static void store_dwords(int32_t* p, I v, int64_t count) {
    const I lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const I wanted =
        _mm256_cmpgt_epi32(set1_dwords(count < 8 ? static_cast<int>(count) : 8), lanes);
    _mm256_maskstore_epi32(p, wanted, v);
  }
  static void store_dwords_as_bytes(uint8_t* p, I v, int64_t bytes) {
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    store_granule(p, _mm_packus_epi16(words, words), bytes < 8 ? bytes : 8);
  }

  /// Two rows of bytes to int16 pairs of vertical neighbours: 4 channels of each 128-bit piece in
  /// every vector, in order.
  static void interleave(const I* row, uint8_t* to) {
    auto* out = reinterpret_cast<I*>(to);
    const I lo = _mm256_unpacklo_epi8(row[0], row[1]), hi = _mm256_unpackhi_epi8(row[0], row[1]);
    _mm256_storeu_si256(out, _mm256_unpacklo_epi8(lo, zero()));
    _mm256_storeu_si256(out + 1, _mm256_unpackhi_epi8(lo, zero()));
    _mm256_storeu_si256(out + 2, _mm256_unpacklo_epi8(hi, zero()));
    _mm256_storeu_si256(out + 3, _mm256_unpackhi_epi8(hi, zero()));
  }
  /// sum + _mm256_madd_epi16(data, w). From the intrinsics g++ 12 sends operands through memory.
  static I dot(I sum, I data, I w) {
    I products;
    __asm__("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(data), "xm"(w));
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
  }
  static I dot_column(I sum, I data, I w) { return dot(sum, data, w); }
  /// Bytes 0, 2 or 1, 3 of each dword as int16.
  static I half(I v, int which) {
    return which == 0 ? _mm256_and_si256(v, _mm256_set1_epi16(0x00FF)) : _mm256_srli_epi16(v, 8);
  }

  template <int kQuads, int kQuad>
  static I quad_of_group(I v) {
    if constexpr (kQuads == 1) return v;
    if constexpr (kQuads == 2) return _mm256_shuffle_epi32(v, kQuad == 0 ? 0xA0 : 0xF5);
    return _mm256_shuffle_epi32(v, kQuad * 0x55);
  }

  static F set1(float v) { return _mm256_set1_ps(v); }
  static I set1_bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static I set1_words(int v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
  static I set1_dwords(int v) { return _mm256_set1_epi32(v); }
  static F to_floats(I v) { return _mm256_cvtepi32_ps(v); }
  static I round(F v) { return _mm256_cvtps_epi32(v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add_floats(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul_floats(F a, F b) { return _mm256_mul_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static I shuffle_bytes(I v, I by) { return _mm256_shuffle_epi8(v, by); }
  static I pack_words(I a, I b) { return _mm256_packs_epi32(a, b); }
  static I pack_bytes(I a, I b) { return _mm256_packus_epi16(a, b); }
  static I add_words(I a, I b) { return _mm256_adds_epi16(a, b); }
  static I add_dwords(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub_dwords(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I max_bytes(I a, I b) { return _mm256_max_epu8(a, b); }
  static I min_bytes(I a, I b) { return _mm256_min_epu8(a, b); }
  static I max_dwords(I a, I b) { return _mm256_max_epi32(a, b); }
  static I min_dwords(I a, I b) { return _mm256_min_epi32(a, b); }

 private:
  static __m128i granule(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static void store_granule(uint8_t* p, __m128i v, int64_t bytes) {
    if (bytes >= 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
    if ((bytes & 8) != 0) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v);
      v = _mm_srli_si128(v, 8);
      p += 8;
    }
    auto rest = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
    for (int64_t i = 0; i < (bytes & 7); ++i, rest >>= 8)
      p[i] = static_cast<uint8_t>(rest);
  }
};

}  // namespace

const GroupedKernels kGrouped{Words256::kLanes,    Words256::kRows,   Words256::kHalves,
                              depthwise<Words256>, in_lane<Words256>, broadcast<Words256>};

}  // namespace adalayer::cpu::avx2

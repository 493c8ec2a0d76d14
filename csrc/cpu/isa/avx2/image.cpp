// The image kernels in AVX2 with FMA. Short loads of bytes go by dwords.
#include <immintrin.h>

#include <cstring>

#include "cpu/image_kernels.hpp"

namespace adalayer::cpu {
namespace avx2 {
namespace {

struct Whole {};

struct V {
  using F = __m256;
  using I = __m256i;
  static constexpr int64_t kLanes = 8, kBlock = 32;

  static __m256i mask32(int64_t left) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left < 8 ? left : 8)), iota());
  }

  static F set(float v) { return _mm256_set1_ps(v); }
  static I set8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static I set16(int v) { return _mm256_set1_epi16(static_cast<short>(v)); }
  static I set32(int32_t v) { return _mm256_set1_epi32(v); }
  static I zero() { return _mm256_setzero_si256(); }
  static I iota() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }

  static I ints(const uint8_t* p, Whole) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I ints(const uint8_t* p, int64_t left) {
    if (left > 4) return ints(p, Whole{});
    int four;
    std::memcpy(&four, p, 4);
    return _mm256_cvtepu8_epi32(_mm_cvtsi32_si128(four));
  }
  template <class Left>
  static F bytes(const uint8_t* p, Left left) {
    return to_float(ints(p, left));
  }
  static F floats(const float* p, Whole) { return _mm256_loadu_ps(p); }
  static F floats(const float* p, int64_t left) { return _mm256_maskload_ps(p, mask32(left)); }
  static void store_floats(float* p, F v, Whole) { _mm256_storeu_ps(p, v); }
  static void store_floats(float* p, F v, int64_t left) { _mm256_maskstore_ps(p, mask32(left), v); }
  static I load(const uint8_t* p, Whole) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static I load(const uint8_t* p, int64_t left) {
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), mask32((left + 3) / 4));
  }
  static I load_zero(const uint8_t* p, int64_t left) {
    // 32 times 0xFF, then zeros: the window that starts 32 - left bytes in keeps `left` bytes.
    alignas(32) static constexpr uint8_t kKeep[64] = {
        255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
        255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    return _mm256_and_si256(load(p, left), load(kKeep + 32 - left, Whole{}));
  }
  static void store(uint8_t* p, I v, Whole) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static void store(uint8_t* p, I v, int64_t left) {
    if (left >= 32) return store(p, v, Whole{});
    __m128i part = _mm256_castsi256_si128(v);
    if (left >= 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), part);
      part = _mm256_extracti128_si256(v, 1);
      p += 16;
    }
    if ((left & 8) != 0) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p), part);
      part = _mm_srli_si128(part, 8);
      p += 8;
    }
    auto rest = static_cast<uint64_t>(_mm_cvtsi128_si64(part));
    if ((left & 4) != 0) {
      std::memcpy(p, &rest, 4);
      rest >>= 32;
      p += 4;
    }
    for (int64_t i = 0; i < (left & 3); ++i, rest >>= 8)
      p[i] = static_cast<uint8_t>(rest);
  }
  static I repeat16(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F triples(const float* p, Whole) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 3), 1);
  }
  static F triples(const float* p, int64_t left) {
    return left > 4 ? triples(p, Whole{}) : _mm256_castps128_ps256(_mm_loadu_ps(p));
  }
  static I gather32(const uint8_t* p, I offsets) {
    return _mm256_i32gather_epi32(reinterpret_cast<const int*>(p), offsets, 1);
  }
  static F gather_floats(const float* p, const int32_t* index, Whole) {
    return _mm256_i32gather_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4);
  }
  static F gather_floats(const float* p, const int32_t* index, int64_t left) {
    return _mm256_i32gather_ps(p, _mm256_maskload_epi32(index, mask32(left)), 4);
  }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static I round(F v) { return _mm256_cvtps_epi32(v); }
  static F nearest(F v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static F power(F n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }

  static I packs32(I a, I b) { return _mm256_packs_epi32(a, b); }
  static I packus16(I a, I b) { return _mm256_packus_epi16(a, b); }
  static I unmix(I v) {
    return _mm256_permutevar8x32_epi32(v, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
  }
  static I adds16(I a, I b) { return _mm256_adds_epi16(a, b); }
  static I add16(I a, I b) { return _mm256_add_epi16(a, b); }
  static I sub16(I a, I b) { return _mm256_sub_epi16(a, b); }
  /// Whole numbers that fit int16.
  static void store_bytes(uint8_t* p, I v) {
    const __m128i shorts =
        _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(shorts, shorts));
  }
  static I add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul32(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I min32(I a, I b) { return _mm256_min_epi32(a, b); }
  static I add64(I a, I b) { return _mm256_add_epi64(a, b); }
  static I sub8(I a, I b) { return _mm256_sub_epi8(a, b); }
  static I choose_by_sign(I sign, I negative, I other) {
    return _mm256_blendv_epi8(other, negative, sign);
  }
  static I max8(I a, I b) { return _mm256_max_epu8(a, b); }
  static I min8(I a, I b) { return _mm256_min_epu8(a, b); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I shuffle(I table, I index) { return _mm256_shuffle_epi8(table, index); }
  template <int n>
  static I shl16(I v) {
    return _mm256_slli_epi16(v, n);
  }
  template <int n>
  static I shr16(I v) {
    return _mm256_srli_epi16(v, n);
  }
  template <int n>
  static I shl32(I v) {
    return _mm256_slli_epi32(v, n);
  }
  template <int n>
  static I shr32(I v) {
    return _mm256_srli_epi32(v, n);
  }
  static I unpack_low8(I v) { return _mm256_unpacklo_epi8(v, _mm256_setzero_si256()); }
  static I unpack_high8(I v) { return _mm256_unpackhi_epi8(v, _mm256_setzero_si256()); }
  static I unpack_low32(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
  static I unpack_high32(I a, I b) { return _mm256_unpackhi_epi32(a, b); }
  static I unpack_low64(I a, I b) { return _mm256_unpacklo_epi64(a, b); }
  static I unpack_high64(I a, I b) { return _mm256_unpackhi_epi64(a, b); }
  static I dot16(I a, I b) { return _mm256_madd_epi16(a, b); }
  static I sum8(I v) { return _mm256_sad_epu8(v, _mm256_setzero_si256()); }
  static int64_t total32(I v) {
    return total64(_mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                                    _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1))));
  }
  static int64_t total64(I v) {
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
  }

  static __m256d set_double(double v) { return _mm256_set1_pd(v); }
  static F join(__m128 low, __m128 high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
  }
  template <class Left>
  static F centred(const uint8_t* p, Left left, __m256d mean) {
    const I q = ints(p, left);
    const __m256d low = _mm256_cvtepi32_pd(_mm256_castsi256_si128(q));
    const __m256d high = _mm256_cvtepi32_pd(_mm256_extracti128_si256(q, 1));
    return join(_mm256_cvtpd_ps(_mm256_sub_pd(low, mean)),
                _mm256_cvtpd_ps(_mm256_sub_pd(high, mean)));
  }
  struct Doubles {
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    void add(F v) {
      low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
      high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    }
    F inverse() const {
      const __m256d one = _mm256_set1_pd(1.0);
      return join(_mm256_cvtpd_ps(_mm256_div_pd(one, low)),
                  _mm256_cvtpd_ps(_mm256_div_pd(one, high)));
    }
  };
};

#include "cpu/isa/shared/bytes_x86.inl"
// Which comes first.
#include "cpu/isa/shared/image.inl"
// The rest of it.
#include "cpu/isa/shared/attention.inl"
#include "cpu/isa/shared/floats.inl"
#include "cpu/isa/shared/linear.inl"
#include "cpu/isa/shared/recurrence.inl"
// What they all define.
#include "cpu/isa/shared/image_table.inl"

}  // namespace
}  // namespace avx2

const ImageKernels kAvx2Image = avx2::kImage;

}  // namespace adalayer::cpu

// The image kernels in AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

#include <cstring>

#include "cpu/image_kernels.hpp"

namespace adalayer::cpu {
namespace avx512 {
namespace {

struct Whole {};

struct V {
  using F = __m512;
  using I = __m512i;
  static constexpr int64_t kLanes = 16, kBlock = 64;

  static __mmask16 mask16(int64_t left) {
    return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
  }
  static __mmask64 mask64(int64_t left) {
    return left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
  }

  static F set(float v) { return _mm512_set1_ps(v); }
  static I set8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static I set16(int v) { return _mm512_set1_epi16(static_cast<short>(v)); }
  static I set32(int32_t v) { return _mm512_set1_epi32(v); }
  static I zero() { return _mm512_setzero_si512(); }
  static I iota() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

  static I ints(const uint8_t* p, Whole) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I ints(const uint8_t* p, int64_t left) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask16(left), p));
  }
  template <class Left>
  static F bytes(const uint8_t* p, Left left) {
    return to_float(ints(p, left));
  }
  static F floats(const float* p, Whole) { return _mm512_loadu_ps(p); }
  static F floats(const float* p, int64_t left) { return _mm512_maskz_loadu_ps(mask16(left), p); }
  static void store_floats(float* p, F v, Whole) { _mm512_storeu_ps(p, v); }
  static void store_floats(float* p, F v, int64_t left) {
    _mm512_mask_storeu_ps(p, mask16(left), v);
  }
  static I load(const uint8_t* p, Whole) { return _mm512_loadu_si512(p); }
  static I load(const uint8_t* p, int64_t left) { return _mm512_maskz_loadu_epi8(mask64(left), p); }
  static I load_zero(const uint8_t* p, int64_t left) { return load(p, left); }
  static void store(uint8_t* p, I v, Whole) { _mm512_storeu_si512(p, v); }
  static void store(uint8_t* p, I v, int64_t left) { _mm512_mask_storeu_epi8(p, mask64(left), v); }
  /// 16 bytes in every 128 bits.
  static I repeat16(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  /// Three floats to every four lanes.
  static F triples(const float* p, Whole) { return _mm512_maskz_expandloadu_ps(0x7777, p); }
  static F triples(const float* p, int64_t left) {
    return _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(mask16(left) & 0x7777), p);
  }
  static I gather32(const uint8_t* p, I offsets) { return _mm512_i32gather_epi32(offsets, p, 1); }
  static F gather_floats(const float* p, const int32_t* index, Whole) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
  }
  static F gather_floats(const float* p, const int32_t* index, int64_t left) {
    return _mm512_i32gather_ps(_mm512_maskz_loadu_epi32(mask16(left), index), p, 4);
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static I round(F v) { return _mm512_cvtps_epi32(v); }
  static F nearest(F v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  /// 2^n for whole n.
  static F power(F n) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }

  static I packs32(I a, I b) { return _mm512_packs_epi32(a, b); }
  static I packus16(I a, I b) { return _mm512_packus_epi16(a, b); }
  /// Undoes the order of two packs: dword l of register r lies at 128 bits l, dword r.
  static I unmix(I v) {
    return _mm512_permutexvar_epi32(
        _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), v);
  }
  static I adds16(I a, I b) { return _mm512_adds_epi16(a, b); }
  static I add16(I a, I b) { return _mm512_add_epi16(a, b); }
  static I sub16(I a, I b) { return _mm512_sub_epi16(a, b); }
  /// Whole numbers that fit int16.
  static void store_bytes(uint8_t* p, I v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static I add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul32(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I min32(I a, I b) { return _mm512_min_epi32(a, b); }
  static I add64(I a, I b) { return _mm512_add_epi64(a, b); }
  static I sub8(I a, I b) { return _mm512_sub_epi8(a, b); }
  static I choose_by_sign(I sign, I negative, I other) {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(sign), other, negative);
  }
  static I max8(I a, I b) { return _mm512_max_epu8(a, b); }
  static I min8(I a, I b) { return _mm512_min_epu8(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I shuffle(I table, I index) { return _mm512_shuffle_epi8(table, index); }
  template <int n>
  static I shl16(I v) {
    return _mm512_slli_epi16(v, n);
  }
  template <int n>
  static I shr16(I v) {
    return _mm512_srli_epi16(v, n);
  }
  template <int n>
  static I shl32(I v) {
    return _mm512_slli_epi32(v, n);
  }
  template <int n>
  static I shr32(I v) {
    return _mm512_srli_epi32(v, n);
  }
  static I unpack_low8(I v) { return _mm512_unpacklo_epi8(v, _mm512_setzero_si512()); }
  static I unpack_high8(I v) { return _mm512_unpackhi_epi8(v, _mm512_setzero_si512()); }
  static I unpack_low32(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
  static I unpack_high32(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
  static I unpack_low64(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
  static I unpack_high64(I a, I b) { return _mm512_unpackhi_epi64(a, b); }
  static I dot16(I a, I b) { return _mm512_madd_epi16(a, b); }
  /// Sums of eight bytes each, as 64-bit numbers.
  static I sum8(I v) { return _mm512_sad_epu8(v, _mm512_setzero_si512()); }
  static int64_t total32(I v) {
    return _mm512_reduce_add_epi64(
        _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                         _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1))));
  }
  static int64_t total64(I v) { return _mm512_reduce_add_epi64(v); }

  static __m512d set_double(double v) { return _mm512_set1_pd(v); }
  static F join(__m256 low, __m256 high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  /// (float)((double)q - mean)
  template <class Left>
  static F centred(const uint8_t* p, Left left, __m512d mean) {
    const I q = ints(p, left);
    const __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(q));
    const __m512d high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(q, 1));
    return join(_mm512_cvtpd_ps(_mm512_sub_pd(low, mean)),
                _mm512_cvtpd_ps(_mm512_sub_pd(high, mean)));
  }
  struct Doubles {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    void add(F v) {
      low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
      high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
    }
    F inverse() const {
      const __m512d one = _mm512_set1_pd(1.0);
      return join(_mm512_cvtpd_ps(_mm512_div_pd(one, low)),
                  _mm512_cvtpd_ps(_mm512_div_pd(one, high)));
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
}  // namespace avx512

const ImageKernels kAvx512Image = avx512::kImage;

}  // namespace adalayer::cpu

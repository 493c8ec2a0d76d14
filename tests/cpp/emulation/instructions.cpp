#include "instructions.hpp"

#include <immintrin.h>

#include <cstring>

namespace emulation_test {
namespace {

using In = const uint8_t*;
using Out = uint8_t*;

__m512i ints(In in, int i) { return _mm512_loadu_si512(in + 64 * i); }
__m512 floats(In in, int i) { return _mm512_loadu_ps(reinterpret_cast<const float*>(in + 64 * i)); }
__m256i half(In in, int i) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 64 * i));
}
__m256 half_floats(In in, int i) { return _mm256_castsi256_ps(half(in, i)); }
__m128i quarter(In in, int i) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 64 * i));
}
template <class T>
T scalar(In in) {
  T v;
  std::memcpy(&v, in, sizeof v);
  return v;
}
uint64_t mask(In in) { return scalar<uint64_t>(in + 192); }
__mmask16 mask16(In in) { return static_cast<__mmask16>(mask(in)); }
/// Dwords 0..63: elements, or places behind a pointer into the input.
__m512i small(In in, int i) { return _mm512_and_si512(ints(in, i), _mm512_set1_epi32(63)); }
__m512d doubles(In in, int i) { return _mm512_cvtps_pd(half_floats(in, i)); }

void put(Out out, __m512i v) { _mm512_storeu_si512(out, v); }
void put(Out out, __m512 v) { _mm512_storeu_ps(reinterpret_cast<float*>(out), v); }
void put(Out out, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v); }
void put(Out out, __m256 v) { put(out, _mm256_castps_si256(v)); }
void put(Out out, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), v); }
void put(Out out, __m512d v) { put(out, _mm512_cvtpd_ps(v)); }
template <class T>
void put_scalar(Out out, T v) {
  std::memcpy(out, &v, sizeof v);
}

#define DOES(...) [](In in, Out out) { (void)in, (void)out, __VA_ARGS__; }
// Each spells out its name itself, before the emulation's macros replace it.
#define CASE(needs, name, ...) {#name, Needs::needs, DOES(__VA_ARGS__)}
#define INTS(needs, name) {#name, Needs::needs, DOES(put(out, name(ints(in, 0), ints(in, 1))))}
#define FLOATS(name) {#name, Needs::Avx512, DOES(put(out, name(floats(in, 0), floats(in, 1))))}
#define DOUBLES(name) {#name, Needs::Avx512, DOES(put(out, name(doubles(in, 0), doubles(in, 1))))}
#define SHIFT(name) {#name, Needs::Avx512, DOES(put(out, name(name(ints(in, 0), 1), 4)))}

constexpr Instruction kAll[] = {
    INTS(Avx512, _mm512_add_epi16),
    INTS(Avx512, _mm512_add_epi32),
    INTS(Avx512, _mm512_add_epi64),
    INTS(Avx512, _mm512_adds_epi16),
    INTS(Avx512, _mm512_and_si512),
    INTS(Avx512, _mm512_madd_epi16),
    INTS(Avx512, _mm512_maddubs_epi16),
    INTS(Avx512, _mm512_max_epi32),
    INTS(Avx512, _mm512_max_epi8),
    INTS(Avx512, _mm512_max_epu8),
    INTS(Avx512, _mm512_min_epi32),
    INTS(Avx512, _mm512_min_epi8),
    INTS(Avx512, _mm512_min_epu8),
    INTS(Avx512, _mm512_mullo_epi32),
    INTS(Avx512, _mm512_or_si512),
    INTS(Avx512, _mm512_packs_epi32),
    INTS(Avx512, _mm512_packus_epi16),
    INTS(Avx512, _mm512_permutexvar_epi32),
    INTS(Avx512, _mm512_sad_epu8),
    INTS(Avx512, _mm512_shuffle_epi8),
    INTS(Avx512, _mm512_sub_epi16),
    INTS(Avx512, _mm512_sub_epi32),
    INTS(Avx512, _mm512_sub_epi8),
    INTS(Avx512, _mm512_unpackhi_epi16),
    INTS(Avx512, _mm512_unpackhi_epi32),
    INTS(Avx512, _mm512_unpackhi_epi64),
    INTS(Avx512, _mm512_unpackhi_epi8),
    INTS(Avx512, _mm512_unpacklo_epi16),
    INTS(Avx512, _mm512_unpacklo_epi32),
    INTS(Avx512, _mm512_unpacklo_epi64),
    INTS(Avx512, _mm512_unpacklo_epi8),
    INTS(Avx512, _mm512_xor_si512),
    FLOATS(_mm512_add_ps),
    FLOATS(_mm512_div_ps),
    FLOATS(_mm512_max_ps),
    FLOATS(_mm512_min_ps),
    FLOATS(_mm512_mul_ps),
    FLOATS(_mm512_sub_ps),
    DOUBLES(_mm512_add_pd),
    DOUBLES(_mm512_div_pd),
    DOUBLES(_mm512_sub_pd),
    SHIFT(_mm512_slli_epi16),
    SHIFT(_mm512_slli_epi32),
    SHIFT(_mm512_srai_epi16),
    SHIFT(_mm512_srai_epi32),
    SHIFT(_mm512_srli_epi16),
    SHIFT(_mm512_srli_epi32),
    CASE(Vnni, _mm512_dpbusd_epi32,
         put(out, _mm512_dpbusd_epi32(ints(in, 0), ints(in, 1), ints(in, 2)))),
    CASE(Vnni, _mm512_dpwssd_epi32,
         put(out, _mm512_dpwssd_epi32(ints(in, 0), ints(in, 1), ints(in, 2)))),
    CASE(AvxVnni, _mm256_dpbusd_avx_epi32,
         put(out, _mm256_dpbusd_avx_epi32(half(in, 0), half(in, 1), half(in, 2)))),
    CASE(AvxVnni, _mm256_dpwssd_avx_epi32,
         put(out, _mm256_dpwssd_avx_epi32(half(in, 0), half(in, 1), half(in, 2)))),
    CASE(Gfni, _mm512_gf2p8affine_epi64_epi8,
         put(out, _mm512_gf2p8affine_epi64_epi8(ints(in, 0), ints(in, 1), 0x5B))),
    CASE(Avx512, _mm512_fmadd_ps,
         put(out, _mm512_fmadd_ps(floats(in, 0), floats(in, 1), floats(in, 2)))),
    CASE(Avx512, _mm512_roundscale_ps,
         put(out,
             _mm512_roundscale_ps(floats(in, 0), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))),
    CASE(Avx512, _mm512_castsi512_ps, put(out, _mm512_castsi512_ps(ints(in, 0)))),
    CASE(Avx512, _mm512_cvtepi32_ps, put(out, _mm512_cvtepi32_ps(ints(in, 0)))),
    CASE(Avx512, _mm512_cvtps_epi32, put(out, _mm512_cvtps_epi32(floats(in, 0)))),
    CASE(Avx512, _mm512_cvtepi32_epi64, put(out, _mm512_cvtepi32_epi64(half(in, 0)))),
    CASE(Avx512, _mm512_cvtepi32_pd, put(out, _mm512_cvtepi32_pd(half(in, 0)))),
    CASE(Avx512, _mm512_cvtepi8_epi16, put(out, _mm512_cvtepi8_epi16(half(in, 0)))),
    CASE(Avx512, _mm512_cvtepu8_epi16, put(out, _mm512_cvtepu8_epi16(half(in, 0)))),
    CASE(Avx512, _mm512_cvtepu8_epi32, put(out, _mm512_cvtepu8_epi32(quarter(in, 0)))),
    CASE(Avx512, _mm512_cvtepi16_epi8, put(out, _mm512_cvtepi16_epi8(ints(in, 0)))),
    CASE(Avx512, _mm512_cvtepi32_epi16, put(out, _mm512_cvtepi32_epi16(ints(in, 0)))),
    CASE(Avx512, _mm512_cvtepi32_epi8, put(out, _mm512_cvtepi32_epi8(ints(in, 0)))),
    CASE(Avx512, _mm512_cvtps_pd and _mm512_cvtpd_ps,
         put(out, _mm512_cvtpd_ps(_mm512_cvtps_pd(half_floats(in, 0))))),
    CASE(Avx512, _mm512_broadcast_i32x4, put(out, _mm512_broadcast_i32x4(quarter(in, 0)))),
    CASE(Avx512, _mm512_castps256_ps512,
         put(out, _mm512_castps512_ps256(_mm512_castps256_ps512(half_floats(in, 0))))),
    CASE(Avx512, _mm512_castsi128_si512,
         put(out, _mm512_castsi512_si128(_mm512_castsi128_si512(quarter(in, 0))))),
    CASE(Avx512, _mm512_castsi256_si512,
         put(out, _mm512_castsi512_si256(_mm512_castsi256_si512(half(in, 0))))),
    CASE(Avx512, _mm512_extractf32x8_ps, put(out, _mm512_extractf32x8_ps(floats(in, 0), 0)),
         put(out + 32, _mm512_extractf32x8_ps(floats(in, 0), 1))),
    CASE(Avx512, _mm512_extracti64x4_epi64, put(out, _mm512_extracti64x4_epi64(ints(in, 0), 0)),
         put(out + 32, _mm512_extracti64x4_epi64(ints(in, 0), 1))),
    CASE(Avx512, _mm512_extracti32x4_epi32, put(out, _mm512_extracti32x4_epi32(ints(in, 0), 3)),
         put(out + 16, _mm512_extracti32x4_epi32(ints(in, 0), 2)),
         put(out + 32, _mm512_extracti32x4_epi32(ints(in, 0), 1)),
         put(out + 48, _mm512_extracti32x4_epi32(ints(in, 0), 0))),
    CASE(Avx512, _mm512_insertf32x8,
         put(out, _mm512_insertf32x8(floats(in, 0), half_floats(in, 1), 1))),
    CASE(Avx512, _mm512_inserti64x4, put(out, _mm512_inserti64x4(ints(in, 0), half(in, 1), 1))),
    CASE(Avx512, _mm512_inserti32x4,
         put(out, _mm512_inserti32x4(_mm512_inserti32x4(ints(in, 0), quarter(in, 1), 1),
                                     quarter(in, 2), 3))),
    CASE(Avx512, _mm512_reduce_add_epi64, put_scalar(out, _mm512_reduce_add_epi64(ints(in, 0)))),
    CASE(Avx512, _mm512_shuffle_epi32,
         put(out, _mm512_shuffle_epi32(ints(in, 0), _MM_PERM_ENUM(0x6C)))),
    CASE(Avx512, _mm512_set1_epi8, put(out, _mm512_set1_epi8(scalar<char>(in)))),
    CASE(Avx512, _mm512_set1_epi16, put(out, _mm512_set1_epi16(scalar<int16_t>(in)))),
    CASE(Avx512, _mm512_set1_epi32, put(out, _mm512_set1_epi32(scalar<int32_t>(in)))),
    CASE(Avx512, _mm512_set1_epi64, put(out, _mm512_set1_epi64(scalar<int64_t>(in)))),
    CASE(Avx512, _mm512_set1_ps, put(out, _mm512_set1_ps(scalar<float>(in)))),
    CASE(Avx512, _mm512_set1_pd, put(out, _mm512_set1_pd(scalar<float>(in)))),
    CASE(Avx512, _mm512_setzero_si512, put(out, _mm512_setzero_si512())),
    CASE(Avx512, _mm512_setzero_pd, put(out, _mm512_setzero_pd())),
    CASE(Avx512, _mm512_set_epi32,
         put(out, _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0))),
    CASE(Avx512, _mm512_load_si512 and _mm512_store_si512,
         _mm512_store_si512(out, _mm512_load_si512(in))),
    CASE(Vbmi, _mm512_mask_permutexvar_epi8,
         put(out, _mm512_mask_permutexvar_epi8(ints(in, 0), mask(in), ints(in, 1), ints(in, 2)))),
    CASE(Avx512, _mm512_permutex2var_epi32,
         put(out, _mm512_permutex2var_epi32(ints(in, 0), ints(in, 1), ints(in, 2)))),
    CASE(Vbmi, _mm512_permutex2var_epi8,
         put(out, _mm512_permutex2var_epi8(ints(in, 0), ints(in, 1), ints(in, 2)))),
    CASE(Vbmi2, _mm512_mask_expand_epi8,
         put(out, _mm512_mask_expand_epi8(ints(in, 0), mask(in), ints(in, 1)))),
    CASE(Avx512, _mm512_maskz_compress_epi32,
         put(out, _mm512_maskz_compress_epi32(mask16(in), ints(in, 0)))),
    CASE(Avx512, _mm512_mask_compressstoreu_ps,
         _mm512_mask_compressstoreu_ps(out, mask16(in), floats(in, 0))),
    CASE(Avx512, _mm512_maskz_expandloadu_ps,
         put(out, _mm512_maskz_expandloadu_ps(mask16(in), in + 3))),
    CASE(Avx512, _mm512_i32gather_epi32, put(out, _mm512_i32gather_epi32(small(in, 0), in, 1))),
    CASE(Avx512, _mm512_i32gather_ps, put(out, _mm512_i32gather_ps(small(in, 0), in, 2))),
    CASE(Avx512, _mm512_mask_i32gather_epi32,
         put(out, _mm512_mask_i32gather_epi32(ints(in, 0), mask16(in), small(in, 1), in, 2))),
    CASE(Avx512, _mm512_movepi8_mask, put_scalar(out, uint64_t{_mm512_movepi8_mask(ints(in, 0))})),
    CASE(Avx512, _mm512_abs_epi8, put(out, _mm512_abs_epi8(ints(in, 0)))),
    CASE(Avx512, _mm512_cmpgt_epi16_mask,
         put_scalar(out, _mm512_cmpgt_epi16_mask(ints(in, 0), ints(in, 1)))),
    CASE(Avx512, _mm512_test_epi32_mask,
         put_scalar(out, _mm512_test_epi32_mask(ints(in, 0), small(in, 1)))),
    CASE(Avx512, _mm512_cmpge_epi32_mask,
         put_scalar(out, _mm512_cmpge_epi32_mask(ints(in, 0), ints(in, 1)))),
    CASE(Avx512, _mm512_mask_blend_epi8,
         put(out, _mm512_mask_blend_epi8(mask(in), ints(in, 0), ints(in, 1)))),
    CASE(Avx512, _mm512_mask_loadu_epi32,
         put(out, _mm512_mask_loadu_epi32(ints(in, 0), mask16(in), in + 65))),
    CASE(Avx512, _mm512_maskz_loadu_epi32, put(out, _mm512_maskz_loadu_epi32(mask16(in), in + 5))),
    CASE(Avx512, _mm512_maskz_loadu_epi8, put(out, _mm512_maskz_loadu_epi8(mask(in), in + 5))),
    CASE(Avx512, _mm512_maskz_loadu_ps, put(out, _mm512_maskz_loadu_ps(mask16(in), in + 5))),
    CASE(Avx512, _mm_maskz_loadu_epi8, put(out, _mm_maskz_loadu_epi8(mask16(in), in + 5))),
    CASE(Avx512, _mm512_mask_storeu_epi32, _mm512_mask_storeu_epi32(out, mask16(in), ints(in, 0))),
    CASE(Avx512, _mm512_mask_storeu_epi8, _mm512_mask_storeu_epi8(out, mask(in), ints(in, 0))),
    CASE(Avx512, _mm512_mask_storeu_ps, _mm512_mask_storeu_ps(out, mask16(in), floats(in, 0))),
    CASE(Avx512, _mm256_mask_storeu_epi8,
         _mm256_mask_storeu_epi8(out, static_cast<__mmask32>(mask(in)), half(in, 0))),
    CASE(Avx512, _mm_mask_storeu_epi8, _mm_mask_storeu_epi8(out, mask16(in), quarter(in, 0))),
    CASE(Avx512, _mm512_mask_cvtepi32_storeu_epi8,
         _mm512_mask_cvtepi32_storeu_epi8(out, mask16(in), ints(in, 0))),
};

}  // namespace

Instructions INSTRUCTIONS() { return {kAll, static_cast<int>(sizeof kAll / sizeof kAll[0])}; }

}  // namespace emulation_test

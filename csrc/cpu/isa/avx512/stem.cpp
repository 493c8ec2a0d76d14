// The input step of a network with AVX-512: float planes to row groups (conv/stem.hpp).
#include <immintrin.h>

#include "cpu/isa/avx512/avx512.hpp"

namespace adalayer::cpu::avx512 {
namespace {

__mmask16 tail_mask(int64_t left) {
  return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
}

}  // namespace

void quantize_quads(const float* x, int64_t channel_stride, int64_t channels, int64_t w,
                    const ActivationGrid& grid, uint32_t* quads) {
  const __m512 inv = _mm512_set1_ps(grid.inv_scale);
  const __m512 lo = _mm512_set1_ps(static_cast<float>(-grid.zero_point));
  const __m512 hi = _mm512_set1_ps(static_cast<float>(grid.qmax - grid.zero_point));
  const __m512i zero = _mm512_set1_epi32(grid.zero_point);
  for (int64_t i = 0; i < w; i += 16) {
    const __mmask16 m = tail_mask(w - i);
    __m512i quad = _mm512_setzero_si512();
    for (int64_t c = channels - 1; c >= 0; --c) {
      // max and min in this order make NaN the lowest level.
      const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + c * channel_stride + i), inv);
      const __m512i q =
          _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(v, lo), hi)), zero);
      quad = _mm512_or_si512(_mm512_slli_epi32(quad, 8), q);
    }
    _mm512_mask_storeu_epi32(quads + i, m, quad);
  }
}

void interleave_pairs(const uint32_t* first, const uint32_t* second, int64_t n, uint8_t* out) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high =
      _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    const __m512i a = _mm512_maskz_loadu_epi32(m, first + i);
    const __m512i b = _mm512_maskz_loadu_epi32(m, second + i);
    _mm512_mask_storeu_epi32(out + 8 * i, tail_mask(2 * (n - i)),
                             _mm512_permutex2var_epi32(a, low, b));
    if (n - i > 8)
      _mm512_mask_storeu_epi32(out + 8 * i + 64, tail_mask(2 * (n - i) - 16),
                               _mm512_permutex2var_epi32(a, high, b));
  }
}

void interleave_fours(const uint32_t* const* lines, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    __m512i line[4];
    for (int k = 0; k < 4; ++k)
      line[k] = _mm512_maskz_loadu_epi32(m, lines[k] + i);
    // A 4 x 4 transpose of dwords within each 128-bit lane: lane l of part p is pixel 4 * l + p.
    const __m512i ab_low = _mm512_unpacklo_epi32(line[0], line[1]);
    const __m512i ab_high = _mm512_unpackhi_epi32(line[0], line[1]);
    const __m512i cd_low = _mm512_unpacklo_epi32(line[2], line[3]);
    const __m512i cd_high = _mm512_unpackhi_epi32(line[2], line[3]);
    alignas(64) uint8_t part[4][64];
    _mm512_store_si512(part[0], _mm512_unpacklo_epi64(ab_low, cd_low));
    _mm512_store_si512(part[1], _mm512_unpackhi_epi64(ab_low, cd_low));
    _mm512_store_si512(part[2], _mm512_unpacklo_epi64(ab_high, cd_high));
    _mm512_store_si512(part[3], _mm512_unpackhi_epi64(ab_high, cd_high));
    const int64_t pixels = n - i < 16 ? n - i : 16;
    for (int64_t p = 0; p < pixels; ++p)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * (i + p)),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(&part[p % 4][p / 4 * 16])));
  }
}

}  // namespace adalayer::cpu::avx512

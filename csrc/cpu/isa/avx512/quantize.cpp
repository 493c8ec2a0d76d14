// Floats to levels with AVX-512.
#include <immintrin.h>

#include "cpu/isa/avx512/avx512.hpp"

namespace adalayer::cpu::avx512 {
namespace {

#include "cpu/isa/avx512/grid512.inl"

}  // namespace

void quantize_row(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q) {
  const Grid g(grid);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i),
                     _mm512_cvtepi32_epi8(g.levels(_mm512_loadu_ps(x + i))));
  }
  if (i < n) {
    const __mmask16 m = tail_mask(n - i);
    _mm512_mask_cvtepi32_storeu_epi8(q + i, m, g.levels(_mm512_maskz_loadu_ps(m, x + i)));
  }
}

namespace {

/// Three planes, the channels of an image, to three bytes per pixel.
void quantize_rgb(const float* x, int64_t channel_stride, int64_t w, const Grid& g, uint8_t* q) {
  const __m512i three_of_four =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const __m512i compact = _mm512_set_epi32(15, 11, 7, 3, 14, 13, 12, 10, 9, 8, 6, 5, 4, 2, 1, 0);
  for (int64_t i = 0; i < w; i += 16, q += 48) {
    const __mmask16 m = tail_mask(w - i);
    const auto plane = [&](int c) {
      return g.levels(_mm512_maskz_loadu_ps(m, x + c * channel_stride + i));
    };
    __m512i pixels = _mm512_or_si512(_mm512_slli_epi32(plane(2), 16),
                                     _mm512_or_si512(_mm512_slli_epi32(plane(1), 8), plane(0)));
    pixels = _mm512_permutexvar_epi32(compact, _mm512_shuffle_epi8(pixels, three_of_four));
    if (w - i >= 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_castsi512_si256(pixels));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 32), _mm512_extracti32x4_epi32(pixels, 2));
    } else {
      _mm512_mask_storeu_epi8(q, (__mmask64{1} << (3 * (w - i))) - 1, pixels);
    }
  }
}

}  // namespace

void quantize_planar(const float* x, int64_t channel_stride, int64_t channels, int64_t w,
                     const ActivationGrid& grid, uint8_t* q) {
  const Grid g(grid);
  if (channels == 3) return quantize_rgb(x, channel_stride, w, g, q);
  for (int64_t x0 = 0; x0 < w; x0 += 16) {
    const __mmask16 m = tail_mask(w - x0);
    const int64_t pixels = w - x0 < 16 ? w - x0 : 16;
    for (int64_t c0 = 0; c0 < channels; c0 += 16) {
      // Four channels share a dword per pixel; a 4 x 4 dword transpose within each 128-bit lane
      // then gives 16 channels of one pixel side by side.
      __m512i quad[4];
      for (int64_t k = 0; k < 4; ++k) {
        __m512i packed = _mm512_setzero_si512();
        for (int64_t j = 3; j >= 0; --j) {
          const int64_t c = c0 + 4 * k + j;
          packed = _mm512_slli_epi32(packed, 8);
          if (c < channels)
            packed = _mm512_or_si512(
                packed, g.levels(_mm512_maskz_loadu_ps(m, x + c * channel_stride + x0)));
        }
        quad[k] = packed;
      }
      const __m512i ab_lo = _mm512_unpacklo_epi32(quad[0], quad[1]);
      const __m512i ab_hi = _mm512_unpackhi_epi32(quad[0], quad[1]);
      const __m512i cd_lo = _mm512_unpacklo_epi32(quad[2], quad[3]);
      const __m512i cd_hi = _mm512_unpackhi_epi32(quad[2], quad[3]);
      // Lane l of pixel_in_lane[p] is pixel 4 * l + p.
      alignas(64) uint8_t rows[4][64];
      _mm512_store_si512(rows[0], _mm512_unpacklo_epi64(ab_lo, cd_lo));
      _mm512_store_si512(rows[1], _mm512_unpackhi_epi64(ab_lo, cd_lo));
      _mm512_store_si512(rows[2], _mm512_unpacklo_epi64(ab_hi, cd_hi));
      _mm512_store_si512(rows[3], _mm512_unpackhi_epi64(ab_hi, cd_hi));
      const auto count = static_cast<size_t>(channels - c0 < 16 ? channels - c0 : 16);
      uint8_t* dst = q + x0 * channels + c0;
      if (count == 16) {
        for (int64_t p = 0; p < pixels; ++p, dst += channels)
          _mm_storeu_si128(
              reinterpret_cast<__m128i*>(dst),
              _mm_load_si128(reinterpret_cast<const __m128i*>(&rows[p % 4][p / 4 * 16])));
      } else {
        const auto keep = static_cast<__mmask16>((1u << count) - 1);
        for (int64_t p = 0; p < pixels; ++p, dst += channels)
          _mm_mask_storeu_epi8(
              dst, keep,
              _mm_load_si128(reinterpret_cast<const __m128i*>(&rows[p % 4][p / 4 * 16])));
      }
    }
  }
}

void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y) {
  const Grid g(grid);
  const __m512 step = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = tail_mask(n - i);
    const __m512 v = _mm512_cvtepi32_ps(g.relative(_mm512_maskz_loadu_ps(m, x + i)));
    _mm512_mask_storeu_ps(y + i, m, _mm512_mul_ps(v, step));
  }
}

}  // namespace adalayer::cpu::avx512

// Requantization with AVX2.
#include <immintrin.h>

#include <cstring>

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

__m256i load_sums(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

/// One column tile: the constants of its sixteen channels stay in registers for all rows.
template <bool kResidual>
void requantize_tile(const RequantizeArgs& a, int t) {
  const ConvEpilogue& e = *a.epilogue;
  const int64_t channel = a.channel + 16 * t;
  const int width = (a.whole ? 16 * a.tiles : a.cols) - 16 * t;
  if (width <= 0) return;
  const auto count = static_cast<size_t>(width < 16 ? width : 16);
  const uint8_t* const table = e.finish.table;
  __m256 scale[2], bias[2];
  __m256i correction[2];
  for (int h = 0; h < 2; ++h) {
    scale[h] = _mm256_loadu_ps(e.scale + channel + 8 * h);
    bias[h] = _mm256_loadu_ps(e.bias + channel + 8 * h);
    correction[h] = e.correction == nullptr ? _mm256_setzero_si256()
                                            : load_sums(e.correction + channel + 8 * h);
  }
  const __m256 lo = _mm256_set1_ps(e.finish.lo), hi = _mm256_set1_ps(e.finish.hi);
  const __m256 inv_scale = _mm256_set1_ps(e.finish.inv_scale);
  const __m256 residual_scale = _mm256_set1_ps(e.residual_scale);
  const __m256i residual_zero = _mm256_set1_epi32(e.residual_zero);
  const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(e.finish.zero_point));
  const int32_t* sums = a.sums + 16 * t;
  for (int r = 0; r < a.rows; ++r, sums += 16 * a.tiles) {
    if (a.out_offset[r] < 0) continue;
    __m256i relative[2];
    for (int h = 0; h < 2; ++h) {
      const __m256i sum = _mm256_add_epi32(load_sums(sums + 8 * h), correction[h]);
      __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale[h], bias[h]);
      if constexpr (kResidual) {
        const uint8_t* q = a.residual + a.residual_offset[r] + 16 * t + 8 * h;
        const __m256i wide =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
        const __m256 level = _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, residual_zero));
        y = _mm256_add_ps(y, _mm256_mul_ps(level, residual_scale));
      }
      y = _mm256_mul_ps(y, inv_scale);
      relative[h] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(y, lo), hi));
    }
    // Packing works within lanes: the four quarters come out as low0 high0 low1 high1.
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_adds_epi16(_mm256_packs_epi32(relative[0], relative[1]), zero), 0xD8);
    const __m128i q =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    uint8_t* const out = a.out + a.out_offset[r] + 16 * t;
    if (count == 16 && table == nullptr) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), q);
      continue;
    }
    alignas(16) uint8_t levels[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(levels), q);
    if (table != nullptr)
      for (uint8_t& level : levels)
        level = table[level];
    std::memcpy(out, levels, count);
  }
}

}  // namespace

void requantize_avx2(const RequantizeArgs& a) {
  for (int t = 0; t < a.tiles; ++t)
    if (a.residual != nullptr)
      requantize_tile<true>(a, t);
    else
      requantize_tile<false>(a, t);
}

}  // namespace adalayer::cpu

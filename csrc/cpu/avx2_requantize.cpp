// Requantization with AVX2, one row of 16 or 32 channels at a time.
#include <immintrin.h>

#include <cstring>

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

/// 8 sums to int32 levels without their zero point.
__m256i levels8(const RequantizeArgs& a, const int32_t* sums, int64_t channel,
                const uint8_t* residual) {
  const ConvEpilogue& e = *a.epilogue;
  __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums));
  if (e.correction != nullptr)
    sum = _mm256_add_epi32(
        sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(e.correction + channel)));
  __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(e.scale + channel),
                             _mm256_loadu_ps(e.bias + channel));
  if (residual != nullptr) {
    const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(residual));
    y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(q)),
                        _mm256_set1_ps(e.residual_scale), y);
  }
  y = _mm256_min_ps(_mm256_max_ps(y, _mm256_set1_ps(e.finish.lo)), _mm256_set1_ps(e.finish.hi));
  return _mm256_cvtps_epi32(y);
}

/// 16 channels of one row to 16 bytes.
__m128i levels16(const RequantizeArgs& a, const int32_t* sums, int64_t channel,
                 const uint8_t* residual) {
  const __m256i low = levels8(a, sums, channel, residual);
  const __m256i high =
      levels8(a, sums + 8, channel + 8, residual == nullptr ? nullptr : residual + 8);
  const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(a.epilogue->finish.zero_point));
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_adds_epi16(_mm256_packs_epi32(low, high), zero), 0xD8);
  // packs works within lanes: the four quarters come out as low0 high0 low1 high1.
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

}  // namespace

void requantize_avx2(const RequantizeArgs& a) {
  const uint8_t* table = a.epilogue->finish.table;
  const int width = a.whole ? 16 * a.tiles : a.cols;
  for (int r = 0; r < a.rows; ++r) {
    if (a.out_offset[r] < 0) continue;
    uint8_t* out = a.out + a.out_offset[r];
    for (int t = 0; t < a.tiles; ++t) {
      const int count = width - 16 * t < 16 ? width - 16 * t : 16;
      if (count <= 0) break;
      const uint8_t* residual =
          a.residual == nullptr ? nullptr : a.residual + a.residual_offset[r] + 16 * t;
      const __m128i q = levels16(a, a.sums + (r * a.tiles + t) * 16, a.channel + 16 * t, residual);
      if (count == 16 && table == nullptr) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * t), q);
        continue;
      }
      alignas(16) uint8_t levels[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(levels), q);
      if (table != nullptr)
        for (uint8_t& level : levels)
          level = table[level];
      std::memcpy(out + 16 * t, levels, static_cast<size_t>(count));
    }
  }
}

}  // namespace adalayer::cpu

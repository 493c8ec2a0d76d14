// The epilogue of sixteen neighbouring channels, in registers: for whatever holds their sums.
#pragma once

#include <immintrin.h>

#include "cpu/kernel_table.hpp"

// For files with instruction-set flags: nothing in here may be one function for the whole program.
namespace adalayer::cpu {
namespace {

/// A requantization whose table is looked up for all rows together, behind the levels: in
/// registers, where byte by byte would cost more than the rest of it.
template <class Run>
void with_table_behind(const RequantizeArgs& a, const Run& run) {
  ConvEpilogue levels = *a.epilogue;
  levels.finish.table = nullptr;
  RequantizeArgs plain = a;
  plain.epilogue = &levels;
  run(plain);
  look_up_avx2(a);
}

struct FinishColumns {
  __m256 scale[2], bias[2], lo, hi, inv_scale, residual_scale;
  __m256i correction[2], residual_zero, zero;
  __m128i lo_bytes, hi_bytes;

  FinishColumns(const ConvEpilogue& e, int64_t channel)
      : lo(_mm256_set1_ps(e.finish.lo)),
        hi(_mm256_set1_ps(e.finish.hi)),
        inv_scale(_mm256_set1_ps(e.finish.inv_scale)),
        residual_scale(_mm256_set1_ps(e.residual_scale)),
        residual_zero(_mm256_set1_epi32(e.residual_zero)),
        zero(_mm256_set1_epi16(static_cast<int16_t>(e.finish.zero_point))),
        lo_bytes(level(e, e.finish.lo)),
        hi_bytes(level(e, e.finish.hi)) {
    for (int h = 0; h < 2; ++h) {
      scale[h] = _mm256_loadu_ps(e.scale + channel + 8 * h);
      bias[h] = _mm256_loadu_ps(e.bias + channel + 8 * h);
      correction[h] = e.correction == nullptr ? _mm256_setzero_si256()
                                              : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                                                    e.correction + channel + 8 * h));
    }
  }

  /// Levels of the sixteen channels, from sums that have the correction. kBounded: the clamp
  /// follows the conversion (ConvEpilogue::bounded). `residual`: its sixteen levels, read if
  /// kResidual.
  template <bool kResidual, bool kBounded>
  [[gnu::always_inline]] __m128i levels(__m256i sums0, __m256i sums1,
                                        const uint8_t* residual) const {
    const __m256i words =
        _mm256_adds_epi16(_mm256_packs_epi32(relative<kResidual, kBounded>(sums0, residual, 0),
                                             relative<kResidual, kBounded>(sums1, residual, 1)),
                          zero);
    // Packing works within lanes: the four quarters come out as low0 high0 low1 high1.
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
    const __m128i q =
        _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    if constexpr (kBounded) return _mm_min_epu8(_mm_max_epu8(q, lo_bytes), hi_bytes);
    return q;
  }

  /// Eight products' sums as levels() wants them.
  __m256i corrected(const int32_t* sums, int h) const {
    return _mm256_add_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + 8 * h)),
                            correction[h]);
  }

 private:
  static __m128i level(const ConvEpilogue& e, float relative) {
    return _mm_set1_epi8(static_cast<char>(static_cast<int>(relative) + e.finish.zero_point));
  }

  template <bool kResidual, bool kBounded>
  [[gnu::always_inline]] __m256i relative(__m256i sums, const uint8_t* residual, int h) const {
    __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale[h], bias[h]);
    if constexpr (kResidual) {
      const __m256i wide =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(residual + 8 * h)));
      const __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, residual_zero));
      y = _mm256_add_ps(y, _mm256_mul_ps(value, residual_scale));
    }
    y = _mm256_mul_ps(y, inv_scale);
    if constexpr (!kBounded) y = _mm256_min_ps(_mm256_max_ps(y, lo), hi);
    return _mm256_cvtps_epi32(y);
  }
};

}  // namespace
}  // namespace adalayer::cpu

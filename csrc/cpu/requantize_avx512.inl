// Sums to u8 with AVX-512; included with Lookup defined: how 64 levels go through the table.
//
// 64 values at a time: four vectors of 16 int32, that is one row of two column tiles twice or four
// rows of one tile. Packing with saturation interleaves 128-bit lanes; one permutation of dwords
// then leaves each vector's 16 bytes in a lane of its own.

namespace {

struct Constants {
  __m512 lo, hi;
  __m512i zero_point;          // int16
  __m512i level_lo, level_hi;  // u8
  __m512 residual_scale;
  explicit Constants(const ConvEpilogue& e)
      : lo(_mm512_set1_ps(e.finish.lo)),
        hi(_mm512_set1_ps(e.finish.hi)),
        zero_point(_mm512_set1_epi16(static_cast<int16_t>(e.finish.zero_point))),
        level_lo(_mm512_set1_epi8(
            static_cast<char>(static_cast<int>(e.finish.lo) + e.finish.zero_point))),
        level_hi(_mm512_set1_epi8(
            static_cast<char>(static_cast<int>(e.finish.hi) + e.finish.zero_point))),
        residual_scale(_mm512_set1_ps(e.residual_scale)) {}
};

template <int kTiles, bool kResidual, bool kBounded, bool kCorrection, bool kTable>
void requantize_rows(const RequantizeArgs& a, const Lookup& lookup) {
  const ConvEpilogue& e = *a.epilogue;
  const Constants k(e);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  __m512 scale[kTiles], bias[kTiles];
  __m512i correction[kTiles];
  for (int t = 0; t < kTiles; ++t) {
    scale[t] = _mm512_loadu_ps(e.scale + a.channel + 16 * t);
    bias[t] = _mm512_loadu_ps(e.bias + a.channel + 16 * t);
    if constexpr (kCorrection)
      correction[t] = _mm512_loadu_si512(e.correction + a.channel + 16 * t);
  }
  const int width = a.whole ? 16 * kTiles : a.cols;
  const __mmask32 keep = width == 32 ? ~__mmask32{0} : (__mmask32{1} << width) - 1;
  const bool full = width == 16 * kTiles;
  constexpr int kRows = 4 / kTiles;
  for (int r = 0; r < a.rows; r += kRows) {
    const int live = a.rows - r < kRows ? a.rows - r : kRows;
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int t = i % kTiles;
      const int row = r + (i / kTiles < live ? i / kTiles : 0);
      __m512i sum = _mm512_loadu_si512(a.sums + row * 16 * kTiles + 16 * t);
      if constexpr (kCorrection) sum = _mm512_add_epi32(sum, correction[t]);
      __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[t], bias[t]);
      if constexpr (kResidual) {
        const int32_t at = a.residual_offset[row] < 0 ? 0 : a.residual_offset[row];
        const __m128i q =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(a.residual + at + 16 * t));
        y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q)), k.residual_scale, y);
      }
      if constexpr (!kBounded) y = _mm512_min_ps(_mm512_max_ps(y, k.lo), k.hi);
      v[i] = _mm512_cvtps_epi32(y);
    }
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), k.zero_point);
    const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), k.zero_point);
    __m512i q = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
    q = _mm512_min_epu8(_mm512_max_epu8(q, k.level_lo), k.level_hi);
    if constexpr (kTable) q = lookup(q);
    if constexpr (kTiles == 2) {
      const __m256i half[2] = {_mm512_castsi512_si256(q), _mm512_extracti64x4_epi64(q, 1)};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        if (i >= live || a.out_offset[r + i] < 0) continue;
        uint8_t* out = a.out + a.out_offset[r + i];
        if (full)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half[i]);
        else
          _mm256_mask_storeu_epi8(out, keep, half[i]);
      }
    } else {
      const __m128i lane[4] = {_mm512_castsi512_si128(q), _mm512_extracti32x4_epi32(q, 1),
                               _mm512_extracti32x4_epi32(q, 2), _mm512_extracti32x4_epi32(q, 3)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (i >= live || a.out_offset[r + i] < 0) continue;
        uint8_t* out = a.out + a.out_offset[r + i];
        if (full)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(out), lane[i]);
        else
          _mm_mask_storeu_epi8(out, static_cast<__mmask16>(keep), lane[i]);
      }
    }
  }
}

template <int kTiles, bool kResidual, bool kBounded, bool kCorrection>
void with_table(const RequantizeArgs& a, const Lookup& lookup) {
  if (a.epilogue->finish.table != nullptr)
    requantize_rows<kTiles, kResidual, kBounded, kCorrection, true>(a, lookup);
  else
    requantize_rows<kTiles, kResidual, kBounded, kCorrection, false>(a, lookup);
}

template <int kTiles, bool kResidual>
void with_bounds(const RequantizeArgs& a, const Lookup& lookup) {
  const ConvEpilogue& e = *a.epilogue;
  if (e.bounded)
    e.correction != nullptr ? with_table<kTiles, kResidual, true, true>(a, lookup)
                            : with_table<kTiles, kResidual, true, false>(a, lookup);
  else
    e.correction != nullptr ? with_table<kTiles, kResidual, false, true>(a, lookup)
                            : with_table<kTiles, kResidual, false, false>(a, lookup);
}

void requantize_any(const RequantizeArgs& a) {
  const Lookup lookup(a.epilogue->finish.table);
  const bool residual = a.residual != nullptr;
  if (a.tiles == 2)
    residual ? with_bounds<2, true>(a, lookup) : with_bounds<2, false>(a, lookup);
  else
    residual ? with_bounds<1, true>(a, lookup) : with_bounds<1, false>(a, lookup);
}

}  // namespace

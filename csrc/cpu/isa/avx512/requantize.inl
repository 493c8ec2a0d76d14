// Sums to u8 with AVX-512; included with Lookup defined: how 64 levels go through the table.
//
// 64 values at a time: four vectors of 16 int32, that is one row of two column tiles twice or four
// rows of one tile. Packing with saturation interleaves 128-bit lanes; one permutation of dwords
// then leaves each vector's 16 bytes in a lane of its own.

namespace {

struct Constants {
  __m512 inv_scale, lo, hi;
  __m512i zero_point;          // int16
  __m512i level_lo, level_hi;  // u8
  __m512 residual_scale;
  __m512i residual_zero;
  explicit Constants(const ConvEpilogue& e)
      : inv_scale(_mm512_set1_ps(e.finish.inv_scale)),
        lo(_mm512_set1_ps(e.finish.lo)),
        hi(_mm512_set1_ps(e.finish.hi)),
        zero_point(_mm512_set1_epi16(static_cast<int16_t>(e.finish.zero_point))),
        level_lo(_mm512_set1_epi8(
            static_cast<char>(static_cast<int>(e.finish.lo) + e.finish.zero_point))),
        level_hi(_mm512_set1_epi8(
            static_cast<char>(static_cast<int>(e.finish.hi) + e.finish.zero_point))),
        residual_scale(_mm512_set1_ps(e.residual_scale)),
        residual_zero(_mm512_set1_epi32(e.residual_zero)) {}
};

/// Which steps an epilogue needs; what is left out would change nothing.
enum Flags : int {
  kResidual = 1,
  kClampFirst = 2,  // the sums are not bounded: clamp before conversion
  kCorrection = 4,
  kLevels = 8,  // a zero point, or limits inside 0..255
  kTable = 16,
  kEvery = 32,  // all rows are kept, and whole tiles of them
};

/// One channel block's constants, and the rows of one call.
template <int kTiles, int kFlags>
struct Rows {
  const RequantizeArgs& a;
  const Lookup& lookup;
  const Constants k;
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  __m512 scale[kTiles], bias[kTiles];
  __m512i correction[kTiles];
  __mmask32 keep;
  bool full;

  Rows(const RequantizeArgs& args, const Lookup& table) : a(args), lookup(table), k(*a.epilogue) {
    const ConvEpilogue& e = *a.epilogue;
    for (int t = 0; t < kTiles; ++t) {
      scale[t] = _mm512_loadu_ps(e.scale + a.channel + 16 * t);
      bias[t] = _mm512_loadu_ps(e.bias + a.channel + 16 * t);
      if constexpr ((kFlags & kCorrection) != 0)
        correction[t] = e.correction == nullptr
                            ? _mm512_setzero_si512()
                            : _mm512_loadu_si512(e.correction + a.channel + 16 * t);
    }
    const int width = a.whole ? 16 * kTiles : a.cols;
    keep = width == 32 ? ~__mmask32{0} : (__mmask32{1} << width) - 1;
    full = width == 16 * kTiles;
  }

  /// 16 channels of a row to int32 levels without their zero point.
  inline __attribute__((always_inline)) __m512i relative(__m512i sum, int row, int t) const {
    if constexpr ((kFlags & kCorrection) != 0) sum = _mm512_add_epi32(sum, correction[t]);
    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[t], bias[t]);
    if constexpr ((kFlags & kResidual) != 0) {
      // A dropped row reads the image's first pixel.
      const bool dropped = (kFlags & kEvery) == 0 && a.residual_offset[row] < 0;
      const int64_t at = dropped ? 0 : a.residual_offset[row];
      const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a.residual + at + 16 * t));
      const __m512i level = _mm512_sub_epi32(_mm512_cvtepu8_epi32(q), k.residual_zero);
      y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(level), k.residual_scale));
    }
    y = _mm512_mul_ps(y, k.inv_scale);
    if constexpr ((kFlags & kClampFirst) != 0) y = _mm512_min_ps(_mm512_max_ps(y, k.lo), k.hi);
    return _mm512_cvtps_epi32(y);
  }

  __m512i levels(const __m512i (&v)[4]) const {
    __m512i low = _mm512_packs_epi32(v[0], v[1]), high = _mm512_packs_epi32(v[2], v[3]);
    if constexpr ((kFlags & kLevels) != 0) {
      low = _mm512_adds_epi16(low, k.zero_point);
      high = _mm512_adds_epi16(high, k.zero_point);
    }
    __m512i q = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
    if constexpr ((kFlags & kLevels) != 0)
      q = _mm512_min_epu8(_mm512_max_epu8(q, k.level_lo), k.level_hi);
    if constexpr ((kFlags & kTable) != 0) q = lookup(q);
    return q;
  }

  void store(int row, __m256i q) const {
    if ((kFlags & kEvery) == 0 && a.out_offset[row] < 0) return;
    uint8_t* out = a.out + a.out_offset[row];
    if ((kFlags & kEvery) != 0 || full)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), q);
    else
      _mm256_mask_storeu_epi8(out, keep, q);
  }
  void store(int row, __m128i q) const {
    if ((kFlags & kEvery) == 0 && a.out_offset[row] < 0) return;
    uint8_t* out = a.out + a.out_offset[row];
    if ((kFlags & kEvery) != 0 || full)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), q);
    else
      _mm_mask_storeu_epi8(out, static_cast<__mmask16>(keep), q);
  }

  /// Rows r .. r + 4 / kTiles - 1, of which `live` exist.
  inline __attribute__((always_inline)) void group(int r, int live) const {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      v[i] = relative(loaded(r + (i / kTiles < live ? i / kTiles : 0), i % kTiles),
                      r + (i / kTiles < live ? i / kTiles : 0), i % kTiles);
    put(v, r, live);
  }

  __m512i loaded(int row, int t) const {
    return _mm512_loadu_si512(a.sums + row * 16 * kTiles + 16 * t);
  }

  /// Rows r .. r + 4 / kTiles - 1, of which `live` exist, to the image.
  inline __attribute__((always_inline)) void put(const __m512i (&v)[4], int r, int live) const {
    const __m512i q = levels(v);
    if constexpr (kTiles == 2) {
      store(r, _mm512_castsi512_si256(q));
      if (live > 1) store(r + 1, _mm512_extracti64x4_epi64(q, 1));
    } else {
      store(r, _mm512_castsi512_si128(q));
      if (live > 1) store(r + 1, _mm512_extracti32x4_epi32(q, 1));
      if (live > 2) store(r + 2, _mm512_extracti32x4_epi32(q, 2));
      if (live > 3) store(r + 3, _mm512_extracti32x4_epi32(q, 3));
    }
  }

  void all() const {
    constexpr int kRows = 4 / kTiles;
    int r = 0;
    for (; r + kRows <= a.rows; r += kRows)
      group(r, kRows);
    if (r < a.rows) group(r, a.rows - r);
  }
};

}  // namespace

// Sums to tensors with AVX-512.
#include <immintrin.h>

#include "cpu/isa/avx512/avx512.hpp"

namespace adalayer::cpu::avx512 {
namespace {

#include "cpu/isa/avx512/grid512.inl"

/// OutputSpec in registers: float sums to clamped output values.
struct Epilogue {
  __m512 lo, hi, step;
  Grid grid;
  bool on_grid;
  explicit Epilogue(const OutputSpec& out)
      : lo(_mm512_set1_ps(out.lo)),
        hi(_mm512_set1_ps(out.hi)),
        step(_mm512_set1_ps(out.grid_scale)),
        grid(out.grid),
        on_grid(out.on_grid) {}
  __m512 clamp(__m512 y) const { return _mm512_min_ps(_mm512_max_ps(y, lo), hi); }
  __m512 finish(__m512 y) const {
    y = clamp(y);
    if (!on_grid) return y;
    return _mm512_mul_ps(_mm512_cvtepi32_ps(grid.relative(y)), step);
  }
};

/// Interleaved output: 16 channels of one position at a time.
template <bool kFloat>
void store_interleaved(const StoreArgs& s) {
  const OutputSpec& out = *s.out;
  const Epilogue e(out);
  const __m512i zero = _mm512_set1_epi32(out.zero_point);
  for (int c = 0; c < s.cols; c += 16) {
    const __mmask16 m = tail_mask(s.cols - c);
    const __m512i correction = _mm512_maskz_loadu_epi32(m, s.correction + c);
    const __m512 scale = _mm512_maskz_loadu_ps(m, out.scale + s.channel + c);
    const __m512 bias = _mm512_maskz_loadu_ps(m, out.bias + s.channel + c);
    for (int r = 0; r < s.rows; ++r) {
      if (s.position[r] < 0) continue;
      const __m512i acc =
          _mm512_add_epi32(_mm512_loadu_si512(s.sums + r * s.sums_stride + c), correction);
      __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scale, bias);
      const int64_t at = s.first + s.position[r] * s.position_stride + c;
      if constexpr (kFloat) {
        if (out.residual != nullptr)
          y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(m, out.residual + at));
        _mm512_mask_storeu_ps(static_cast<float*>(out.data) + at, m, e.finish(y));
      } else {
        const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(e.clamp(y)), zero);
        _mm512_mask_cvtepi32_storeu_epi8(static_cast<uint8_t*>(out.data) + at, m, q);
      }
    }
  }
}

/// Planar output: gather one channel of 16 positions; the valid ones are neighbours in the output,
/// because only padding lies between them.
template <bool kFloat>
void store_planar(const StoreArgs& s) {
  const OutputSpec& out = *s.out;
  const Epilogue e(out);
  const __m512i zero = _mm512_set1_epi32(out.zero_point);
  const __m512i lane =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(static_cast<int>(s.sums_stride)));
  for (int r = 0; r < s.rows; r += 16) {
    const __m512i position =
        _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), tail_mask(s.rows - r), s.position + r);
    const __mmask16 valid = _mm512_cmpge_epi32_mask(position, _mm512_setzero_si512());
    if (valid == 0) continue;
    const int64_t first = s.first + s.position[r + __builtin_ctz(valid)];
    for (int c = 0; c < s.cols; ++c) {
      const __m512i acc =
          _mm512_add_epi32(_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), valid, lane,
                                                       s.sums + r * s.sums_stride + c, 4),
                           _mm512_set1_epi32(s.correction[c]));
      __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(out.scale[s.channel + c]),
                                 _mm512_set1_ps(out.bias[s.channel + c]));
      const int64_t at = first + c * s.channel_stride;
      if constexpr (kFloat) {
        if (out.residual != nullptr)
          y = _mm512_add_ps(y, _mm512_maskz_expandloadu_ps(valid, out.residual + at));
        _mm512_mask_compressstoreu_ps(static_cast<float*>(out.data) + at, valid, e.finish(y));
      } else {
        const __m512i q = _mm512_maskz_compress_epi32(
            valid, _mm512_add_epi32(_mm512_cvtps_epi32(e.clamp(y)), zero));
        _mm512_mask_cvtepi32_storeu_epi8(static_cast<uint8_t*>(out.data) + at,
                                         tail_mask(__builtin_popcount(valid)), q);
      }
    }
  }
}

}  // namespace

void store(const StoreArgs& s) {
  const bool floats = s.out->dtype == DType::F32;
  if (s.channel_stride == 1)
    floats ? store_interleaved<true>(s) : store_interleaved<false>(s);
  else
    floats ? store_planar<true>(s) : store_planar<false>(s);
}

}  // namespace adalayer::cpu::avx512

// AVX-512 with VNNI: vpdpbusd sums four u8 x s8 products into int32 exactly, 64 of them at once.
//
// Apart from `gemm`, these kernels also serve the AMX row: every AMX machine has AVX-512-VNNI.
#include <immintrin.h>

#include <cstring>

#include "cpu/isa/avx512/avx512.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu::avx512 {
namespace {

#include "cpu/isa/avx512/bytes512.inl"
#include "cpu/isa/shared/planar.inl"

__mmask16 tail_mask(int64_t left) {
  return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
}

/// A grid in registers. The order of max and min makes NaN the lowest level, as in spec.hpp.
struct Grid {
  __m512 inv, lo, hi;
  __m512i zero;
  explicit Grid(const ActivationGrid& g)
      : inv(_mm512_set1_ps(g.inv_scale)),
        lo(_mm512_set1_ps(static_cast<float>(-g.zero_point))),
        hi(_mm512_set1_ps(static_cast<float>(g.qmax - g.zero_point))),
        zero(_mm512_set1_epi32(g.zero_point)) {}
  __m512i relative(__m512 x) const {
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(x, inv), lo), hi));
  }
  __m512i levels(__m512 x) const { return _mm512_add_epi32(relative(x), zero); }
};

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

void unpack_tiles(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  unpack_planar<Bytes512>(packed, bits, count, out);
}

void gemv(const GemvArgs& g) { gemv_planar<Bytes512>(g); }

namespace {

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

namespace {

void nothing() {}

}  // namespace
}  // namespace adalayer::cpu::avx512

namespace adalayer::cpu {

const KernelRow kAvx512VnniRow{
    .name = "avx512vnni",
    .isa = Isa::Avx512Vnni,
    .quantize_row = avx512::quantize_row,
    .quantize_planar = avx512::quantize_planar,
    .fake_quantize = avx512::fake_quantize,
    .unpack_tiles = avx512::unpack_tiles,
    .begin = avx512::nothing,
    .end = avx512::nothing,
    .positions = Positions::Listed,
    .gemm = avx512::gemm,
    .gemm_requantize = avx512::gemm_requantize,
    .gemm_rows = 56,  // several passes of the most
    .gemv = avx512::gemv,
    .arrangement = nullptr,
    .store = avx512::store,
    .requantize = avx512::requantize,
    .block = nullptr,
    .stem = {avx512::quantize_quads, avx512::interleave_pairs, avx512::interleave_fours},
    .grouped = &avx512::kGrouped,
    .winograd = &avx512::kWinograd,
    .image = &kAvx512Image};

}  // namespace adalayer::cpu

// AVX2 with FMA. There is no exact u8 x s8 dot product here: vpmaddubsw saturates at int16, which
// 2 * 255 * 64 = 32,640 never reaches (weights of up to 7 bits) and 2 * 255 * 128 = 65,280 does.
// Eight-bit weights therefore go through vpmaddwd on bytes widened to int16.
#include <immintrin.h>

#include <cstring>

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace avx2 {
namespace {

struct Bytes256 {
  using T = __m256i;
  static constexpr int kBytes = 32;
  static T load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(int8_t* p, T v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  template <int n>
  static T shr(T v) {
    return _mm256_srli_epi16(v, n);
  }
  template <int n>
  static T shl(T v) {
    return _mm256_slli_epi16(v, n);
  }
  static T bit_and(T a, T b) { return _mm256_and_si256(a, b); }
  static T bit_or(T a, T b) { return _mm256_or_si256(a, b); }
  static T bit_xor(T a, T b) { return _mm256_xor_si256(a, b); }
  static T sub(T a, T b) { return _mm256_sub_epi8(a, b); }
  static T set1(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
};

#include "cpu/unpack.inl"

struct Grid {
  __m256 inv, lo, hi;
  __m256i zero;
  explicit Grid(const ActivationGrid& g)
      : inv(_mm256_set1_ps(g.inv_scale)),
        lo(_mm256_set1_ps(static_cast<float>(-g.zero_point))),
        hi(_mm256_set1_ps(static_cast<float>(g.qmax - g.zero_point))),
        zero(_mm256_set1_epi32(g.zero_point)) {}
  __m256i relative(__m256 x) const {
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, inv), lo), hi));
  }
  __m256i levels(__m256 x) const { return _mm256_add_epi32(relative(x), zero); }
};

/// Eight int32 in 0..255 to eight bytes.
uint64_t narrow(__m256i v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
}

void quantize_row(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q) {
  const Grid g(grid);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint64_t bytes = narrow(g.levels(_mm256_loadu_ps(x + i)));
    std::memcpy(q + i, &bytes, 8);
  }
  for (; i < n; ++i)
    q[i] = quantize_value(x[i], grid);
}

void quantize_planar(const float* x, int64_t channel_stride, int64_t channels, int64_t w,
                     const ActivationGrid& grid, uint8_t* q) {
  const Grid g(grid);
  for (int64_t c = 0; c < channels; ++c) {
    const float* row = x + c * channel_stride;
    uint8_t* dst = q + c;
    int64_t i = 0;
    for (; i + 8 <= w; i += 8) {
      uint64_t bytes = narrow(g.levels(_mm256_loadu_ps(row + i)));
      for (int64_t k = 0; k < 8; ++k, bytes >>= 8)
        dst[(i + k) * channels] = static_cast<uint8_t>(bytes);
    }
    for (; i < w; ++i)
      dst[i * channels] = quantize_value(row[i], grid);
  }
}

void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y) {
  const Grid g(grid);
  const __m256 step = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i,
                     _mm256_mul_ps(_mm256_cvtepi32_ps(g.relative(_mm256_loadu_ps(x + i))), step));
  for (; i < n; ++i)
    y[i] = dequantize_value(quantize_value(x[i], grid), scale, grid.zero_point);
}

void unpack_tiles(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  unpack_tiles_any<Bytes256>(packed, bits, count, out);
}

void store(const StoreArgs& s) {
  const OutputSpec& out = *s.out;
  const __m256 lo = _mm256_set1_ps(out.lo), hi = _mm256_set1_ps(out.hi);
  const __m256 step = _mm256_set1_ps(out.grid_scale);
  const __m256i zero = _mm256_set1_epi32(out.zero_point);
  const Grid grid(out.grid);
  for (int r = 0; r < s.rows; ++r) {
    if (s.position[r] < 0) continue;
    const int32_t* sums = s.sums + r * s.sums_stride;
    const int64_t row = s.first + s.position[r] * s.position_stride;
    int c = 0;
    if (s.channel_stride == 1) {
      for (; c + 8 <= s.cols; c += 8) {
        const auto load = [&](const int32_t* p) {
          return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + c));
        };
        const __m256 acc = _mm256_cvtepi32_ps(_mm256_add_epi32(load(sums), load(s.correction)));
        __m256 y = _mm256_fmadd_ps(acc, _mm256_loadu_ps(out.scale + s.channel + c),
                                   _mm256_loadu_ps(out.bias + s.channel + c));
        if (out.residual != nullptr) y = _mm256_add_ps(y, _mm256_loadu_ps(out.residual + row + c));
        y = _mm256_min_ps(_mm256_max_ps(y, lo), hi);
        if (out.dtype == DType::F32) {
          if (out.on_grid) y = _mm256_mul_ps(_mm256_cvtepi32_ps(grid.relative(y)), step);
          _mm256_storeu_ps(static_cast<float*>(out.data) + row + c, y);
        } else {
          const uint64_t bytes = narrow(_mm256_add_epi32(_mm256_cvtps_epi32(y), zero));
          std::memcpy(static_cast<uint8_t*>(out.data) + row + c, &bytes, 8);
        }
      }
    }
    for (; c < s.cols; ++c) {
      const int64_t at = row + c * s.channel_stride, channel = s.channel + c;
      const int32_t acc = sums[c] + s.correction[c];
      if (out.dtype == DType::F32) {
        static_cast<float*>(out.data)[at] = output_value(acc, channel, at, out);
      } else {
        static_cast<uint8_t*>(out.data)[at] = requantize_u8(
            acc, out.scale[channel], out.bias[channel], out.lo, out.hi, out.zero_point);
      }
    }
  }
}

void depthwise(const DepthwiseArgs& d) {
  for (int64_t c = 0; c < d.padded_channels; c += 8) {
    const int16_t* weights = d.weights + c * 2;
    for (int64_t i = 0; i < d.count; ++i) {
      const uint8_t* a = d.activations + i * d.position_bytes + c;
      __m256i acc = _mm256_setzero_si256();
      for (int64_t p = 0; p < d.pairs; ++p) {
        const __m256i even = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a + d.tap_offsets[2 * p])));
        const __m256i odd = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a + d.tap_offsets[2 * p + 1])));
        const __m256i pair = _mm256_or_si256(even, _mm256_slli_epi32(odd, 16));
        const __m256i w = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(weights + p * d.padded_channels * 2));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pair, w));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(d.sums + i * d.padded_channels + c), acc);
    }
  }
}

__m256i load_weights(const int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

/// Two rows x one column tile (two vectors of eight int32 sums). kNarrow: weights of at most 7
/// bits, where the int16 sums of vpmaddubsw are exact.
template <bool kNarrow>
void gemm_rows2(const GemmArgs& g, const int8_t* tile, int row, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i low_bytes = _mm256_set1_epi16(0x00FF);
  const uint8_t* base = g.activations + row * g.row_stride;
  __m256i acc[2][2] = {{_mm256_setzero_si256(), _mm256_setzero_si256()},
                       {_mm256_setzero_si256(), _mm256_setzero_si256()}};
  for (int64_t s = 0; s < g.steps; ++s) {
    const uint8_t* a = base + g.step_offsets[s];
    const int8_t* b = tile + s * formats::kTileBytes;
    for (int quad = 0; quad < g.live_quads[s]; ++quad) {
      const __m256i w[2] = {load_weights(b + quad * 64), load_weights(b + quad * 64 + 32)};
      for (int r = 0; r < 2; ++r) {
        int32_t four;
        std::memcpy(&four, a + r * g.row_stride + quad * 4, 4);
        const __m256i v = _mm256_set1_epi32(four);
        for (int h = 0; h < 2; ++h) {
          __m256i sum;
          if constexpr (kNarrow) {
            sum = _mm256_madd_epi16(_mm256_maddubs_epi16(v, w[h]), ones);
          } else {
            const __m256i w_even = _mm256_srai_epi16(_mm256_slli_epi16(w[h], 8), 8);
            const __m256i w_odd = _mm256_srai_epi16(w[h], 8);
            sum = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(v, low_bytes), w_even),
                                   _mm256_madd_epi16(_mm256_srli_epi16(v, 8), w_odd));
          }
          acc[r][h] = _mm256_add_epi32(acc[r][h], sum);
        }
      }
    }
  }
  for (int r = 0; r < 2; ++r)
    for (int h = 0; h < 2; ++h)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + (row + r) * kBlockCols + h * 8),
                          acc[r][h]);
}

template <bool kNarrow>
void gemm_all(const GemmArgs& g) {
  for (int row = 0; row < g.rows; row += 2) {
    gemm_rows2<kNarrow>(g, g.tile0, row, g.sums);
    if (g.tile1 != nullptr) gemm_rows2<kNarrow>(g, g.tile1, row, g.sums + 16);
  }
}

void gemm(const GemmArgs& g) {
  if (g.weight_bits < 8)
    gemm_all<true>(g);
  else
    gemm_all<false>(g);
}

void nothing() {}

}  // namespace
}  // namespace avx2

const KernelRow kAvx2Row{.name = "avx2",
                         .isa = Isa::Avx2,
                         .quantize_row = avx2::quantize_row,
                         .quantize_planar = avx2::quantize_planar,
                         .fake_quantize = avx2::fake_quantize,
                         .unpack_tiles = avx2::unpack_tiles,
                         .begin = avx2::nothing,
                         .end = avx2::nothing,
                         .gemm = avx2::gemm,
                         .store = avx2::store,
                         .depthwise = avx2::depthwise,
                         .block = nullptr,
                         .requantize = requantize_avx2,
                         .grouped = &avx2::kGrouped};

}  // namespace adalayer::cpu

// Kernels of the 256-bit rows (AVX2, AVX-VNNI), apart from the products, in which they differ.
// Included inside the unnamed namespace of one ISA file only, like planar.inl.

struct Bytes256 {
  using T = __m256i;
  static constexpr int kBytes = 32;
  static T load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store(int8_t* p, T v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static T load_weights(const int8_t* p) { return load(reinterpret_cast<const uint8_t*>(p)); }
  static T bit_or(T a, T b) { return _mm256_or_si256(a, b); }
  template <int kBits, int kWidth, int kT, int kAt>
  static T field(T chunk) {
    // Shifts work on 16-bit lanes, so bits of the neighbouring byte come in; the mask drops them.
    constexpr int kShift = kAt - kT * kWidth;
    if constexpr (kShift > 0) chunk = _mm256_slli_epi16(chunk, kShift);
    if constexpr (kShift < 0) chunk = _mm256_srli_epi16(chunk, -kShift);
    return _mm256_and_si256(chunk, set1(((1 << kWidth) - 1) << kAt));
  }
  template <int kBits>
  static T finish(T u) {
    if constexpr (kBits <= 4) {
      // A table of 16 entries: one shuffle.
      constexpr auto entry = [](int i) { return static_cast<char>(signed_value<kBits>(i)); };
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_setr_epi8(
                                     entry(0), entry(1), entry(2), entry(3), entry(4), entry(5),
                                     entry(6), entry(7), entry(8), entry(9), entry(10), entry(11),
                                     entry(12), entry(13), entry(14), entry(15))),
                                 u);
    } else {
      const T sign = set1(1 << (kBits - 1));
      return _mm256_sub_epi8(_mm256_xor_si256(u, sign), sign);
    }
  }
  template <int kBits>
  static constexpr int signed_value(int field) {
    constexpr int kSign = 1 << (kBits - 1);
    return ((field & (2 * kSign - 1)) ^ kSign) - kSign;
  }
  static T set1(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static T zero() { return _mm256_setzero_si256(); }
  static T broadcast(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static T add(T a, T b) { return _mm256_add_epi32(a, b); }
  static void store_sums(int32_t* p, T v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};

#include "cpu/isa/shared/planar.inl"

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

/// Three planes, the channels of an image, to three bytes per pixel; the whole vectors of a row.
/// Returns how many pixels are done.
int64_t quantize_rgb(const float* x, int64_t channel_stride, int64_t w, const Grid& g, uint8_t* q) {
  const __m128i three_of_four =
      _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  int64_t i = 0;
  // The second store writes four bytes too many: those of pixels that come later.
  for (; i + 10 <= w; i += 8, q += 24) {
    const auto plane = [&](int c) { return g.levels(_mm256_loadu_ps(x + c * channel_stride + i)); };
    const __m256i pixels = _mm256_or_si256(
        _mm256_slli_epi32(plane(2), 16), _mm256_or_si256(_mm256_slli_epi32(plane(1), 8), plane(0)));
    const auto store = [&](int at, __m128i four) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + at), _mm_shuffle_epi8(four, three_of_four));
    };
    store(0, _mm256_castsi256_si128(pixels));
    store(12, _mm256_extracti128_si256(pixels, 1));
  }
  return i;
}

void quantize_planar(const float* x, int64_t channel_stride, int64_t channels, int64_t w,
                     const ActivationGrid& grid, uint8_t* q) {
  const Grid g(grid);
  const int64_t done = channels == 3 ? quantize_rgb(x, channel_stride, w, g, q) : 0;
  for (int64_t c = 0; c < channels; ++c) {
    const float* row = x + c * channel_stride;
    uint8_t* dst = q + c;
    int64_t i = done;
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
  unpack_planar<Bytes256>(packed, bits, count, out);
}

#include "cpu/isa/avx2/store256.inl"

// Sums of a single layer to its output tensor, for the 256-bit rows. Included by bytes256.inl
// alone.

/// OutputSpec in registers.
class Output256 {
 public:
  explicit Output256(const OutputSpec& out)
      : out_(out),
        lo_(_mm256_set1_ps(out.lo)),
        hi_(_mm256_set1_ps(out.hi)),
        step_(_mm256_set1_ps(out.grid_scale)),
        zero_(_mm256_set1_epi32(out.zero_point)),
        grid_(out.grid) {}

  /// Eight neighbours in memory, from element `at` on.
  void put(int64_t at, __m256i acc, __m256 scale, __m256 bias) const {
    __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), scale, bias);
    if (out_.residual != nullptr) y = _mm256_add_ps(y, _mm256_loadu_ps(out_.residual + at));
    y = _mm256_min_ps(_mm256_max_ps(y, lo_), hi_);
    if (out_.dtype == DType::F32) {
      if (out_.on_grid) y = _mm256_mul_ps(_mm256_cvtepi32_ps(grid_.relative(y)), step_);
      _mm256_storeu_ps(static_cast<float*>(out_.data) + at, y);
    } else {
      const uint64_t bytes = narrow(_mm256_add_epi32(_mm256_cvtps_epi32(y), zero_));
      std::memcpy(static_cast<uint8_t*>(out_.data) + at, &bytes, 8);
    }
  }

  void put_one(int64_t at, int32_t acc, int64_t channel) const {
    if (out_.dtype == DType::F32)
      static_cast<float*>(out_.data)[at] = output_value(acc, channel, at, out_);
    else
      static_cast<uint8_t*>(out_.data)[at] = requantize_u8(
          acc, out_.scale[channel], out_.bias[channel], out_.lo, out_.hi, out_.zero_point);
  }

 private:
  const OutputSpec& out_;
  __m256 lo_, hi_, step_;
  __m256i zero_;
  Grid grid_;
};

__m256i load_sums(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

/// Rows of eight dwords to columns.
void transpose(__m256i (&v)[8]) {
  __m256i pairs[8], quads[8];
  for (int k = 0; k < 8; k += 2) {
    pairs[k] = _mm256_unpacklo_epi32(v[k], v[k + 1]);
    pairs[k + 1] = _mm256_unpackhi_epi32(v[k], v[k + 1]);
  }
  // quads[4 * h + j]: columns j and j + 4 of rows 4 * h to 4 * h + 3.
  for (int h = 0; h < 8; h += 4)
    for (int j = 0; j < 2; ++j) {
      quads[h + 2 * j] = _mm256_unpacklo_epi64(pairs[h + j], pairs[h + 2 + j]);
      quads[h + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[h + j], pairs[h + 2 + j]);
    }
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x20);
    v[4 + j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x31);
  }
}

/// All channels of one position.
void store_position(const StoreArgs& s, const Output256& output, int r) {
  if (s.position[r] < 0) return;
  const int32_t* sums = s.sums + r * s.sums_stride;
  const int64_t row = s.first + s.position[r] * s.position_stride;
  int c = 0;
  if (s.channel_stride == 1)
    for (; c + 8 <= s.cols; c += 8)
      output.put(row + c, _mm256_add_epi32(load_sums(sums + c), load_sums(s.correction + c)),
                 _mm256_loadu_ps(s.out->scale + s.channel + c),
                 _mm256_loadu_ps(s.out->bias + s.channel + c));
  for (; c < s.cols; ++c)
    output.put_one(row + c * s.channel_stride, sums[c] + s.correction[c], s.channel + c);
}

/// All channels of eight positions that are neighbours in the planes of the output.
void store_planar(const StoreArgs& s, const Output256& output, int r) {
  const int32_t* sums = s.sums + r * s.sums_stride;
  const int64_t row = s.first + s.position[r];
  int c = 0;
  for (; c + 8 <= s.cols; c += 8) {
    __m256i columns[8];
    for (int k = 0; k < 8; ++k)
      columns[k] = load_sums(sums + k * s.sums_stride + c);
    transpose(columns);
    for (int k = 0; k < 8; ++k) {
      const int64_t channel = s.channel + c + k;
      output.put(row + (c + k) * s.channel_stride,
                 _mm256_add_epi32(columns[k], _mm256_set1_epi32(s.correction[c + k])),
                 _mm256_set1_ps(s.out->scale[channel]), _mm256_set1_ps(s.out->bias[channel]));
    }
  }
  for (; c < s.cols; ++c)
    for (int k = 0; k < 8; ++k)
      output.put_one(row + k + c * s.channel_stride, sums[k * s.sums_stride + c] + s.correction[c],
                     s.channel + c);
}

void store(const StoreArgs& s) {
  const Output256 output(*s.out);
  const bool planes = s.channel_stride != 1 && s.position_stride == 1;
  for (int r = 0; r < s.rows;) {
    // Positions ascend by 1 where they are not negative: these eight have none between them.
    if (planes && r + 8 <= s.rows && s.position[r] >= 0 && s.position[r + 7] == s.position[r] + 7) {
      store_planar(s, output, r);
      r += 8;
    } else {
      store_position(s, output, r++);
    }
  }
}

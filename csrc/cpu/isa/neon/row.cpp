// The row of every 64-bit ARM processor (Cortex-A53 and A72, say), and what the other ARM rows have
// in common with it: floats to levels, and sums to tensors.
#include <arm_neon.h>

#include <cstring>

#include "cpu/isa/neon/neon.hpp"

namespace adalayer::cpu {
namespace neon {
namespace {

struct Grid {
  float32x4_t inv, lo, hi;
  int32x4_t zero;
  explicit Grid(const ActivationGrid& g)
      : inv(vdupq_n_f32(g.inv_scale)),
        lo(vdupq_n_f32(static_cast<float>(-g.zero_point))),
        hi(vdupq_n_f32(static_cast<float>(g.qmax - g.zero_point))),
        zero(vdupq_n_s32(g.zero_point)) {}
  /// A product is no signalling NaN, and a quiet one yields the bound: NaN becomes the lowest
  /// level.
  int32x4_t relative(float32x4_t x) const {
    return vcvtnq_s32_f32(vminnmq_f32(vmaxnmq_f32(vmulq_f32(x, inv), lo), hi));
  }
  int32x4_t levels(float32x4_t x) const { return vaddq_s32(relative(x), zero); }
  uint8x8_t eight(const float* x) const {
    const int16x8_t words =
        vmovn_high_s32(vmovn_s32(levels(vld1q_f32(x))), levels(vld1q_f32(x + 4)));
    return vmovn_u16(vreinterpretq_u16_s16(words));
  }
};

/// Three planes, the channels of an image, to three bytes per pixel; the whole vectors of a row.
/// Returns how many pixels are done.
int64_t quantize_rgb(const float* x, int64_t channel_stride, int64_t w, const Grid& g, uint8_t* q) {
  int64_t i = 0;
  for (; i + 8 <= w; i += 8, q += 24)
    vst3_u8(q,
            {g.eight(x + i), g.eight(x + channel_stride + i), g.eight(x + 2 * channel_stride + i)});
  return i;
}

}  // namespace

void quantize_row(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q) {
  const Grid g(grid);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    vst1_u8(q + i, g.eight(x + i));
  for (; i < n; ++i)
    q[i] = quantize_value(x[i], grid);
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
      uint64_t bytes = vget_lane_u64(vreinterpret_u64_u8(g.eight(row + i)), 0);
      for (int64_t k = 0; k < 8; ++k, bytes >>= 8)
        dst[(i + k) * channels] = static_cast<uint8_t>(bytes);
    }
    for (; i < w; ++i)
      dst[i * channels] = quantize_value(row[i], grid);
  }
}

void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y) {
  const Grid g(grid);
  const float32x4_t step = vdupq_n_f32(scale);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    vst1q_f32(y + i, vmulq_f32(vcvtq_f32_s32(g.relative(vld1q_f32(x + i))), step));
  for (; i < n; ++i)
    y[i] = dequantize_value(quantize_value(x[i], grid), scale, grid.zero_point);
}

namespace {

/// OutputSpec in registers.
class Output {
 public:
  explicit Output(const OutputSpec& out)
      : out_(out),
        lo_(vdupq_n_f32(out.lo)),
        hi_(vdupq_n_f32(out.hi)),
        step_(vdupq_n_f32(out.grid_scale)),
        zero_(vdupq_n_s32(out.zero_point)),
        grid_(out.grid) {}

  /// Four neighbours in memory, from element `at` on.
  void put(int64_t at, int32x4_t acc, float32x4_t scale, float32x4_t bias) const {
    float32x4_t y = vfmaq_f32(bias, vcvtq_f32_s32(acc), scale);
    if (out_.residual != nullptr) y = vaddq_f32(y, vld1q_f32(out_.residual + at));
    // max_x86 and min_x86: the clamp's result may be the output, zeros and all.
    y = vbslq_f32(vcgtq_f32(y, lo_), y, lo_);
    y = vbslq_f32(vcltq_f32(y, hi_), y, hi_);
    if (out_.dtype == DType::F32) {
      if (out_.on_grid) y = vmulq_f32(vcvtq_f32_s32(grid_.relative(y)), step_);
      vst1q_f32(static_cast<float*>(out_.data) + at, y);
    } else {
      const uint16x4_t words =
          vmovn_u32(vreinterpretq_u32_s32(vaddq_s32(vcvtnq_s32_f32(y), zero_)));
      const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
      const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
      std::memcpy(static_cast<uint8_t*>(out_.data) + at, &four, 4);
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
  float32x4_t lo_, hi_, step_;
  int32x4_t zero_;
  Grid grid_;
};

/// All channels of one position.
void store_position(const StoreArgs& s, const Output& output, int r) {
  if (s.position[r] < 0) return;
  const int32_t* sums = s.sums + r * s.sums_stride;
  const int64_t row = s.first + s.position[r] * s.position_stride;
  int c = 0;
  if (s.channel_stride == 1)
    for (; c + 4 <= s.cols; c += 4)
      output.put(row + c, vaddq_s32(vld1q_s32(sums + c), vld1q_s32(s.correction + c)),
                 vld1q_f32(s.out->scale + s.channel + c), vld1q_f32(s.out->bias + s.channel + c));
  for (; c < s.cols; ++c)
    output.put_one(row + c * s.channel_stride, sums[c] + s.correction[c], s.channel + c);
}

/// Rows of four dwords to columns.
void transpose(int32x4_t (&v)[4]) {
  const int32x4_t low = vtrn1q_s32(v[0], v[1]), high = vtrn2q_s32(v[0], v[1]);
  const int32x4_t low2 = vtrn1q_s32(v[2], v[3]), high2 = vtrn2q_s32(v[2], v[3]);
  const auto pairs = [](int32x4_t a) { return vreinterpretq_s64_s32(a); };
  v[0] = vreinterpretq_s32_s64(vtrn1q_s64(pairs(low), pairs(low2)));
  v[1] = vreinterpretq_s32_s64(vtrn1q_s64(pairs(high), pairs(high2)));
  v[2] = vreinterpretq_s32_s64(vtrn2q_s64(pairs(low), pairs(low2)));
  v[3] = vreinterpretq_s32_s64(vtrn2q_s64(pairs(high), pairs(high2)));
}

/// All channels of four positions that are neighbours in the planes of the output.
void store_planar(const StoreArgs& s, const Output& output, int r) {
  const int32_t* sums = s.sums + r * s.sums_stride;
  const int64_t row = s.first + s.position[r];
  int c = 0;
  for (; c + 4 <= s.cols; c += 4) {
    int32x4_t columns[4];
    for (int k = 0; k < 4; ++k)
      columns[k] = vld1q_s32(sums + k * s.sums_stride + c);
    transpose(columns);
    for (int k = 0; k < 4; ++k) {
      const int64_t channel = s.channel + c + k;
      output.put(row + (c + k) * s.channel_stride,
                 vaddq_s32(columns[k], vdupq_n_s32(s.correction[c + k])),
                 vdupq_n_f32(s.out->scale[channel]), vdupq_n_f32(s.out->bias[channel]));
    }
  }
  for (; c < s.cols; ++c)
    for (int k = 0; k < 4; ++k)
      output.put_one(row + k + c * s.channel_stride, sums[k * s.sums_stride + c] + s.correction[c],
                     s.channel + c);
}

}  // namespace

void store(const StoreArgs& s) {
  const Output output(*s.out);
  const bool planes = s.channel_stride != 1 && s.position_stride == 1;
  for (int r = 0; r < s.rows;) {
    // Positions ascend by 1 where they are not negative: these four have none between them.
    if (planes && r + 4 <= s.rows && s.position[r] >= 0 && s.position[r + 3] == s.position[r] + 3) {
      store_planar(s, output, r);
      r += 4;
    } else {
      store_position(s, output, r++);
    }
  }
}

}  // namespace neon

const KernelRow kNeonRow{
    .name = "neon",
    .isa = Isa::Neon,
    .quantize_row = neon::quantize_row,
    .quantize_planar = neon::quantize_planar,
    .fake_quantize = neon::fake_quantize,
    .unpack_tiles = neon::unpack_tiles,
    .gemm = neon::gemm,
    .gemm_rows = kGemmRows,  // what is made of a call's weights serves them all
    .gemv = neon::gemv,
    .store = neon::store,
    .requantize = neon::requantize,
    .grouped = &neon::kGrouped,
    .winograd = &neon::kWinograd,
    .image = &kNeonImage};

}  // namespace adalayer::cpu

// The numeric law of the project, in scalar form.
//
// Every backend (those of cpu/kernel_table.hpp, CUDA) must give the same bits as the functions
// below for every u8 and float32 output. What is written here is the specification; speed lives
// elsewhere.
#pragma once

#include <cmath>
#include <cstdint>

namespace adalayer {

/// Geometry of one 2-d convolution. A linear layer is the 1x1 convolution over a 1x1 image.
/// Weights are [out_channels][in_channels / groups][kernel_h][kernel_w].
struct ConvShape {
  int64_t batch = 0;
  int64_t in_channels = 0, in_h = 1, in_w = 1;
  int64_t out_channels = 0;
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;

  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  int64_t out_h() const {
    return (in_h + pad_top + pad_bottom - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
  }
  int64_t out_w() const {
    return (in_w + pad_left + pad_right - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
  }
  int64_t reduction() const { return group_in() * kernel_h * kernel_w; }
  int64_t macs() const { return batch * out_channels * out_h() * out_w() * reduction(); }
  bool depthwise() const { return groups > 1 && groups == in_channels && groups == out_channels; }
  bool operator==(const ConvShape&) const = default;
};

/// Throws InvalidArgument naming the field unless the shape is one that the kernels can run.
void validate(const ConvShape& shape);

/// The accumulator bound of law 1: refuse a layer whose sum of |w * a| could reach 2^31.
void check_accumulator(int64_t reduction, int bits);

enum class DType : uint8_t { F32, U8 };
enum class Layout : uint8_t { NCHW, NHWC };

/// Grid of a u8 activation: q = rne(clamp(x * inv_scale, -zero_point, qmax - zero_point)) +
/// zero_point.
struct ActivationGrid {
  float inv_scale = 1.0f;
  int32_t zero_point = 0;
  int32_t qmax = 255;  // 2^a - 1; fewer activation bits use the same container
};

/// What a level of lower quality reads of a stored weight of any width: the `bits` bit-planes above
/// the `drop` lowest ones, rounded to nearest, the upper one of two, and clamped where planes above
/// them are in use. Zeros stay zeros. (Planes that are only cut off round down, by half a step on
/// average; that is half a step times the sum of the inputs of every single output, so that no bias
/// makes up for it.)
inline int8_t upper_planes(int8_t weight, int bits, int drop) {
  const int rounded = (weight + ((1 << drop) >> 1)) >> drop;
  const int top = (1 << (bits - 1)) - 1;
  return static_cast<int8_t>(rounded > top ? top : rounded < -top - 1 ? -top - 1 : rounded);
}

/// Activations of one call. For U8 the values are levels of the grid already (inv_scale is unused).
struct ActivationIn {
  const void* data = nullptr;
  DType dtype = DType::F32;
  Layout layout = Layout::NCHW;
  ActivationGrid grid;
};

/// What happens to the int32 sums. F32: y = clamp(fma(acc, scale, bias) + residual, lo, hi), then,
/// with a grid, the nearest value on it: (quantize(y) - zero point) * grid_scale.
/// U8: q = rne(clamp(fma(acc, scale, bias), lo, hi)) + zero_point, where lo and hi are relative to
/// the zero point and 0 <= lo + zero_point <= hi + zero_point <= 255.
struct OutputSpec {
  void* data = nullptr;
  DType dtype = DType::F32;
  Layout layout = Layout::NCHW;
  const float* scale = nullptr;  // [out_channels], finite, may be negative
  const float* bias = nullptr;   // [out_channels], finite
  float lo = 0.0f, hi = 0.0f;
  int32_t zero_point = 0;           // U8 only
  const float* residual = nullptr;  // F32 only: a tensor of the output's shape and layout
  bool on_grid = false;             // F32 only
  ActivationGrid grid;
  float grid_scale = 1.0f;
};

// max and min as x86 has them: a NaN in the first operand yields the second, so NaN becomes `lo`.
inline float max_x86(float a, float b) { return a > b ? a : b; }
inline float min_x86(float a, float b) { return a < b ? a : b; }

/// Round to nearest even. The caller has clamped v to the int32 range.
inline int32_t round_even(float v) { return static_cast<int32_t>(std::nearbyintf(v)); }

inline uint8_t quantize_value(float x, const ActivationGrid& grid) {
  const float lo = static_cast<float>(-grid.zero_point);
  const float hi = static_cast<float>(grid.qmax - grid.zero_point);
  const float v = min_x86(max_x86(x * grid.inv_scale, lo), hi);
  return static_cast<uint8_t>(round_even(v) + grid.zero_point);
}

inline float dequantize_value(uint8_t q, float scale, int32_t zero_point) {
  return static_cast<float>(static_cast<int32_t>(q) - zero_point) * scale;
}

/// One u8 output before rounding: one fused multiply-add, then the clamp, in float.
inline float requantize_float(int32_t acc, float scale, float bias, float lo, float hi) {
  return min_x86(max_x86(std::fmaf(static_cast<float>(acc), scale, bias), lo), hi);
}

/// One float output of a layer, its residual and grid included.
inline float output_value(int32_t acc, int64_t channel, int64_t index, const OutputSpec& out) {
  float y = std::fmaf(static_cast<float>(acc), out.scale[channel], out.bias[channel]);
  if (out.residual != nullptr) y += out.residual[index];
  y = min_x86(max_x86(y, out.lo), out.hi);
  if (!out.on_grid) return y;
  return dequantize_value(quantize_value(y, out.grid), out.grid_scale, out.grid.zero_point);
}

inline uint8_t requantize_u8(int32_t acc, float scale, float bias, float lo, float hi,
                             int32_t zero_point) {
  return static_cast<uint8_t>(round_even(requantize_float(acc, scale, bias, lo, hi)) + zero_point);
}

}  // namespace adalayer

// The numeric law of the engine's operations between convolutions, in scalar form.
//
// All of them read and write u8 levels; each formula below is the specification that the vector
// kernels must reproduce bit for bit. Float constants come from the program; nothing here calls a
// function whose result differs between C libraries.
#pragma once

#include <bit>
#include <cstdint>

#include "reference/float_kinds.hpp"
#include "reference/spec.hpp"

namespace adalayer {

/// The end of every operation with a u8 result: the real value y goes onto a grid as the drop-in
/// modules put it there, q = rne(clamp(y * inv_scale, lo, hi)) + zero_point, and then through the
/// table. lo and hi are whole numbers relative to the zero point, in -zero_point .. 255-zero_point.
struct U8Finish {
  float lo = 0.0f, hi = 255.0f;
  int32_t zero_point = 0;
  const uint8_t* table = nullptr;  // [256], or null
  float inv_scale = 1.0f;          // of the grid before the table
};

inline uint8_t finish_u8(float y, const U8Finish& f) {
  const float v = min_x86(max_x86(y * f.inv_scale, f.lo), f.hi);
  const auto q = static_cast<uint8_t>(round_even(v) + f.zero_point);
  return f.table == nullptr ? q : f.table[q];
}

/// Convolution: y = fma(acc, scale[c], bias[c]), plus the residual's real value if there is one
/// (dequantize_value): a product and a sum, each rounded, as the drop-in modules have it.
inline float conv_value(int32_t acc, float scale, float bias) {
  return std::fmaf(static_cast<float>(acc), scale, bias);
}

/// Sum and product of two tensors: y = a + b and y = a * b of the real values (q - zero) * scale.
/// b has a's shape, or one value per channel ([C, 1, 1]). A difference has a negative scale.
struct PairSpec {
  int32_t zero_a = 0, zero_b = 0;
  float scale_a = 1.0f, scale_b = 1.0f;
  U8Finish finish;
};
inline uint8_t add_u8(uint8_t a, uint8_t b, const PairSpec& s) {
  const float x = dequantize_value(a, s.scale_a, s.zero_a);
  return finish_u8(x + dequantize_value(b, s.scale_b, s.zero_b), s.finish);
}
inline uint8_t mul_u8(uint8_t a, uint8_t b, const PairSpec& s) {
  const float x = dequantize_value(a, s.scale_a, s.zero_a);
  return finish_u8(x * dequantize_value(b, s.scale_b, s.zero_b), s.finish);
}

/// Per-channel line, a batch norm that no convolution absorbs: y = fma(a, scale[c], bias[c]) over
/// raw levels.
struct AffineSpec {
  const float* scale = nullptr;  // [C]
  const float* bias = nullptr;   // [C]
  U8Finish finish;
};
inline uint8_t affine_u8(uint8_t a, int64_t c, const AffineSpec& s) {
  return finish_u8(std::fmaf(static_cast<float>(a), s.scale[c], s.bias[c]), s.finish);
}

/// The same with an entry per element of the image, in the order rows, columns, channels: of both
/// constants, or of one of them.
struct AffineImageSpec {
  const float* scale = nullptr;  // [C], or [H*W*C]
  const float* bias = nullptr;
  bool scale_of_image = false, bias_of_image = false;
  U8Finish finish;
};
/// `element`: number of the level in that order, `c`: its channel.
inline uint8_t affine_image_u8(uint8_t a, int64_t element, int64_t c, const AffineImageSpec& s) {
  const float scale = s.scale[s.scale_of_image ? element : c];
  const float bias = s.bias[s.bias_of_image ? element : c];
  return finish_u8(std::fmaf(static_cast<float>(a), scale, bias), s.finish);
}

/// Windows of max and average pooling. Windows are cut off at the image's border: positions outside
/// take part in neither maximum nor sum.
struct PoolSpec {
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_left = 0;
  int64_t dilation_h = 1, dilation_w = 1;  // max pooling only
  // Average pooling: y = (float)(sum - valid * zero_in) * (ratio / (float)divisor), a float
  // division, where `valid` counts the window's positions inside the image. The divisor is `valid`,
  // or, with count_padding, the window's positions inside the padded image (pad_bottom and
  // pad_right limit it; a window of ceil_mode may stick out further).
  bool count_padding = false;
  int64_t pad_bottom = 0, pad_right = 0;
  int32_t zero_in = 0;
  float ratio = 1.0f;
  U8Finish finish;
};
inline float average_value(int64_t sum, int64_t valid, int64_t divisor, const PoolSpec& s) {
  const auto centred = static_cast<int32_t>(sum - valid * s.zero_in);
  return static_cast<float>(centred) * (s.ratio / static_cast<float>(divisor));
}

/// Adaptive average pooling to out_h x out_w: window i covers floor(i*H/out) .. ceil((i+1)*H/out).
/// The value is average_value with divisor = valid; out = 1 x 1 is the global average.
inline int64_t adaptive_begin(int64_t i, int64_t in, int64_t out) { return i * in / out; }
inline int64_t adaptive_end(int64_t i, int64_t in, int64_t out) {
  return ((i + 1) * in + out - 1) / out;
}

/// Resize by tables that the program holds: output row y reads input rows low_h[y] and high_h[y]
/// with weights 1 - part_h[y] and part_h[y]; columns alike. Nearest keeps levels: it reads
/// (low_h[y], low_w[x]). Bilinear over u8, raw levels:
///   top    = fma(part_w, (float)q01 - (float)q00, (float)q00)
///   bottom = fma(part_w, (float)q11 - (float)q10, (float)q10)
///   y      = fma(fma(part_h, bottom - top, top), scale, offset)
struct ResizeSpec {
  bool bilinear = false;
  const int32_t* low_h = nullptr;
  const int32_t* high_h = nullptr;
  const float* part_h = nullptr;
  const int32_t* low_w = nullptr;
  const int32_t* high_w = nullptr;
  const float* part_w = nullptr;
  float scale = 1.0f, offset = 0.0f;  // bilinear over u8 only
  U8Finish finish;                    // bilinear over u8 only
};
inline float blend(float q00, float q01, float q10, float q11, float part_w, float part_h) {
  const float top = std::fmaf(part_w, q01 - q00, q00);
  const float bottom = std::fmaf(part_w, q11 - q10, q10);
  return std::fmaf(part_h, bottom - top, top);
}

/// Output element (c, y, x) is element channel[c] + row[y] + column[x] of the input, counted in
/// NCHW order.
struct RearrangeSpec {
  const int32_t* channel = nullptr;  // [C], all three of the output
  const int32_t* row = nullptr;      // [H]
  const int32_t* column = nullptr;   // [W]
};

/// Levels of token t: table[ids[t] * channels + c] for every channel c. Ids are 0 .. rows - 1.
struct EmbeddingSpec {
  const uint8_t* table = nullptr;  // [rows][channels]
  int64_t rows = 0, channels = 0;
};

/// Layer norm over the channels of one position, from exact integer sums s1 = sum q, s2 = sum q^2:
///   mean = s1 / C, var = (C * s2 - s1^2) / C^2     (double; the numerator is an exact int64)
///   rstd = 1 / sqrt(var * step^2 + eps)            (double), step = scale of the input's grid
///   y_c  = fma((float)(q_c - mean) * (float)(rstd * step), gamma[c], beta[c])
/// q_c - mean is taken in double and rounded once.
/// RMS norm is the same about zero instead of the mean, with the zero point z of the input's grid:
///   mean = z, var = (s2 - 2 z s1 + C z^2) / C
/// The inline functions below fix the order of the double operations.
struct LayerNormSpec {
  bool about_zero = false;  // an RMS norm
  int32_t zero_point = 0;   // of the input's grid
  double step = 1.0, eps = 1e-5;
  const float* gamma = nullptr;  // [C]
  const float* beta = nullptr;   // [C]
  U8Finish finish;
};
struct LayerNormMoments {
  double mean;
  float factor;  // (float)(rstd * step)
};
inline LayerNormMoments layer_norm_moments(int64_t s1, int64_t s2, int64_t channels,
                                           const LayerNormSpec& s) {
  const auto count = static_cast<double>(channels);
  const int64_t z = s.zero_point;
  const double var = s.about_zero ? static_cast<double>(s2 - 2 * z * s1 + channels * z * z) / count
                                  : static_cast<double>(channels * s2 - s1 * s1) / (count * count);
  const double mean = s.about_zero ? static_cast<double>(z) : static_cast<double>(s1) / count;
  const double rstd = 1.0 / std::sqrt(var * (s.step * s.step) + s.eps);
  return {mean, static_cast<float>(rstd * s.step)};
}
/// y_c, which a float result is as it is.
inline float layer_norm_value(uint8_t q, int64_t c, const LayerNormMoments& m,
                              const LayerNormSpec& s) {
  const auto centred = static_cast<float>(static_cast<double>(q) - m.mean);
  return std::fmaf(centred * m.factor, s.gamma[c], s.beta[c]);
}
inline uint8_t layer_norm_u8(uint8_t q, int64_t c, const LayerNormMoments& m,
                             const LayerNormSpec& s) {
  return finish_u8(layer_norm_value(q, c, m, s), s.finish);
}

/// The same norms over floats, behind the last quantized layer or between layers that stay in
/// float:
///   mean = (sum x) / n, var = (sum (x - mean)^2) / n     (double; RMS norm: mean = 0)
///   y    = fma((float)((x - mean) * (1 / sqrt(var + eps))), gamma[c], beta[c])
/// Sums go from channel to channel, and those of a group norm from position to position then.
struct FloatMoments {
  double mean, rstd;
};
inline FloatMoments float_moments(double mean, double squares, int64_t count,
                                  const LayerNormSpec& s) {
  return {mean, 1.0 / std::sqrt(squares / static_cast<double>(count) + s.eps)};
}
inline float float_normal(float x, const FloatMoments& m) {
  return static_cast<float>((static_cast<double>(x) - m.mean) * m.rstd);
}

/// Group norm: as layer norm, over all positions and the channels of one group together. Groups are
/// neighbouring channels, all equally many.
struct GroupNormSpec {
  int64_t groups = 1;
  LayerNormSpec norm;
};
/// With so many levels in a group the numerator of the variance fits int64.
constexpr int64_t kMaxGroupNorm = 1 << 23;

/// Softmax over the channels of one position, in float: e_c = softmax_exp(x_c - max x), the sum of
/// all e_c in double, channel after channel, y_c = e_c * (float)(1 / sum). Inputs are finite.
///
/// e^x for x <= 87 with an error below 2 units in the last place, from fused multiply-adds alone,
/// so that every C library and instruction set gives the same bits. Below -87 it stays at e^-87.
inline float softmax_exp(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = max_x86(x, -87.0f);
  const float n = std::nearbyintf(x * kLog2e);
  const float r = std::fmaf(n, -kLn2Low, std::fmaf(n, -kLn2High, x));
  // Taylor's series; |r| <= ln(2) / 2 leaves less than 2^-26 after the seventh power.
  float p = 1.0f / 5040.0f;
  p = std::fmaf(p, r, 1.0f / 720.0f);
  p = std::fmaf(p, r, 1.0f / 120.0f);
  p = std::fmaf(p, r, 1.0f / 24.0f);
  p = std::fmaf(p, r, 1.0f / 6.0f);
  p = std::fmaf(p, r, 0.5f);
  p = std::fmaf(p, r, 1.0f);
  p = std::fmaf(p, r, 1.0f);
  // Times 2^n, exactly: n is in -126 .. 126.
  const auto power = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  return p * std::bit_cast<float>(power);
}

/// A function of one float, behind the last quantized layer. Inputs are finite, but for Multiply
/// and Plus.
///   Clamp     min(max(x, a), b)          Sigmoid   1 / (1 + e^-x)
///   Multiply  x * a                      Tanh      2 / (1 + e^-2x) - 1
///   Plus      x + a                      Silu      max(x, -87) / (1 + e^-x)
struct FloatFunctionSpec {
  FloatFunction function = FloatFunction::Clamp;
  float a = 0.0f, b = 0.0f;
};
/// Of -x the larger exponents are all as good as e^87: 1 + e^87 is e^87.
inline float sigmoid_value(float x) { return 1.0f / (1.0f + softmax_exp(min_x86(-x, 87.0f))); }
inline float float_function(float x, const FloatFunctionSpec& s) {
  switch (s.function) {
    case FloatFunction::Clamp:
      return min_x86(max_x86(x, s.a), s.b);
    case FloatFunction::Multiply:
      return x * s.a;
    case FloatFunction::Plus:
      return x + s.a;
    case FloatFunction::Sigmoid:
      return sigmoid_value(x);
    case FloatFunction::Tanh:
      return std::fmaf(2.0f, sigmoid_value(2.0f * x), -1.0f);
    case FloatFunction::Silu:
      return max_x86(x, -87.0f) * sigmoid_value(x);
  }
  return x;
}

/// Two float tensors, element by element: one rounding, as everywhere. Each has the output's size
/// along an axis, or one value for all of it.
inline float float_pair(float a, float b, FloatPair pair) {
  switch (pair) {
    case FloatPair::Sum:
      return a + b;
    case FloatPair::Difference:
      return a - b;
    case FloatPair::Product:
      return a * b;
    case FloatPair::Quotient:
      return a / b;
  }
  return a;
}

/// One float of all values along whole axes, n of them, from a sum in double:
///   floats: Mean (sum x) / n, Norm sqrt(sum x^2), one after the other in NCHW order
///   levels: Mean (sum (q - z)) * step / n, Norm sqrt(sum (q - z)^2) * step, from exact sums
/// rounded once, to float.
struct ReduceSpec {
  Reduction kind = Reduction::Mean;
  bool along[3] = {};      // c, h, w
  int32_t zero_point = 0;  // of levels
  double step = 1.0;       // their scale
};
inline double reduction_term(double x, Reduction kind) {
  return kind == Reduction::Norm ? x * x : x;
}
inline float reduced_floats(double sum, int64_t count, Reduction kind) {
  return static_cast<float>(kind == Reduction::Norm ? std::sqrt(sum)
                                                    : sum / static_cast<double>(count));
}
inline float reduced_levels(int64_t sum, int64_t count, const ReduceSpec& s) {
  const auto exact = static_cast<double>(sum);
  return static_cast<float>(s.kind == Reduction::Norm
                                ? std::sqrt(exact) * s.step
                                : exact * s.step / static_cast<double>(count));
}

}  // namespace adalayer

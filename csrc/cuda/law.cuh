// csrc/reference/spec.hpp and image_spec.hpp in device code: the same operations in the same order.
// Every step states its rounding, so that no compiler flag can fuse or reorder it.
#pragma once

#include <cstdint>

#include "cuda/params.hpp"
#include "cuda/simt.cuh"

namespace adalayer::cuda {

// max and min as x86 has them: a NaN in the first operand yields the second. For levels max_number
// and min_number do as well, since the second operand is never NaN and the sign of a zero is lost.
ADALAYER_DEVICE float max_x86(float a, float b) { return a > b ? a : b; }
ADALAYER_DEVICE float min_x86(float a, float b) { return a < b ? a : b; }

/// The real value y on its grid, then through the table. Clamped before the conversion: out of
/// range, x86 and CUDA convert differently.
ADALAYER_DEVICE uint8_t finish_u8(float y, const Finish& f) {
  const float v = min_number(max_number(mul_rn(y, f.inv_scale), f.lo), f.hi);
  const auto q = static_cast<uint8_t>(round_even(v) + f.zero_point);
  return f.table == nullptr ? q : load_constant(f.table + q);
}

ADALAYER_DEVICE uint8_t quantize_value(float x, const Grid& g) {
  const float lo = to_float_rn(-g.zero_point), hi = to_float_rn(g.qmax - g.zero_point);
  const float v = min_number(max_number(mul_rn(x, g.inv_scale), lo), hi);
  return static_cast<uint8_t>(round_even(v) + g.zero_point);
}

ADALAYER_DEVICE float dequantize_value(int32_t q, float scale, int32_t zero_point) {
  return mul_rn(to_float_rn(q - zero_point), scale);
}

ADALAYER_DEVICE float conv_value(int32_t acc, float scale, float bias) {
  return fma_rn(to_float_rn(acc), scale, bias);
}

ADALAYER_DEVICE uint8_t add_u8(uint8_t a, uint8_t b, const PairParams& p) {
  const float x = dequantize_value(a, p.scale_a, p.zero_a);
  return finish_u8(add_rn(x, dequantize_value(b, p.scale_b, p.zero_b)), p.finish);
}
ADALAYER_DEVICE uint8_t mul_u8(uint8_t a, uint8_t b, const PairParams& p) {
  const float x = dequantize_value(a, p.scale_a, p.zero_a);
  return finish_u8(mul_rn(x, dequantize_value(b, p.scale_b, p.zero_b)), p.finish);
}

/// The value of an averaging window from the sum of its levels.
ADALAYER_DEVICE float average_value(int64_t sum, int64_t valid, int64_t divisor, int32_t zero_point,
                                    float ratio) {
  const auto centred = static_cast<int32_t>(sum - valid * zero_point);
  return mul_rn(to_float_rn(centred), div_rn(ratio, to_float_rn(static_cast<int32_t>(divisor))));
}

ADALAYER_DEVICE float blend(float q00, float q01, float q10, float q11, float part_w,
                            float part_h) {
  const float top = fma_rn(part_w, sub_rn(q01, q00), q00);
  const float bottom = fma_rn(part_w, sub_rn(q11, q10), q10);
  return fma_rn(part_h, sub_rn(bottom, top), top);
}

/// e^x for x <= 87, from fused multiply-adds alone.
ADALAYER_DEVICE float softmax_exp(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = max_x86(x, -87.0f);
  const float n = round_even_float(mul_rn(x, kLog2e));
  const float r = fma_rn(n, -kLn2Low, fma_rn(n, -kLn2High, x));
  float p = 1.0f / 5040.0f;
  p = fma_rn(p, r, 1.0f / 720.0f);
  p = fma_rn(p, r, 1.0f / 120.0f);
  p = fma_rn(p, r, 1.0f / 24.0f);
  p = fma_rn(p, r, 1.0f / 6.0f);
  p = fma_rn(p, r, 0.5f);
  p = fma_rn(p, r, 1.0f);
  p = fma_rn(p, r, 1.0f);
  const auto power = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  return mul_rn(p, bits_to_float(power));
}

ADALAYER_DEVICE float sigmoid_value(float x) {
  return div_rn(1.0f, add_rn(1.0f, softmax_exp(min_x86(-x, 87.0f))));
}
ADALAYER_DEVICE float float_function(float x, FloatFunction function, float a, float b) {
  switch (function) {
    case FloatFunction::Clamp:
      return min_x86(max_x86(x, a), b);
    case FloatFunction::Multiply:
      return mul_rn(x, a);
    case FloatFunction::Plus:
      return add_rn(x, a);
    case FloatFunction::Sigmoid:
      return sigmoid_value(x);
    case FloatFunction::Tanh:
      return fma_rn(2.0f, sigmoid_value(mul_rn(2.0f, x)), -1.0f);
    case FloatFunction::Silu:
      return mul_rn(max_x86(x, -87.0f), sigmoid_value(x));
  }
  return x;
}
ADALAYER_DEVICE float float_pair(float a, float b, FloatPair pair) {
  switch (pair) {
    case FloatPair::Sum:
      return add_rn(a, b);
    case FloatPair::Difference:
      return sub_rn(a, b);
    case FloatPair::Product:
      return mul_rn(a, b);
    case FloatPair::Quotient:
      return div_rn(a, b);
  }
  return a;
}

}  // namespace adalayer::cuda

// csrc/reference/spec.hpp in device code: the same operations in the same order and rounding. Every
// step is an intrinsic with a stated rounding, so that no compiler flag can fuse or reorder it.
#pragma once

#include <cstdint>

namespace adalayer::cuda {

// max and min as x86 has them: a NaN in the first operand yields the second. fmaxf and fminf of
// CUDA return the operand that is not NaN, which for these argument orders is the same, but they
// leave the sign of zero open.
__device__ __forceinline__ float max_x86(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float min_x86(float a, float b) { return a < b ? a : b; }

__device__ __forceinline__ float requantize_float(int32_t acc, float scale, float bias, float lo,
                                                  float hi) {
  return min_x86(max_x86(__fmaf_rn(__int2float_rn(acc), scale, bias), lo), hi);
}

// Clamped before the conversion: out of range, x86 and CUDA convert differently.
__device__ __forceinline__ uint8_t requantize_u8(int32_t acc, float scale, float bias, float lo,
                                                 float hi, int32_t zero_point) {
  return static_cast<uint8_t>(__float2int_rn(requantize_float(acc, scale, bias, lo, hi)) +
                              zero_point);
}

__device__ __forceinline__ uint8_t quantize_value(float x, float inv_scale, int32_t zero_point,
                                                  int32_t qmax) {
  const float lo = __int2float_rn(-zero_point), hi = __int2float_rn(qmax - zero_point);
  const float v = min_x86(max_x86(__fmul_rn(x, inv_scale), lo), hi);
  return static_cast<uint8_t>(__float2int_rn(v) + zero_point);
}

}  // namespace adalayer::cuda

// What happens to the int32 sums of one convolution on their way to u8.
#pragma once

#include <cstdint>

#include "reference/image_spec.hpp"

namespace adalayer::cpu {

/// Elements of an epilogue's arrays: zeros follow the channels, because kernels read whole vectors
/// from the first channel of a group, or of a tile of it, on.
constexpr int64_t epilogue_size(int64_t channels) { return (channels + 31 + 63) / 64 * 64; }

/// y = fma((float)(sum + correction[c]), scale[c], bias[c]), plus (r - residual_zero) *
/// residual_scale of the residual's level r, then the finish (reference/image_spec.hpp). The arrays
/// have epilogue_size() elements.
struct ConvEpilogue {
  const int32_t* correction = nullptr;  // -zero_point of the input * sum of the channel's weights
  const float* scale = nullptr;
  const float* bias = nullptr;
  float residual_scale = 1.0f;
  int32_t residual_zero = 0;
  U8Finish finish;
  // |y * inv_scale| stays below 2^30 for every possible input, so that conversion may come before
  // the clamp (lo and hi are whole numbers and rounding is monotone: the result is the same).
  bool bounded = false;
};

}  // namespace adalayer::cpu

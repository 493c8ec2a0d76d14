// What happens to the int32 sums of one convolution on their way to u8.
#pragma once

#include <cstdint>

#include "reference/image_spec.hpp"

namespace adalayer::cpu {

/// y = fma((float)(sum + correction[c]), scale[c], bias[c]), then the residual, then the finish
/// (reference/image_spec.hpp). The arrays are padded with zeros to a multiple of 64 channels.
struct ConvEpilogue {
  const int32_t* correction = nullptr;  // -zero_point of the input * sum of the channel's weights
  const float* scale = nullptr;
  const float* bias = nullptr;
  float residual_scale = 0.0f;
  U8Finish finish;
  // |y| stays below 2^30 for every possible input, so that conversion may come before the clamp
  // (lo and hi are whole numbers and rounding is monotone: the result is the same).
  bool bounded = false;
};

}  // namespace adalayer::cpu

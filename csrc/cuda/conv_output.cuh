// The end of every convolution, written once: from the integer sum to what is stored.
#pragma once

#include "cuda/law.cuh"

namespace adalayer::cuda {

/// Pixel number (over the batch, in the output) of a position of the product.
ADALAYER_DEVICE int32_t output_pixel(const ConvOutput& o, int32_t position, int32_t plane,
                                     int32_t width) {
  if (o.linear) return position;
  const int32_t n = position / plane, rest = position - n * plane;
  const int32_t j = rest / width, i = rest - j * width;
  return (n * o.out_h + j * o.step_y + o.phase_y) * o.out_w + i * o.step_x + o.phase_x;
}

/// The real value before residual and finish. `sum` has been shifted to its true size.
ADALAYER_DEVICE float sum_value(int32_t sum, const ChannelConstants& c) {
  return conv_value(sum + c.correction, c.scale, c.bias);
}

ADALAYER_DEVICE uint8_t output_level(float y, bool residual, uint8_t r, const ConvOutput& o) {
  if (residual) y = add_rn(y, dequantize_value(r, o.residual_scale, o.residual_zero));
  return finish_u8(y, o.finish);
}

/// One float output; `pixel` counts over the batch.
ADALAYER_DEVICE void store_number(float y, int32_t pixel, int32_t channel, const ConvOutput& o) {
  int64_t at = static_cast<int64_t>(pixel) * o.channels_count + channel;
  if (!o.nhwc) {
    const int32_t plane = o.out_h * o.out_w;
    const int32_t n = pixel / plane;
    at = (static_cast<int64_t>(n) * o.channels_count + channel) * plane + (pixel - n * plane);
  }
  if (o.residual != nullptr) {
    const uint8_t r = o.residual[static_cast<int64_t>(pixel) * o.pitch + channel];
    y = add_rn(y, dequantize_value(r, o.residual_scale, o.residual_zero));
  }
  if (o.residual_numbers != nullptr) y = add_rn(y, o.residual_numbers[at]);
  y = min_x86(max_x86(y, o.lo), o.hi);
  if (o.on_grid) y = dequantize_value(quantize_value(y, o.grid), o.grid_scale, o.grid.zero_point);
  o.numbers[at] = y;
}

/// One output of a kernel that has them one by one.
ADALAYER_DEVICE void store_output(int32_t sum, int32_t pixel, int32_t channel,
                                  const ConvOutput& o) {
  const float y = sum_value(sum, o.channels[channel]);
  if (o.levels == nullptr) {
    store_number(y, pixel, channel, o);
    return;
  }
  const int64_t at = static_cast<int64_t>(pixel) * o.pitch + channel;
  const uint8_t r = o.residual == nullptr ? 0 : o.residual[at];
  o.levels[at] = output_level(y, o.residual != nullptr, r, o);
}

}  // namespace adalayer::cuda

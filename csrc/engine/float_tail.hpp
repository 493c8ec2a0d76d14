// Pooling of floats, over one contiguous NCHW image.
#pragma once

#include <cstdint>

#include "reference/image_spec.hpp"

namespace adalayer::engine {

/// Average pooling, channels first_channel to last_channel - 1: the window's sum in double, row by
/// row, over the divisor of PoolSpec, rounded to float once. Of the spec, the window and
/// count_padding are used; with `adaptive`, nothing (the sizes say it all).
void average_f32(const PoolSpec& spec, bool adaptive, const float* in, int64_t in_h, int64_t in_w,
                 float* out, int64_t out_h, int64_t out_w, int64_t first_channel,
                 int64_t last_channel);

/// Max pooling; NaN is the largest.
void maximum_f32(const PoolSpec& spec, const float* in, int64_t in_h, int64_t in_w, float* out,
                 int64_t out_h, int64_t out_w, int64_t first_channel, int64_t last_channel);

}  // namespace adalayer::engine

// Scalar convolution: the specification, and the fallback on machines without a faster kernel.
#pragma once

#include "reference/spec.hpp"

namespace adalayer::reference {

/// conv2d over u8 levels with int8 weights [O][I/groups][KH][KW]; padding holds the zero point.
void conv2d(const ConvShape& shape, const ActivationIn& in, const int8_t* weight,
            const OutputSpec& out, int threads);

/// Only the int32 sums, acc = sum(w * a) - zero_point * sum(w), as [N][O][OH][OW]. For tests.
void conv2d_accumulate(const ConvShape& shape, const ActivationIn& in, const int8_t* weight,
                       int32_t* acc, int threads);

/// Element-wise quantize to u8, and the round trip through the grid, over n contiguous floats.
void quantize(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q);
void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y);

}  // namespace adalayer::reference

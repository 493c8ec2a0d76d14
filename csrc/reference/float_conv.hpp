// Convolutions of floats, for layers that stay in float32 inside a program.
//
// Every output is added up by itself and in one order, so that vector width, threads, batch and
// blocking leave no trace in its bits: blocks of kFloatBlock terms, each a chain of fused
// multiply-adds from zero, are added to the bias one after the other. Terms are in the order of the
// weights (channels, kernel rows, kernel columns); those in the padding are zero.
#pragma once

#include <cmath>
#include <cstdint>

#include "reference/spec.hpp"

namespace adalayer {

constexpr int64_t kFloatBlock = 256;

struct FloatConvSpec {
  ConvShape shape;                 // of one image
  const float* weights = nullptr;  // [O][I / groups][KH][KW]
  const float* bias = nullptr;     // [O]
  float lo = -INFINITY, hi = INFINITY;

  bool clamps() const { return lo != -INFINITY || hi != INFINITY; }
};

namespace reference {

/// One image, NCHW in and out.
void float_conv(const FloatConvSpec& spec, const float* x, float* y);

}  // namespace reference
}  // namespace adalayer

// Linear layers in scalar form that a convolution cannot express: a scale for every group of input
// channels of an output.
#pragma once

#include <limits>

#include "reference/image_spec.hpp"

namespace adalayer {

/// One layer over rows of `inputs` values.
struct LinearSpec {
  int64_t inputs = 1, outputs = 1;
  int64_t group = 1;             // input channels that share a scale; the last ones may be fewer
  const float* scale = nullptr;  // [outputs][groups()]
  const float* bias = nullptr;   // [outputs]
  int32_t qmax = 255;            // largest level of the input
  int32_t zero_point = 0;        // of the input
  float step = 1.0f;             // of the input, where it is not in the scales
  float lo = -std::numeric_limits<float>::infinity();  // of a result in floats
  float hi = std::numeric_limits<float>::infinity();
  U8Finish finish;  // of a result in levels

  int64_t groups() const { return (inputs + group - 1) / group; }
};

/// A group's part of an output, added to the bias and the parts of the groups before it, in their
/// order. `sum`: of the products of its weights and its levels, less the zero point. With one group
/// this is conv_value().
inline float add_part(int32_t sum, float scale, float step, float y) {
  return std::fmaf(static_cast<float>(sum), scale * step, y);
}

namespace reference {

/// One row of levels. weights: [outputs][inputs]. Writes real values [outputs], not clamped.
void linear(const LinearSpec& s, const int8_t* weights, const uint8_t* levels, float* out);

}  // namespace reference
}  // namespace adalayer

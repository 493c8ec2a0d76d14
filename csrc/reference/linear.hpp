// Linear layers in scalar form that a convolution cannot express: a scale for every group of input
// channels of an output, and inputs whose rows get grids of their own in the call.
#pragma once

#include <limits>

#include "reference/image_spec.hpp"

namespace adalayer {

/// The grid of one row of floats: like the grids that a program holds, but for its origin.
struct RowGrid {
  float step = 1.0f;
  ActivationGrid grid;
};

/// From the lowest and the highest number of a row, or of 0: low <= 0 <= high. The step of a row of
/// zeros, or of numbers that are nearly zero, is the least whose inverse is a normal number;
/// infinite ends are the largest finite numbers.
inline RowGrid row_grid(float low, float high, int32_t qmax) {
  constexpr float kMost = std::numeric_limits<float>::max();
  const auto top = static_cast<float>(qmax);
  // (Divided first: their difference could be infinite.)
  const float step = min_x86(high, kMost) / top - max_x86(low, -kMost) / top;
  RowGrid g;
  g.step = max_x86(step, 0x1p-126f);
  g.grid.inv_scale = 1.0f / g.step;
  g.grid.zero_point = round_even(min_x86(-max_x86(low, -kMost) * g.grid.inv_scale, top));
  g.grid.qmax = qmax;
  return g;
}

/// One layer over rows of `inputs` values.
struct LinearSpec {
  int64_t inputs = 1, outputs = 1;
  int64_t group = 1;             // input channels that share a scale; the last ones may be fewer
  const float* scale = nullptr;  // [outputs][groups()]
  const float* bias = nullptr;   // [outputs]
  int32_t qmax = 255;            // largest level of the input
  // Of an input in levels; its step is in the scales. Rows of floats have grids of their own.
  int32_t zero_point = 0;
  float lo = -std::numeric_limits<float>::infinity();  // of a result in floats
  float hi = std::numeric_limits<float>::infinity();
  U8Finish finish;  // of a result in levels

  int64_t groups() const { return (inputs + group - 1) / group; }
};

/// A group's part of an output, added to the bias and the parts of the groups before it, in their
/// order. `sum`: of the products of its weights and its levels, less the zero point. With one group
/// and a step of 1 this is conv_value().
inline float add_part(int32_t sum, float scale, float step, float y) {
  return std::fmaf(static_cast<float>(sum), scale * step, y);
}

namespace reference {

/// The lowest and the highest of n numbers and 0. What is not a number does not count: it becomes
/// the lowest level (quantize_value).
void row_range(const float* x, int64_t n, float* low, float* high);

/// One row of levels. weights: [outputs][inputs]. Writes real values [outputs], not clamped.
void linear(const LinearSpec& s, const int8_t* weights, const uint8_t* levels, int32_t zero_point,
            float step, float* out);

}  // namespace reference
}  // namespace adalayer

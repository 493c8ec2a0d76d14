// A single layer as a value: everything that its calls have in common.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "reference/spec.hpp"

namespace adalayer::cpu {

/// A grid of activations as layers say it.
struct Grid {
  float scale = 1.0f;
  int zero_point = 0;
  int bits = 8;
};
/// The same as kernels want it. Throws InvalidArgument for one that is none.
ActivationGrid activation_grid(const Grid& grid);

/// Geometry, grids and bounds, checked once. Immutable and safe from many threads.
class Layer {
 public:
  struct Steps {
    Grid input;
    float lo = 0.0f, hi = 0.0f;
    std::optional<Grid> output;
    // Tensors are u8 levels: of the input's grid, whose step `scale` contains, and of `output`,
    // from whose zero point lo and hi count.
    bool levels = false;
  };

  /// `geometry`: its batch and the size of its images do not matter. Throws InvalidArgument.
  Layer(const ConvShape& geometry, const Steps& steps);

  /// They come with every call: whoever has written to them sees the difference. What is derived
  /// from the weights is found again by their content.
  struct Parameters {
    std::span<const uint8_t> packed;  // canonical
    const float* scale = nullptr;     // [out_channels]
    const float* bias = nullptr;      // [out_channels]
  };
  struct Images {
    int64_t count = 0, h = 1, w = 1;
    Layout layout = Layout::NCHW;  // of all tensors
  };
  /// `x` and `y` are f32, or u8 with Steps::levels; `residual`, which may be null, is f32 of y's
  /// shape. Throws InvalidArgument for images that are smaller than the kernel, and CorruptData.
  void run(const Parameters& parameters, const Images& images, const void* x, const float* residual,
           void* y, int threads) const;

 private:
  ConvShape geometry_;
  ActivationIn in_;
  float input_scale_ = 1.0f;
  OutputSpec out_;
};

}  // namespace adalayer::cpu

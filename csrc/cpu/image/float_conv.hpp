// Convolutions and linear layers in float32 (reference/float_conv.hpp), on the active instruction
// set. Bits depend on nothing but the operands.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/image/layout.hpp"
#include "reference/float_conv.hpp"

namespace adalayer::cpu {

/// A layer made ready. With many positions vectors run along them, and weights are read as they
/// are; with few they run along the output channels, whose weights are put side by side.
class FloatConv {
 public:
  /// `spec`'s bias has to outlive it, and its weights, unless there are `own` ones.
  explicit FloatConv(const FloatConvSpec& spec, std::vector<float> own = {});
  /// The layer of `like` for another image size, with the same weights in memory; fits(spec).
  FloatConv(const FloatConv& like, const FloatConvSpec& spec);
  FloatConv(const FloatConv&) = delete;
  FloatConv& operator=(const FloatConv&) = delete;

  /// Whether weights lie for that image size as they lie here.
  bool fits(const FloatConvSpec& spec) const;
  /// Parts that a call can be cut into, each with the work of at least a few microseconds.
  int64_t max_parts() const;
  /// NCHW images one after the other, in and out.
  void run(const float* x, float* y, int64_t images, Part part) const;

  const ConvShape& shape() const { return spec_.shape; }
  /// Of weights that it holds.
  size_t bytes() const;

 private:
  bool along_channels() const;
  int64_t units() const;
  void run_along_channels(const float* x, float* y, int64_t images, Part part) const;
  void run_along_positions(const float* x, float* y, Part part) const;

  FloatConvSpec spec_;
  std::shared_ptr<const std::vector<float>> own_;
  // [blocks of kFloatColumns channels][terms][kFloatColumns] floats
  std::shared_ptr<const AlignedBuffer> side_by_side_;
};

/// What FloatConv::bytes() will be, and scratch memory of a thread.
double float_conv_bytes(const ConvShape& shape, bool own_weights);
double float_conv_scratch(const ConvShape& shape);

}  // namespace adalayer::cpu

#include "cpu/layer/layer.hpp"

#include "core/aligned_buffer.hpp"
#include "core/status.hpp"
#include "cpu/layer/single_layer.hpp"

namespace adalayer::cpu {
namespace {

/// scale[o] * factor in float32: the one product that law 1's `scale` is made of.
const float* multipliers(const float* scale, int64_t n, float factor) {
  thread_local AlignedBuffer buffer;
  auto* out = grown<float>(buffer, n);
  for (int64_t i = 0; i < n; ++i)
    out[i] = scale[i] * factor;
  return out;
}

/// A kernel of any size fits into these.
constexpr int64_t kLargestImage = (int64_t{1} << 31) - 1;

}  // namespace

ActivationGrid activation_grid(const Grid& grid) {
  if (grid.bits < 2 || grid.bits > 8) throw InvalidArgument("activation bits must be 2 to 8");
  const int qmax = (1 << grid.bits) - 1;
  if (grid.zero_point < 0 || grid.zero_point > qmax)
    fail<InvalidArgument>("zero point must be 0 to ", qmax, ", got ", grid.zero_point);
  if (!(grid.scale > 0.0f) || !(grid.scale < 3.4e38f))
    fail<InvalidArgument>("activation scale must be positive and finite, got ", grid.scale);
  return {1.0f / grid.scale, grid.zero_point, qmax};
}

Layer::Layer(const ConvShape& geometry, const Steps& steps)
    : geometry_(geometry), input_scale_(steps.input.scale) {
  geometry_.batch = 0;
  geometry_.in_h = geometry_.in_w = kLargestImage;
  validate(geometry_);
  const DType type = steps.levels ? DType::U8 : DType::F32;
  in_.dtype = out_.dtype = type;
  in_.grid = activation_grid(steps.input);
  out_.lo = steps.lo;
  out_.hi = steps.hi;
  if (!steps.output) return;
  if (steps.levels) {
    out_.zero_point = steps.output->zero_point;
    return;
  }
  out_.on_grid = true;
  out_.grid = activation_grid(*steps.output);
  out_.grid_scale = steps.output->scale;
}

void Layer::run(const Parameters& parameters, const Images& images, const void* x,
                const float* residual, void* y, int threads) const {
  ConvShape shape = geometry_;
  shape.batch = images.count;
  shape.in_h = images.h;
  shape.in_w = images.w;
  validate(shape);
  ActivationIn in = in_;
  in.data = x;
  in.layout = images.layout;
  OutputSpec out = out_;
  out.data = y;
  out.layout = images.layout;
  out.bias = parameters.bias;
  out.residual = residual;
  const auto weights = cached_weights(shape, parameters.packed, largest_level(in));
  // Levels come with the whole requantization scale.
  out.scale = in.dtype == DType::U8
                  ? parameters.scale
                  : multipliers(parameters.scale, shape.out_channels, input_scale_);
  conv2d(shape, in, *weights, out, threads);
}

}  // namespace adalayer::cpu

// What the calls of a single layer share that depends on shapes alone, for the active instruction
// set: where its input lies once it is packed, and what its kernels read there.
#pragma once

#include <memory>
#include <optional>

#include "cpu/conv/matmul.hpp"
#include "cpu/conv/stem.hpp"
#include "cpu/image/layout.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

/// A shape, for one instruction set: what plans and derived weights are looked up by.
struct LayerKey {
  uint64_t content = 0;  // of weights; for plans, whether by pixel
  ConvShape shape;
  Isa isa = Isa::Scalar;
  bool operator==(const LayerKey&) const = default;
};
struct LayerKeyHash {
  size_t operator()(const LayerKey& key) const;
};

struct LayerPlan {
  ConvShape shape;  // of one image
  bool grouped = false;
  std::optional<Stem> stem;
  ImageLayout in;
  ConvPlan conv;  // unless grouped

  size_t bytes() const;
};

/// `by_pixel`: see plan_conv. Needs vector kernels. Throws InvalidArgument for an image that is too
/// large.
LayerPlan plan_layer(const ConvShape& shape, bool by_pixel = false);

/// The same from a process-wide cache: a network asks for the same few shapes again and again.
std::shared_ptr<const LayerPlan> cached_plan(const ConvShape& shape, bool by_pixel = false);

/// Part of the rows of image `n` of a tensor to levels in `image`, padding included.
void pack_image(const LayerPlan& plan, const ActivationIn& in, int64_t n, uint8_t* image,
                Part part);

}  // namespace adalayer::cpu

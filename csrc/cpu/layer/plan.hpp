// What the calls of a single layer share that depends on shapes and the algorithm alone: where its
// input lies once it is packed, and what its kernels read there.
#pragma once

#include <memory>

#include "cpu/conv/algorithm.hpp"
#include "cpu/image/layout.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

/// A shape, for one instruction set: what plans and derived weights are looked up by.
struct LayerKey {
  uint64_t content = 0;  // of weights; for plans, what chooses between those of one shape
  ConvShape shape;
  int qmax = 255;  // of the input's grid
  Isa isa = Isa::Scalar;
  bool operator==(const LayerKey&) const = default;
};
struct LayerKeyHash {
  size_t operator()(const LayerKey& key) const;
};

struct LayerPlan {
  ConvShape shape;                            // of one image
  std::shared_ptr<const OwnInput> own_input;  // or null, where the input is an image like others
  std::unique_ptr<PlannedConv> conv;

  size_t bytes() const { return sizeof *this + conv->bytes(); }
};

/// A single layer for the active row of the kernel table: nobody else reads its packed input, whose
/// levels are 0 .. qmax.
ConvTask layer_task(const ConvShape& shape, int bits, int qmax);

/// What the layer's packed input looks like to an algorithm.
struct LayerInput {
  std::shared_ptr<const OwnInput> own;
  ImageLayout layout;
};
LayerInput layer_input(const ConvTask& task, const ConvAlgorithm& algorithm);

/// The plan of an algorithm for weights of one variant, from a process-wide cache: a network asks
/// for the same few shapes again and again. Throws InvalidArgument for an image that is too large.
std::shared_ptr<const LayerPlan> cached_plan(const ConvTask& task, const ConvAlgorithm& algorithm,
                                             int variant);

/// Part of the rows of image `n` of a tensor to levels in `image`, padding included.
void pack_image(const LayerPlan& plan, const ActivationIn& in, int64_t n, uint8_t* image,
                Part part);

}  // namespace adalayer::cpu

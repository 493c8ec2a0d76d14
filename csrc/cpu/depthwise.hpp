// Depthwise and narrow grouped convolutions on u8 images, where a matmul would mostly multiply
// zeros.
#pragma once

#include <span>

#include "core/aligned_buffer.hpp"
#include "cpu/conv_epilogue.hpp"
#include "cpu/image_layout.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

/// Weights of a grouped convolution as the kernels here read them.
struct GroupedWeights {
  AlignedBuffer data;
  // What the builder needs to remember for the kernel (index vectors, ...) is added here.
};

/// Whether `shape` is one for run_grouped: depthwise (with any channel multiplier that keeps
/// groups == in_channels), or few channels per group.
bool grouped_suits(const ConvShape& shape);

GroupedWeights build_grouped(const ConvShape& shape, std::span<const int8_t> weights);

/// One part of one image. The input's padding (zero point) is in its layout already; residual.data
/// is null where there is none.
void run_grouped(const ConvShape& shape, const GroupedWeights& weights,
                 const ConvEpilogue& epilogue, ConstImageView in, ConstImageView residual,
                 ImageView out, Part part);

}  // namespace adalayer::cpu

// Depthwise and narrow grouped convolutions on u8 images, where a matmul would mostly multiply
// zeros.
#pragma once

#include <span>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "core/cpu_features.hpp"
#include "cpu/conv_epilogue.hpp"
#include "cpu/image/layout.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

/// How the kernels see a grouped convolution; grouped_kernels.hpp says more.
enum class GroupedKind : uint8_t { Plain, Depthwise, InLane, Broadcast };

/// Granules (16 channels) of the output that one vector holds: its 128-bit piece l is granule
/// first + l % granules, and `splits` output rows share it.
struct GroupedBlock {
  int64_t first = 0;
  int granules = 1;
  int splits = 1;
  int64_t bytes = 0;  // of a split: channels that exist
};

/// Weights of a grouped convolution as the kernels here read them. They belong to the instruction
/// set that was active when they were built.
struct GroupedWeights {
  AlignedBuffer data;
  Isa isa = Isa::Scalar;
  GroupedKind kind = GroupedKind::Plain;
  std::vector<GroupedBlock> blocks;  // Depthwise and InLane
};

/// Whether `shape` is one for run_grouped: depthwise (with any channel multiplier that keeps
/// groups == in_channels), or few channels per group. Depends on the active instruction set.
bool grouped_suits(const ConvShape& shape);

/// Bytes of what build_grouped() allocates, without building it.
double grouped_bytes(const ConvShape& shape);

/// weights: [out_channels][group_in][kernel_h][kernel_w]. Works for every shape with groups, also
/// where grouped_suits says that a matmul is faster.
GroupedWeights build_grouped(const ConvShape& shape, std::span<const int8_t> weights);

/// One part of one image: rows of the output. The input's padding (zero point) is in its layout
/// already; residual.data is null where there is none. The output's memory may be the residual's,
/// if both have one layout, but not the input's. Up to 64 readable bytes must follow input and
/// residual (ImageLayout::slack).
void run_grouped(const ConvShape& shape, const GroupedWeights& weights,
                 const ConvEpilogue& epilogue, ConstImageView in, ConstImageView residual,
                 ImageView out, Part part);

/// The sums alone, for outputs that are no u8 image: rows [y_first, y_last) of one image as
/// [y_last - y_first][out_w][grouped_sums_pitch], without any correction for a zero point. Needs
/// vector kernels.
void grouped_sums(const ConvShape& shape, const GroupedWeights& weights, ConstImageView in,
                  int64_t y_first, int64_t y_last, int32_t* sums);

/// Elements from one position's sums to the next one's.
int64_t grouped_sums_pitch(const ConvShape& shape);

}  // namespace adalayer::cpu

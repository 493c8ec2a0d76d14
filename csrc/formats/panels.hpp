// Weight layouts that the x86 kernels read, derived from the canonical form and never saved.
// Index formulas: FORMATS.md, sections "Panels" and "Depthwise".
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "reference/spec.hpp"

namespace adalayer::formats {

// One weight tile is 64 input values deep and 16 output channels wide: an AMX B tile, and 16
// VNNI registers. Everything below counts in these tiles.
constexpr int kTileDepth = 64;
constexpr int kTileWidth = 16;
constexpr int kTileBytes = kTileDepth * kTileWidth;  // unpacked, one byte per weight

enum class PanelKind : uint8_t { Panels, Depthwise };

/// Tag of a derived layout; a kernel refuses a buffer whose tag is not the one it wants.
struct PanelTag {
  uint32_t magic = 0x4C504441u;  // "ADPL"
  uint8_t version = 1;
  PanelKind kind = PanelKind::Panels;
  uint8_t bits = 8;  // bits per stored weight
  uint8_t reserved = 0;
  bool operator==(const PanelTag&) const = default;
};

/// How one group's reduction is cut into steps of 64 bytes of packed activations.
///
/// A pixel occupies `pitch` bytes: the channels of the group rounded up to 4, 8, 16 or 32, or 64
/// with `channel_blocks` planes. Where a pixel is narrower than 64 bytes and the dilation is 1, one
/// step spans `taps` neighbouring columns of the kernel.
struct ReductionPlan {
  int64_t pitch = 0;
  int64_t channel_blocks = 0;
  int64_t taps = 0;
  int64_t column_groups = 0;  // ceil(kernel_w / taps)
  int64_t steps = 0;          // channel_blocks * kernel_h * column_groups
};
ReductionPlan plan_reduction(const ConvShape& shape);

/// Derived weights of one layer.
struct Panels {
  PanelTag tag;
  ReductionPlan reduction;
  int64_t groups = 1;
  int64_t column_tiles = 0;          // ceil(group_out / 16), per group
  int64_t tile_bytes = 0;            // 128 * tag.bits
  AlignedBuffer data;                // [groups][column_tiles][steps] tiles, or depthwise pairs
  std::vector<int32_t> weight_sums;  // [out_channels], for the zero-point correction
  std::vector<uint8_t> live_quads;   // [steps]: groups of 4 bytes that hold weights (VNNI, AVX2)

  const uint8_t* tile(int64_t group, int64_t column_tile) const {
    return data.data() + (group * column_tiles + column_tile) * reduction.steps * tile_bytes;
  }
  size_t bytes() const { return data.size() + weight_sums.size() * 4 + live_quads.size(); }
};

/// Builds the panels of `shape` from int8 weights [O][I/groups][KH][KW] at `bits` per weight.
Panels build_panels(const ConvShape& shape, std::span<const int8_t> weights, int bits);

/// Depthwise layout: int16 pairs of kernel taps, [ceil(taps/2)][ceil16(channels)][2].
Panels build_depthwise(const ConvShape& shape, std::span<const int8_t> weights);

/// Planar packing of one 1024-byte tile to 128 * bits bytes.
void pack_tile(const int8_t* tile, int bits, uint8_t* out);

/// Scalar inverse of the planar tile packing: `count` tiles of 128*bits bytes to 1024 bytes each.
void unpack_tiles_scalar(const uint8_t* packed, int bits, int64_t count, int8_t* out);

}  // namespace adalayer::formats

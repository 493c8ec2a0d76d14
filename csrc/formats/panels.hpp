// The unit of the weights that the matmul kernels read: derived from the canonical form, never
// saved. Index formulas: FORMATS.md, section "Panels".
#pragma once

#include <cstdint>

namespace adalayer::formats {

// One weight tile is 64 input values deep and 16 output channels wide: an AMX B tile, and 16
// VNNI registers. Everything below counts in these tiles.
constexpr int kTileDepth = 64;
constexpr int kTileWidth = 16;
constexpr int kTileBytes = kTileDepth * kTileWidth;  // unpacked, one byte per weight

/// Planar packing of one 1024-byte tile to 128 * bits bytes.
void pack_tile(const int8_t* tile, int bits, uint8_t* out);

/// Scalar inverse of the planar tile packing: `count` tiles of 128*bits bytes to 1024 bytes each.
void unpack_tiles_scalar(const uint8_t* packed, int bits, int64_t count, int8_t* out);

/// Bytes that readers of bitmask tiles may touch behind the last one.
constexpr int64_t kBitmaskSlack = 64;

/// Bytes of one tile as bitmask and nonzeros: 128 of mask, and what its nonzeros take.
int64_t bitmask_tile_bytes(const int8_t* tile, int bits);

/// Writes those bytes; returns their number.
int64_t pack_bitmask_tile(const int8_t* tile, int bits, uint8_t* out);

/// Scalar inverse for `count` tiles that follow one another.
void expand_tiles_scalar(const uint8_t* packed, int bits, int64_t count, int8_t* out);

}  // namespace adalayer::formats

// Weights of a product that is no convolution, as columns of tiles for gemm and gemv.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {

/// Tiles of `size` that hold n values.
constexpr int64_t tile_count(int64_t n, int64_t size) { return (n + size - 1) / size; }

/// Groups of 4 inputs that hold weights, of tile `step` in depth.
uint8_t live_quads(int64_t inputs, int64_t step);

/// Bytes of a column of `depth` tiles.
int64_t column_bytes(int64_t depth, int bits, const TileArrangement* arrangement);

/// Columns of tiles from weights [outputs][..], `row` elements apart, of which each output has
/// `inputs`. With an arrangement bits are 8 and levels at most qmax.
void pack_columns(const int8_t* weights, int64_t row, int64_t outputs, int64_t inputs, int bits,
                  const TileArrangement* arrangement, int qmax, uint8_t* to);

}  // namespace adalayer::cpu

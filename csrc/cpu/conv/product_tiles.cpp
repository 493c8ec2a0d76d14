#include "cpu/conv/product_tiles.hpp"

#include <algorithm>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "formats/panels.hpp"

namespace adalayer::cpu {

using formats::kTileBytes;
using formats::kTileDepth;
using formats::kTileWidth;

uint8_t live_quads(int64_t inputs, int64_t step) {
  return static_cast<uint8_t>((std::min<int64_t>(kTileDepth, inputs - step * kTileDepth) + 3) / 4);
}

int64_t column_bytes(int64_t depth, int bits, const TileArrangement* arrangement) {
  return depth * 128 * bits + (arrangement == nullptr ? 0 : arrangement->extra_bytes(depth));
}

void pack_columns(const int8_t* weights, int64_t row, int64_t outputs, int64_t inputs, int bits,
                  const TileArrangement* arrangement, int qmax, uint8_t* to) {
  const int64_t depth = tile_count(inputs, kTileDepth), columns = tile_count(outputs, kTileWidth);
  const int64_t bytes = column_bytes(depth, bits, arrangement);
  AlignedBuffer scratch;
  std::vector<uint8_t> quads;
  if (arrangement != nullptr) {
    scratch = AlignedBuffer(static_cast<size_t>(arrangement->scratch_bytes(depth)));
    for (int64_t step = 0; step < depth; ++step)
      quads.push_back(live_quads(inputs, step));
  }
  int8_t tile[kTileBytes];
  for (int64_t column = 0; column < columns; ++column, to += bytes) {
    for (int64_t step = 0; step < depth; ++step) {
      std::fill(std::begin(tile), std::end(tile), int8_t{0});
      for (int64_t k = 0; k < std::min<int64_t>(kTileDepth, inputs - step * kTileDepth); ++k)
        for (int64_t n = 0; n < std::min<int64_t>(kTileWidth, outputs - column * kTileWidth); ++n)
          tile[k / 4 * 64 + n * 4 + k % 4] =
              weights[(column * kTileWidth + n) * row + step * kTileDepth + k];
      formats::pack_tile(tile, bits, to + step * 128 * bits);
    }
    if (arrangement != nullptr)
      arrangement->arrange(reinterpret_cast<int8_t*>(to), depth, quads.data(), qmax,
                           scratch.data());
  }
}

}  // namespace adalayer::cpu

#include "formats/panels.hpp"

#include <cstring>

#include "formats/canonical.hpp"

namespace adalayer::formats {
namespace {

constexpr int kLanes = 64;  // bytes of one vector of weights within a tile

}  // namespace

// A stream of width g keeps 8/g vectors of 64 bytes in each chunk of 64 bytes, vector t of the
// chunk in bits [t*g, t*g + g). One shift and mask (or one gf2p8affineqb) then yields 64 weights at
// once.
void pack_tile(const int8_t* tile, int bits, uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, tile, kTileBytes);
    return;
  }
  int shift = 0;
  for (int width : field_groups(bits)) {
    const int per_chunk = 8 / width;
    const int field_mask = (1 << width) - 1;
    for (int chunk = 0; chunk < kTileBytes / kLanes / per_chunk; ++chunk) {
      for (int lane = 0; lane < kLanes; ++lane) {
        int byte = 0;
        for (int t = 0; t < per_chunk; ++t) {
          const auto w = static_cast<uint8_t>(tile[(chunk * per_chunk + t) * kLanes + lane]);
          byte |= ((w >> shift) & field_mask) << (t * width);
        }
        *out++ = static_cast<uint8_t>(byte);
      }
    }
    shift += width;
  }
}

void unpack_tiles_scalar(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  for (int64_t i = 0; i < count; ++i, packed += kTileBytes / 8 * bits, out += kTileBytes) {
    if (bits == 8) {
      std::memcpy(out, packed, kTileBytes);
      continue;
    }
    uint8_t fields[kTileBytes] = {};
    const uint8_t* stream = packed;
    int shift = 0;
    for (int width : field_groups(bits)) {
      const int per_chunk = 8 / width;
      const int field_mask = (1 << width) - 1;
      for (int v = 0; v < kTileBytes / kLanes; ++v)
        for (int lane = 0; lane < kLanes; ++lane)
          fields[v * kLanes + lane] |= static_cast<uint8_t>(
              ((stream[v / per_chunk * kLanes + lane] >> (v % per_chunk * width)) & field_mask)
              << shift);
      stream += kTileBytes / 8 * width;
      shift += width;
    }
    const int sign = 1 << (bits - 1);
    for (int v = 0; v < kTileBytes; ++v)
      out[v] = static_cast<int8_t>((fields[v] ^ sign) - sign);
  }
}

}  // namespace adalayer::formats

#include "formats/panels.hpp"

#include <algorithm>
#include <cstring>
#include <span>

#include "formats/canonical.hpp"

namespace adalayer::formats {
namespace {

constexpr int kLanes = 64;  // bytes of one vector of weights within a tile
constexpr int kVectors = kTileBytes / kLanes;

/// The streams of a bitmask tile: those of the planar one, but whole bytes at 8 bits.
std::span<const int> bitmask_streams(int bits) {
  static constexpr int kWhole[] = {8};
  return bits == 8 ? std::span<const int>(kWhole) : field_groups(bits);
}

int nonzeros(const int8_t* vector) {
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    count += vector[lane] != 0;
  return count;
}

/// Section k of a stream of width g holds the nonzeros of 2 * g vectors.
int section_bytes(const int* counts, int width, int section) {
  int bytes = 0;
  for (int v = 0; v < 2 * width; ++v)
    bytes += counts[section * 2 * width + v];
  return bytes;
}

/// Bytes of a stream: the nonzeros of its fullest section.
int stream_bytes(const int* counts, int width) {
  int most = 0;
  for (int section = 0; section < 8 / width; ++section)
    most = std::max(most, section_bytes(counts, width, section));
  return most;
}

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

int64_t bitmask_tile_bytes(const int8_t* tile, int bits) {
  int counts[kVectors];
  for (int v = 0; v < kVectors; ++v)
    counts[v] = nonzeros(tile + v * kLanes);
  int64_t bytes = kTileBytes / 8;
  for (int width : bitmask_streams(bits))
    bytes += 2 + stream_bytes(counts, width);
  return bytes;
}

int64_t pack_bitmask_tile(const int8_t* tile, int bits, uint8_t* out) {
  int counts[kVectors];
  for (int v = 0; v < kVectors; ++v)
    counts[v] = nonzeros(tile + v * kLanes);
  uint8_t* at = out;
  for (int width : bitmask_streams(bits)) {
    const auto bytes = static_cast<uint16_t>(stream_bytes(counts, width));
    std::memcpy(at, &bytes, 2);
    at += 2;
  }
  std::memset(at, 0, kTileBytes / 8);
  for (int i = 0; i < kTileBytes; ++i)
    if (tile[i] != 0) at[i / 8] |= static_cast<uint8_t>(1 << (i % 8));
  at += kTileBytes / 8;
  int shift = 0;
  for (int width : bitmask_streams(bits)) {
    const int bytes = stream_bytes(counts, width);
    std::memset(at, 0, static_cast<size_t>(bytes));
    for (int section = 0; section < 8 / width; ++section) {
      uint8_t* to = at;
      const int8_t* from = tile + section * 2 * width * kLanes;
      for (int i = 0; i < 2 * width * kLanes; ++i)
        if (from[i] != 0) {
          const int field = (static_cast<uint8_t>(from[i]) >> shift) & ((1 << width) - 1);
          *to++ |= static_cast<uint8_t>(field << (section * width));
        }
    }
    at += bytes;
    shift += width;
  }
  return at - out;
}

void expand_tiles_scalar(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  const std::span<const int> streams = bitmask_streams(bits);
  for (int64_t i = 0; i < count; ++i, out += kTileBytes) {
    const uint8_t* lengths = packed;
    const uint8_t* mask = packed + 2 * streams.size();
    const uint8_t* stream = mask + kTileBytes / 8;
    uint8_t fields[kTileBytes] = {};
    int shift = 0;
    for (int width : streams) {
      for (int section = 0; section < 8 / width; ++section) {
        const uint8_t* from = stream;
        for (int k = 0; k < 2 * width * kLanes; ++k) {
          const int at = section * 2 * width * kLanes + k;
          if (((mask[at / 8] >> (at % 8)) & 1) == 0) continue;
          const int field = (*from++ >> (section * width)) & ((1 << width) - 1);
          fields[at] |= static_cast<uint8_t>(field << shift);
        }
      }
      uint16_t bytes;
      std::memcpy(&bytes, lengths, 2);
      lengths += 2;
      stream += bytes;
      shift += width;
    }
    const int sign = 1 << (bits - 1);
    for (int at = 0; at < kTileBytes; ++at)
      out[at] = static_cast<int8_t>((fields[at] ^ sign) - sign);
    packed = stream;
  }
}

}  // namespace adalayer::formats

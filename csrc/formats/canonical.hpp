// Canonical packed weights: the device-neutral bytes that files, state_dicts and torch operators
// hold. Layout and index formulas: FORMATS.md, section "Canonical".
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace adalayer::formats {

constexpr uint32_t kCanonicalMagic = 0x574C4441u;  // "ADLW" in little-endian byte order
constexpr uint16_t kCanonicalVersion = 1;
constexpr int kMinBits = 2;
constexpr int kMaxBits = 8;

enum class Encoding : uint8_t { Dense = 0, Bitmask = 1, Blocks = 2 };

// A block of zeros that Encoding::Blocks leaves out: so many output channels times so many input
// channels at one kernel position, fewer at the edges. It is what the matmul kernels skip.
constexpr int kBlockOut = 16;
constexpr int kBlockIn = 64;

/// The first 64 bytes of a packed weight; all fields little-endian.
struct CanonicalHeader {
  uint32_t magic = kCanonicalMagic;
  uint16_t version = kCanonicalVersion;
  uint8_t encoding = 0;
  uint8_t bits = 0;
  uint32_t out_channels = 0;
  uint32_t group_in = 0;  // input channels per group
  uint32_t kernel_h = 0;
  uint32_t kernel_w = 0;
  uint64_t stored = 0;         // weights in the field streams: all, the nonzeros, or the blocks'
  uint64_t payload_bytes = 0;  // bytes after the header
  uint64_t content_hash = 0;   // of the 40 bytes above and the payload
  uint8_t reserved[16] = {};

  int64_t count() const {
    return static_cast<int64_t>(out_channels) * group_in * kernel_h * kernel_w;
  }
  /// Blocks of kBlockOut x kBlockIn weights.
  int64_t blocks() const {
    return (static_cast<int64_t>(out_channels) + kBlockOut - 1) / kBlockOut *
           ((static_cast<int64_t>(group_in) + kBlockIn - 1) / kBlockIn) * kernel_h * kernel_w;
  }
};
static_assert(sizeof(CanonicalHeader) == 64, "the header is part of the file format");

/// The hash behind content_hash, for other stored bytes. Every change within eight neighbouring
/// bytes changes it.
uint64_t checksum(std::span<const uint8_t> bytes);

/// Widths of the field streams that make up `bits`, least significant first: 7 -> {4, 2, 1}.
std::span<const int> field_groups(int bits);

/// Bytes of the field streams for n stored weights.
int64_t fields_bytes(int64_t n, int bits);

/// Packs int8 weights [O][I][KH][KW]; picks the smallest encoding, on ties dense, then blocks.
/// Throws InvalidArgument if a weight lies outside [-2^(bits-1), 2^(bits-1) - 1].
std::vector<uint8_t> pack_canonical(std::span<const int8_t> weights, int bits,
                                    uint32_t out_channels, uint32_t group_in, uint32_t kernel_h,
                                    uint32_t kernel_w);

/// Reads and checks the header against the buffer's size (not the payload's hash).
/// Throws CorruptData saying what is wrong.
CanonicalHeader read_header(std::span<const uint8_t> packed);

/// The bit-planes of packed weights that are read: all of them, or (`bits` not 0) so many above the
/// `drop` lowest ones, by upper_planes() of reference/spec.hpp.
struct Planes {
  int bits = 0;
  int drop = 0;

  bool all() const { return bits == 0; }
};

/// Throws InvalidArgument unless `planes` are among `stored` ones.
void check_planes(const Planes& planes, int stored);

/// Checks the content hash and returns the int8 weights [O][I][KH][KW]. Throws CorruptData, and
/// InvalidArgument for planes that are not there.
std::vector<int8_t> unpack_canonical(std::span<const uint8_t> packed, const Planes& planes = {});

}  // namespace adalayer::formats

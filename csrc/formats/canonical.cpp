#include "formats/canonical.hpp"

#include <array>
#include <bit>
#include <cstring>
#include <string>

#include "core/status.hpp"
#include "reference/spec.hpp"

namespace adalayer::formats {

static_assert(std::endian::native == std::endian::little, "packed weights are little-endian");

namespace {

constexpr size_t kHashedHeaderBytes = offsetof(CanonicalHeader, content_hash);

/// 64-bit content hash: eight bytes a step, multiply and rotate, with a final avalanche. It guards
/// against damage and keys the cache of derived layouts; it is no defence against forgery.
uint64_t hash_bytes(const uint8_t* data, size_t size, uint64_t seed) {
  constexpr uint64_t kMul = 0x9E3779B97F4A7C15ull;
  uint64_t h = seed ^ (size * kMul);
  size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    h = std::rotl((h ^ word) * kMul, 29);
  }
  uint64_t tail = 0;
  std::memcpy(&tail, data + i, size - i);
  h = (h ^ tail) * kMul;
  h ^= h >> 32;
  h *= 0xD6E8FEB86659FD93ull;
  return h ^ (h >> 29);
}

uint64_t content_hash(const CanonicalHeader& header, const uint8_t* payload) {
  uint8_t bytes[sizeof(CanonicalHeader)];
  std::memcpy(bytes, &header, sizeof bytes);
  return hash_bytes(payload, header.payload_bytes, hash_bytes(bytes, kHashedHeaderBytes, 0));
}

void check_bits(int bits) {
  if (bits < kMinBits || bits > kMaxBits)
    throw InvalidArgument("weight bits must be 2 to 8, got " + std::to_string(bits));
}

/// Writes one field stream: field i of width g at byte i*g/8, bit (i*g)%8. g divides 8.
class FieldWriter {
 public:
  FieldWriter(uint8_t* out, int width) : out_(out), width_(width) {}
  void put(uint32_t field) {
    out_[bit_ >> 3] |= static_cast<uint8_t>(field << (bit_ & 7));
    bit_ += width_;
  }

 private:
  uint8_t* out_;
  int width_;
  uint64_t bit_ = 0;
};

int64_t stream_bytes(int64_t n, int width) { return (n * width + 7) / 8; }

/// Bytes of the mask in front of the streams.
int64_t mask_bytes(const CanonicalHeader& h, Encoding encoding) {
  switch (encoding) {
    case Encoding::Bitmask:
      return (h.count() + 7) / 8;
    case Encoding::Blocks:
      return (h.blocks() + 7) / 8;
    default:
      return 0;
  }
}

/// fn(flat weight, block) for all weights in order.
template <class Fn>
void for_weights(const CanonicalHeader& h, const Fn& fn) {
  const int64_t area = static_cast<int64_t>(h.kernel_h) * h.kernel_w, ins = h.group_in;
  const int64_t across = (ins + kBlockIn - 1) / kBlockIn;
  int64_t flat = 0;
  for (int64_t o = 0; o < h.out_channels; ++o)
    for (int64_t i = 0; i < ins; ++i)
      for (int64_t k = 0; k < area; ++k, ++flat)
        fn(flat, (o / kBlockOut * across + i / kBlockIn) * area + k);
}

/// [blocks] whether a block holds anything but zeros.
std::vector<uint8_t> live_blocks(const CanonicalHeader& h, std::span<const int8_t> weights) {
  std::vector<uint8_t> live(static_cast<size_t>(h.blocks()), 0);
  for_weights(h, [&](int64_t i, int64_t block) {
    live[block] = static_cast<uint8_t>(live[block] | (weights[i] != 0));
  });
  return live;
}

int64_t weights_in_blocks(const CanonicalHeader& h, std::span<const uint8_t> live) {
  int64_t count = 0;
  for_weights(h, [&](int64_t, int64_t block) { count += live[block]; });
  return count;
}

}  // namespace

uint64_t checksum(std::span<const uint8_t> bytes) {
  return hash_bytes(bytes.data(), bytes.size(), 0);
}

std::span<const int> field_groups(int bits) {
  check_bits(bits);
  static constexpr std::array<int, 2> k8{4, 4};
  static constexpr std::array<int, 3> k7{4, 2, 1};
  static constexpr std::array<int, 2> k6{4, 2};
  static constexpr std::array<int, 2> k5{4, 1};
  static constexpr std::array<int, 1> k4{4};
  static constexpr std::array<int, 2> k3{2, 1};
  static constexpr std::array<int, 1> k2{2};
  switch (bits) {
    case 8:
      return k8;
    case 7:
      return k7;
    case 6:
      return k6;
    case 5:
      return k5;
    case 4:
      return k4;
    case 3:
      return k3;
    default:
      return k2;
  }
}

int64_t fields_bytes(int64_t n, int bits) {
  int64_t total = 0;
  for (int width : field_groups(bits))
    total += stream_bytes(n, width);
  return total;
}

std::vector<uint8_t> pack_canonical(std::span<const int8_t> weights, int bits,
                                    uint32_t out_channels, uint32_t group_in, uint32_t kernel_h,
                                    uint32_t kernel_w) {
  check_bits(bits);
  CanonicalHeader header;
  header.bits = static_cast<uint8_t>(bits);
  header.out_channels = out_channels;
  header.group_in = group_in;
  header.kernel_h = kernel_h;
  header.kernel_w = kernel_w;
  const int64_t n = static_cast<int64_t>(weights.size());
  if (n == 0 || n != header.count())
    throw InvalidArgument("expected " + std::to_string(header.count()) +
                          " weights (and at least one), got " + std::to_string(n));
  const int lo = -(1 << (bits - 1)), hi = (1 << (bits - 1)) - 1;
  int64_t nonzeros = 0;
  for (int8_t w : weights) {
    if (w < lo || w > hi)
      throw InvalidArgument("weight " + std::to_string(w) + " does not fit in " +
                            std::to_string(bits) + " bits (" + std::to_string(lo) + " to " +
                            std::to_string(hi) + ")");
    nonzeros += w != 0;
  }
  const std::vector<uint8_t> live = live_blocks(header, weights);
  const int64_t in_blocks = weights_in_blocks(header, live);
  // The smallest; the first of equal ones.
  struct Form {
    Encoding encoding;
    int64_t stored;
  };
  const auto payload_of = [&](const Form& form) {
    return mask_bytes(header, form.encoding) + fields_bytes(form.stored, bits);
  };
  Form best{Encoding::Dense, n};
  for (const Form& form : {Form{Encoding::Blocks, in_blocks}, Form{Encoding::Bitmask, nonzeros}})
    if (payload_of(form) < payload_of(best)) best = form;
  header.encoding = static_cast<uint8_t>(best.encoding);
  header.stored = static_cast<uint64_t>(best.stored);
  header.payload_bytes = static_cast<uint64_t>(payload_of(best));

  std::vector<uint8_t> packed(sizeof header + header.payload_bytes, 0);
  uint8_t* payload = packed.data() + sizeof header;
  uint8_t* stream = payload + mask_bytes(header, best.encoding);
  const auto set = [payload](int64_t i) { payload[i >> 3] |= static_cast<uint8_t>(1u << (i & 7)); };
  std::vector<int8_t> kept;  // unless all are
  if (best.encoding == Encoding::Bitmask) {
    for (int64_t i = 0; i < n; ++i)
      if (weights[i] != 0) {
        set(i);
        kept.push_back(weights[i]);
      }
  } else if (best.encoding == Encoding::Blocks) {
    for (size_t k = 0; k < live.size(); ++k)
      if (live[k]) set(static_cast<int64_t>(k));
    for_weights(header, [&](int64_t i, int64_t block) {
      if (live[block]) kept.push_back(weights[i]);
    });
  }
  const std::span<const int8_t> stored =
      best.encoding == Encoding::Dense ? weights : std::span<const int8_t>(kept);
  int shift = 0;
  for (int width : field_groups(bits)) {
    FieldWriter writer(stream, width);
    const uint32_t field_mask = (1u << width) - 1;
    for (int8_t w : stored)
      writer.put((static_cast<uint8_t>(w) >> shift) & field_mask);
    stream += stream_bytes(static_cast<int64_t>(header.stored), width);
    shift += width;
  }
  header.content_hash = content_hash(header, payload);
  std::memcpy(packed.data(), &header, sizeof header);
  return packed;
}

CanonicalHeader read_header(std::span<const uint8_t> packed) {
  const auto corrupt = [](const std::string& what) { throw CorruptData("packed weight: " + what); };
  CanonicalHeader h;
  if (packed.size() < sizeof h)
    corrupt("expected at least 64 bytes, got " + std::to_string(packed.size()));
  std::memcpy(&h, packed.data(), sizeof h);
  if (h.magic != kCanonicalMagic) corrupt("the magic number is wrong");
  if (h.version != kCanonicalVersion)
    corrupt("format version " + std::to_string(h.version) + " is not supported (expected " +
            std::to_string(kCanonicalVersion) + ")");
  if (h.bits < kMinBits || h.bits > kMaxBits)
    corrupt("bits must be 2 to 8, got " + std::to_string(h.bits));
  if (h.encoding > static_cast<uint8_t>(Encoding::Blocks))
    corrupt("unknown encoding " + std::to_string(h.encoding));
  for (uint8_t byte : h.reserved)
    if (byte != 0) corrupt("reserved header bytes are not zero");
  // The count is bounded factor by factor, so that a forged header cannot overflow the product.
  constexpr uint64_t kMaxCount = uint64_t{1} << 36;
  uint64_t count = 1;
  for (uint64_t factor : {h.out_channels, h.group_in, h.kernel_h, h.kernel_w}) {
    if (factor == 0) corrupt("a dimension is zero");
    if (factor > kMaxCount / count) corrupt("the dimensions are too large");
    count *= factor;
  }
  const auto encoding = static_cast<Encoding>(h.encoding);
  if (h.stored > count || (encoding == Encoding::Dense && h.stored != count))
    corrupt("the header stores " + std::to_string(h.stored) + " of " + std::to_string(count) +
            " weights");
  const int64_t expected =
      fields_bytes(static_cast<int64_t>(h.stored), h.bits) + mask_bytes(h, encoding);
  if (h.payload_bytes != static_cast<uint64_t>(expected) ||
      packed.size() != sizeof h + h.payload_bytes)
    corrupt("expected " + std::to_string(expected) + " payload bytes, header says " +
            std::to_string(h.payload_bytes) + ", buffer has " +
            std::to_string(packed.size() - sizeof h));
  return h;
}

void check_planes(const Planes& planes, int stored) {
  if (planes.all() && planes.drop == 0) return;
  if (planes.bits < kMinBits || planes.drop < 0 || planes.bits > stored ||
      planes.drop > stored - planes.bits)
    throw InvalidArgument("expected 2 to " + std::to_string(stored) + " planes of " +
                          std::to_string(stored) + ", got " + std::to_string(planes.bits) +
                          " above " + std::to_string(planes.drop));
}

namespace {

std::vector<int8_t> unpack_all(std::span<const uint8_t> packed, const CanonicalHeader& h) {
  const uint8_t* payload = packed.data() + sizeof h;
  if (content_hash(h, payload) != h.content_hash)
    throw CorruptData("packed weight: the content hash does not match, the data is damaged");
  const int64_t n = h.count();
  const auto stored = static_cast<int64_t>(h.stored);
  const auto encoding = static_cast<Encoding>(h.encoding);
  const uint8_t* stream = payload + mask_bytes(h, encoding);

  std::vector<uint8_t> fields(static_cast<size_t>(stored), 0);
  int shift = 0;
  for (int width : field_groups(h.bits)) {
    const uint32_t field_mask = (1u << width) - 1;
    for (int64_t i = 0; i < stored; ++i) {
      const uint64_t bit = static_cast<uint64_t>(i) * width;
      fields[i] |= static_cast<uint8_t>(((stream[bit >> 3] >> (bit & 7)) & field_mask) << shift);
    }
    stream += stream_bytes(stored, width);
    shift += width;
  }
  const int sign = 1 << (h.bits - 1);
  const auto signed_value = [sign](uint8_t field) {
    return static_cast<int8_t>((field ^ sign) - sign);
  };
  std::vector<int8_t> weights(static_cast<size_t>(n), 0);
  if (encoding == Encoding::Dense) {
    for (int64_t i = 0; i < n; ++i)
      weights[i] = signed_value(fields[i]);
    return weights;
  }
  int64_t next = 0;
  for_weights(h, [&](int64_t i, int64_t block) {
    const int64_t bit = encoding == Encoding::Blocks ? block : i;
    if (!((payload[bit >> 3] >> (bit & 7)) & 1)) return;
    if (next == stored)
      throw CorruptData("packed weight: the mask has more ones than stored weights");
    weights[i] = signed_value(fields[next++]);
  });
  if (next != stored)
    throw CorruptData("packed weight: the mask has fewer ones than stored weights");
  return weights;
}

}  // namespace

std::vector<int8_t> unpack_canonical(std::span<const uint8_t> packed, const Planes& planes) {
  const CanonicalHeader h = read_header(packed);
  check_planes(planes, h.bits);
  std::vector<int8_t> weights = unpack_all(packed, h);
  if (!planes.all())
    for (int8_t& w : weights)
      w = upper_planes(w, planes.bits, planes.drop);
  return weights;
}

}  // namespace adalayer::formats

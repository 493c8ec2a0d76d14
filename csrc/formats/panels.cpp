#include "formats/panels.hpp"

#include <algorithm>
#include <cstring>

#include "core/status.hpp"
#include "formats/canonical.hpp"

namespace adalayer::formats {
namespace {

constexpr int kLanes = 64;  // bytes of one vector of weights within a tile

std::vector<int32_t> sum_weights(const ConvShape& shape, std::span<const int8_t> weights) {
  std::vector<int32_t> sums(static_cast<size_t>(shape.out_channels), 0);
  const int64_t k = shape.reduction();
  for (int64_t o = 0; o < shape.out_channels; ++o)
    for (int64_t i = 0; i < k; ++i)
      sums[o] += weights[o * k + i];
  return sums;
}

void check_count(const ConvShape& shape, std::span<const int8_t> weights) {
  if (static_cast<int64_t>(weights.size()) != shape.out_channels * shape.reduction())
    throw InvalidArgument("panels: the weights do not match the layer's shape");
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

ReductionPlan plan_reduction(const ConvShape& shape) {
  ReductionPlan plan;
  const int64_t channels = shape.group_in();
  plan.pitch = kTileDepth;
  for (int64_t pitch : {4, 8, 16, 32}) {
    if (channels <= pitch) {
      plan.pitch = pitch;
      break;
    }
  }
  plan.channel_blocks = (channels + kTileDepth - 1) / kTileDepth;
  plan.taps = shape.dilation_w == 1 ? kTileDepth / plan.pitch : 1;
  plan.taps = std::min(plan.taps, shape.kernel_w);
  plan.column_groups = (shape.kernel_w + plan.taps - 1) / plan.taps;
  plan.steps = plan.channel_blocks * shape.kernel_h * plan.column_groups;
  return plan;
}

Panels build_panels(const ConvShape& shape, std::span<const int8_t> weights, int bits) {
  check_count(shape, weights);
  Panels panels;
  panels.tag.kind = PanelKind::Panels;
  panels.tag.bits = static_cast<uint8_t>(bits);
  panels.reduction = plan_reduction(shape);
  panels.groups = shape.groups;
  panels.column_tiles = (shape.group_out() + kTileWidth - 1) / kTileWidth;
  panels.tile_bytes = kTileBytes / 8 * panels.tag.bits;
  panels.weight_sums = sum_weights(shape, weights);

  const ReductionPlan& r = panels.reduction;
  const int64_t channels = shape.group_in(), outs = shape.group_out();
  const int64_t taps_area = shape.kernel_h * shape.kernel_w;
  panels.data = AlignedBuffer(
      static_cast<size_t>(panels.groups * panels.column_tiles * r.steps * panels.tile_bytes));
  uint8_t* out = panels.data.data();
  int8_t tile[kTileBytes];
  for (int64_t g = 0; g < panels.groups; ++g) {
    for (int64_t nt = 0; nt < panels.column_tiles; ++nt) {
      for (int64_t block = 0; block < r.channel_blocks; ++block) {
        for (int64_t ky = 0; ky < shape.kernel_h; ++ky) {
          for (int64_t cg = 0; cg < r.column_groups; ++cg) {
            std::memset(tile, 0, sizeof tile);
            for (int64_t depth = 0; depth < kTileDepth; ++depth) {
              const int64_t tap = depth / r.pitch;
              const int64_t kx = cg * r.taps + tap;
              const int64_t c = block * kTileDepth + depth % r.pitch;
              if (tap >= r.taps || kx >= shape.kernel_w || c >= channels) continue;
              for (int64_t n = 0; n < kTileWidth && nt * kTileWidth + n < outs; ++n) {
                const int64_t o = g * outs + nt * kTileWidth + n;
                tile[depth / 4 * 64 + n * 4 + depth % 4] =
                    weights[(o * channels + c) * taps_area + ky * shape.kernel_w + kx];
              }
            }
            pack_tile(tile, panels.tag.bits, out);
            out += panels.tile_bytes;
          }
        }
      }
    }
  }
  for (int64_t block = 0; block < r.channel_blocks; ++block) {
    for (int64_t ky = 0; ky < shape.kernel_h; ++ky) {
      for (int64_t cg = 0; cg < r.column_groups; ++cg) {
        const int64_t columns = std::min(r.taps, shape.kernel_w - cg * r.taps);
        const int64_t last = std::min<int64_t>(channels - block * kTileDepth, r.pitch);
        const int64_t depth = (columns - 1) * r.pitch + last;
        panels.live_quads.push_back(static_cast<uint8_t>((depth + 3) / 4));
      }
    }
  }
  return panels;
}

Panels build_depthwise(const ConvShape& shape, std::span<const int8_t> weights) {
  check_count(shape, weights);
  Panels panels;
  panels.tag.kind = PanelKind::Depthwise;
  panels.tag.bits = 8;
  panels.weight_sums = sum_weights(shape, weights);
  const int64_t taps = shape.kernel_h * shape.kernel_w;
  const int64_t padded = (shape.in_channels + 15) / 16 * 16;
  const int64_t pairs = (taps + 1) / 2;
  panels.data = AlignedBuffer(static_cast<size_t>(pairs * padded * 4));
  std::memset(panels.data.data(), 0, panels.data.size());
  for (int64_t c = 0; c < shape.in_channels; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      const auto w = static_cast<int16_t>(weights[c * taps + t]);
      std::memcpy(panels.data.data() + ((t / 2 * padded + c) * 2 + t % 2) * 2, &w, 2);
    }
  }
  return panels;
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

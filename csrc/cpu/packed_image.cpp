#include "cpu/packed_image.hpp"

#include <cstring>

namespace adalayer::cpu {
namespace {

/// `count` pixels of kBytes each; the source's pixels lie `stride` apart. A constant size turns
/// memcpy into plain moves.
template <int kBytes>
void copy_pixels(const uint8_t* src, int64_t stride, int64_t count, uint8_t* dst) {
  for (int64_t x = 0; x < count; ++x)
    std::memcpy(dst + x * kBytes, src + x * stride, kBytes);
}

void copy_pixels_any(const uint8_t* src, int64_t stride, int64_t count, int64_t pitch,
                     uint8_t* dst) {
  if (stride == pitch) {
    std::memcpy(dst, src, static_cast<size_t>(count * pitch));
    return;
  }
  switch (pitch) {
    case 4:
      return copy_pixels<4>(src, stride, count, dst);
    case 8:
      return copy_pixels<8>(src, stride, count, dst);
    case 16:
      return copy_pixels<16>(src, stride, count, dst);
    case 32:
      return copy_pixels<32>(src, stride, count, dst);
    case 64:
      return copy_pixels<64>(src, stride, count, dst);
    default:
      for (int64_t x = 0; x < count; ++x)
        std::memcpy(dst + x * pitch, src + x * stride, static_cast<size_t>(pitch));
  }
}

/// Levels of one input row as [w][channels]: in place, or quantized into `scratch`.
const uint8_t* row_levels(const ConvShape& s, const ActivationIn& in, const KernelRow& kernels,
                          int64_t n, int64_t y, uint8_t* scratch) {
  const int64_t plane = s.in_h * s.in_w;
  const int64_t planar = n * s.in_channels * plane + y * s.in_w;
  const int64_t interleaved = (n * s.in_h + y) * s.in_w * s.in_channels;
  if (in.dtype == DType::F32) {
    const auto* x = static_cast<const float*>(in.data);
    if (in.layout == Layout::NHWC)
      kernels.quantize_row(x + interleaved, s.in_w * s.in_channels, in.grid, scratch);
    else
      kernels.quantize_planar(x + planar, plane, s.in_channels, s.in_w, in.grid, scratch);
  } else {
    const auto* q = static_cast<const uint8_t*>(in.data);
    if (in.layout == Layout::NHWC) {
      std::memcpy(scratch, q + interleaved, static_cast<size_t>(s.in_w * s.in_channels));
    } else {
      for (int64_t c = 0; c < s.in_channels; ++c)
        for (int64_t x = 0; x < s.in_w; ++x)
          scratch[x * s.in_channels + c] = q[planar + c * plane + x];
    }
  }
  return scratch;
}

}  // namespace

void pack_row(const ConvShape& s, const ActivationIn& in, const KernelRow& kernels,
              const PackedImage& image, int64_t n, int64_t padded_row, uint8_t* packed,
              uint8_t* scratch) {
  const int zero_point = in.grid.zero_point;
  const int64_t y = padded_row - s.pad_top;
  const bool inside = y >= 0 && y < s.in_h && image.copied > 0;
  const uint8_t* levels = inside ? row_levels(s, in, kernels, n, y, scratch) : nullptr;
  const int64_t left = inside ? std::min(s.pad_left, image.columns) : image.columns;
  const int64_t channels = s.in_channels / image.groups;
  uint8_t* row = packed + image.row_offset(padded_row);
  for (int64_t g = 0; g < image.groups; ++g) {
    for (int64_t b = 0; b < image.blocks; ++b) {
      uint8_t* dst = row + g * image.group_bytes + b * image.block_bytes;
      std::memset(dst, zero_point, static_cast<size_t>(left * image.pitch));
      if (!inside) continue;
      // Where the pitch exceeds the channels, a pixel takes some bytes of its neighbour along; the
      // weights are zero there.
      copy_pixels_any(levels + g * channels + b * image.pitch, s.in_channels, image.copied,
                      image.pitch, dst + left * image.pitch);
      const int64_t done = left + image.copied;
      std::memset(dst + done * image.pitch, zero_point,
                  static_cast<size_t>((image.columns - done) * image.pitch));
    }
  }
}

}  // namespace adalayer::cpu

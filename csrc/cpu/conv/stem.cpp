#include "cpu/conv/stem.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/aligned_buffer.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

constexpr int64_t kStemChannels = 4;

struct Grouping {
  int64_t rows, step, kernel_rows;
};

int64_t steps(const ConvShape& s, const Grouping& g) {
  const int64_t bytes = s.kernel_w * pixel_pitch(kStemChannels * g.rows);
  return g.kernel_rows * ((bytes + 63) / 64);
}

/// All rows of the kernel in one group (groups overlap), or as many as the stride.
Grouping best_grouping(const ConvShape& s) {
  const Grouping overlapping{s.kernel_h, s.stride_h, 1};
  const Grouping disjoint{s.stride_h, s.stride_h, (s.kernel_h + s.stride_h - 1) / s.stride_h};
  const int64_t a = steps(s, overlapping), b = steps(s, disjoint);
  // At equal steps the one that is smaller in memory.
  return a < b ? overlapping : disjoint;
}

/// The pixels of image row `y`, channels side by side.
void level_pixels(const Stem& stem, const KernelRow* kernels, const ActivationIn& in, int64_t y,
                  uint8_t* pixels) {
  const int64_t c = stem.channels, w = stem.in_w, plane = stem.in_h * w;
  const ActivationGrid& grid = in.grid;
  if (in.dtype == DType::U8) {
    const auto* q = static_cast<const uint8_t*>(in.data);
    if (in.layout == Layout::NHWC) {
      std::memcpy(pixels, q + y * w * c, static_cast<size_t>(w * c));
      return;
    }
    for (int64_t k = 0; k < c; ++k)
      for (int64_t i = 0; i < w; ++i)
        pixels[i * c + k] = q[k * plane + y * w + i];
    return;
  }
  const auto* x = static_cast<const float*>(in.data);
  if (in.layout == Layout::NHWC) {
    const float* row = x + y * w * c;
    if (kernels != nullptr)
      kernels->quantize_row(row, w * c, grid, pixels);
    else
      for (int64_t i = 0; i < w * c; ++i)
        pixels[i] = quantize_value(row[i], grid);
  } else if (kernels != nullptr) {
    kernels->quantize_planar(x + y * w, plane, c, w, grid, pixels);
  } else {
    for (int64_t i = 0; i < w; ++i)
      for (int64_t k = 0; k < c; ++k)
        pixels[i * c + k] = quantize_value(x[k * plane + y * w + i], grid);
  }
}

/// Padded row `p` without gaps between pixels.
void dense_line(const Stem& stem, const KernelRow* kernels, const ActivationIn& in, int64_t p,
                uint8_t* out) {
  const int64_t y = p - stem.pad_top, bytes = stem.layout.row_bytes;
  const auto zero = static_cast<uint8_t>(in.grid.zero_point);
  if (y < 0 || y >= stem.in_h) {
    std::fill_n(out, bytes, zero);
    return;
  }
  const int64_t left = stem.pad_left * stem.channels, image = stem.in_w * stem.channels;
  std::fill_n(out, left, zero);
  level_pixels(stem, kernels, in, y, out + left);
  std::fill(out + left + image, out + bytes, zero);
}

/// Padded row `p` as one dword of four channels per padded column.
void dword_line(const Stem& stem, const KernelRow* kernels, const ActivationIn& in, int64_t p,
                uint8_t* pixels, uint32_t* line) {
  const int64_t columns = stem.layout.columns, y = p - stem.pad_top;
  const uint32_t zero = static_cast<uint32_t>(in.grid.zero_point) * 0x01010101u;
  if (y < 0 || y >= stem.in_h) {
    std::fill_n(line, columns, zero);
    return;
  }
  const int64_t c = stem.channels, w = stem.in_w, plane = stem.in_h * w;
  const bool planes = in.dtype == DType::F32 && in.layout == Layout::NCHW;
  std::fill_n(line, stem.pad_left, zero);
  std::fill(line + stem.pad_left + w, line + columns, zero);
  if (planes && kernels != nullptr) {
    kernels->stem.quantize_quads(static_cast<const float*>(in.data) + y * w, plane, c, w, in.grid,
                                 line + stem.pad_left);
    return;
  }
  level_pixels(stem, kernels, in, y, pixels);
  uint32_t* out = line + stem.pad_left;
  if (c == 3) {
    // Four bytes are read of three; `pixels` has room after its end.
    for (int64_t i = 0; i < w; ++i) {
      uint32_t four;
      std::memcpy(&four, pixels + 3 * i, 4);
      out[i] = four & 0xFFFFFFu;
    }
  } else {
    for (int64_t i = 0; i < w; ++i) {
      uint32_t four = 0;
      std::memcpy(&four, pixels + c * i, static_cast<size_t>(c));
      out[i] = four;
    }
  }
}

template <int kRows, int kPitch>
void interleave(const uint32_t* const* lines, int64_t columns, uint8_t* out) {
  for (int64_t x = 0; x < columns; ++x) {
    uint32_t pixel[kPitch / 4] = {};
    for (int r = 0; r < kRows; ++r)
      pixel[r] = lines[r][x];
    std::memcpy(out + x * kPitch, pixel, kPitch);
  }
}

void interleave_any(const KernelRow* kernels, const uint32_t* const* lines, int64_t rows,
                    int64_t columns, int64_t pitch, uint8_t* out) {
  if (kernels != nullptr) {
    if (rows == 2) return kernels->stem.interleave_pairs(lines[0], lines[1], columns, out);
    if (rows == 3 || rows == 4) return kernels->stem.interleave_fours(lines, columns, out);
  }
  if (rows == 2) return interleave<2, 8>(lines, columns, out);
  if (rows == 3) return interleave<3, 16>(lines, columns, out);
  if (rows == 4) return interleave<4, 16>(lines, columns, out);
  for (int64_t x = 0; x < columns; ++x)
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(out + x * pitch + 4 * r, lines[r] + x, 4);
}

}  // namespace

bool stem_suits(const ConvShape& s) {
  return s.groups == 1 && s.in_channels <= kStemChannels && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.kernel_h > 1 && s.kernel_h <= 16;
}

Stem plan_stem(const ConvShape& s, Positions positions) {
  Stem stem;
  stem.dense = positions == Positions::Listed;
  const Grouping g = stem.dense ? Grouping{1, 1, s.kernel_h} : best_grouping(s);
  stem.rows = g.rows;
  stem.step = g.step;
  stem.kernel_rows = g.kernel_rows;
  stem.channels = s.in_channels;
  stem.in_h = s.in_h;
  stem.in_w = s.in_w;
  stem.pad_top = s.pad_top;
  stem.pad_left = s.pad_left;
  ConvShape& v = stem.shape;
  v.batch = 1;
  v.in_channels = stem.dense ? s.in_channels : kStemChannels * g.rows;
  v.stride_h = stem.dense ? s.stride_h : 1;
  v.in_h = (s.out_h() - 1) * v.stride_h + g.kernel_rows;
  v.in_w = std::max(s.pad_left + s.in_w, (s.out_w() - 1) * s.stride_w + s.kernel_w);
  v.out_channels = s.out_channels;
  v.kernel_h = g.kernel_rows;
  v.kernel_w = s.kernel_w;
  v.stride_w = s.stride_w;
  // The image may be wider than the windows reach; the padding to the right is part of in_w.
  v.pad_right = (s.out_w() - 1) * s.stride_w + s.kernel_w - v.in_w;
  stem.layout = image_layout(v.in_channels, v.in_h, v.in_w, {}, 1, stem.dense ? 1 : s.stride_w);
  if (stem.dense) {
    ImageLayout& l = stem.layout;
    l.pitch = s.in_channels;
    l.row_bytes = l.columns * l.pitch;
    l.image_bytes = (l.h * l.row_bytes + 63) / 64 * 64;
  }
  return stem;
}

std::vector<int8_t> stem_weights(const Stem& stem, const ConvShape& s,
                                 std::span<const int8_t> weights) {
  const ConvShape& v = stem.shape;
  std::vector<int8_t> out(static_cast<size_t>(v.out_channels * v.reduction()), 0);
  for (int64_t o = 0; o < s.out_channels; ++o)
    for (int64_t c = 0; c < s.in_channels; ++c)
      for (int64_t ky = 0; ky < s.kernel_h; ++ky)
        for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
          const int64_t channel = ky % stem.rows * kStemChannels + c, row = ky / stem.rows;
          out[((o * v.in_channels + channel) * v.kernel_h + row) * v.kernel_w + kx] =
              weights[((o * s.in_channels + c) * s.kernel_h + ky) * s.kernel_w + kx];
        }
  return out;
}

void pack_stem(const Stem& stem, const ActivationIn& in, uint8_t* out, Part part) {
  const KernelRow* kernels = active_kernels();
  if (stem.dense) {
    for (int64_t p = part.first(stem.layout.h); p < part.last(stem.layout.h); ++p)
      dense_line(stem, kernels, in, p, out + p * stem.layout.row_bytes);
    return;
  }
  thread_local AlignedBuffer scratch;
  const int64_t columns = stem.layout.columns, rows = stem.rows;
  const int64_t pixel_bytes = (stem.in_w * stem.channels + 64) / 64 * 64 + 64;
  const auto bytes = static_cast<size_t>(pixel_bytes + rows * columns * 4);
  if (scratch.size() < bytes) scratch.reset(bytes);
  auto* lines = reinterpret_cast<uint32_t*>(scratch.data() + pixel_bytes);
  // Line p lies in slot p % rows; groups ask for rising p, so a slot is overwritten when done with.
  std::array<int64_t, 16> held;
  held.fill(-1);
  for (int64_t g = part.first(stem.layout.h); g < part.last(stem.layout.h); ++g) {
    std::array<const uint32_t*, 16> group;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t p = g * stem.step + r, slot = p % rows;
      uint32_t* line = lines + slot * columns;
      if (held[slot] != p) dword_line(stem, kernels, in, p, scratch.data(), line);
      held[slot] = p;
      group[r] = line;
    }
    // The fourth byte group of three rows is read but means nothing.
    if (rows == 3) group[3] = group[0];
    interleave_any(kernels, group.data(), rows, columns, stem.layout.pitch,
                   out + g * stem.layout.row_bytes);
  }
}

}  // namespace adalayer::cpu

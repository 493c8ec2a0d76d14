// Pooling: windows over pixels. A row of outputs is cut into runs whose windows have one shape: the
// long run in the middle, and single outputs where the border cuts windows off.
#include <algorithm>

#include "cpu/image/ops.hpp"
#include "cpu/image/rows.hpp"

namespace adalayer::cpu {
namespace {

/// The positions of one window along one axis that lie inside the image.
struct Span {
  int64_t begin = 0, count = 0;
};

Span inside(int64_t o, int64_t stride, int64_t pad, int64_t kernel, int64_t dilation, int64_t in) {
  const int64_t start = o * stride - pad;
  const int64_t first = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const int64_t end = start >= in ? 0 : std::min(kernel, (in - 1 - start) / dilation + 1);
  if (end <= first) return {};
  return {start + first * dilation, end - first};
}

struct ForRowOffsets {};
struct ForRows {};

/// Byte offsets of a window's rows from the image's start.
const int64_t* row_offsets(const ImageLayout& l, const Span& rows, int64_t dilation) {
  auto* offsets = thread_scratch<int64_t, ForRowOffsets>(std::max<int64_t>(rows.count, 1));
  for (int64_t r = 0; r < rows.count; ++r)
    offsets[r] = l.offset(rows.begin + r * dilation, 0);
  return offsets;
}

/// Calls fn(x, count, columns) for runs of outputs in one row; the first one's window covers
/// `columns`.
template <class Fn>
void each_run_of_windows(const PoolSpec& s, int64_t dilation, int64_t in_w, int64_t out_w,
                         const Fn& fn) {
  const auto span = [&](int64_t x) {
    return inside(x, s.stride_w, s.pad_left, s.kernel_w, dilation, in_w);
  };
  for (int64_t x = 0; x < out_w;) {
    const Span columns = span(x);
    int64_t count = 1;
    if (columns.count == s.kernel_w)
      while (x + count < out_w && span(x + count).count == s.kernel_w)
        ++count;
    fn(x, count, columns);
    x += count;
  }
}

/// Channels [begin, begin + count) of every pixel, a part's share of a small image.
struct Channels {
  int64_t begin, count;
};

Channels share_of_channels(int64_t bytes, Part part) {
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (bytes + kBlock - 1) / kBlock;
  const int64_t begin = part.first(blocks) * kBlock;
  return {begin, std::min(part.last(blocks) * kBlock, bytes) - begin};
}

}  // namespace

void max_pool(const PoolSpec& spec, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  const int64_t bytes = common_bytes(in, out);
  const int64_t kh = spec.kernel_h, kw = spec.kernel_w;
  // Maxima down the columns first, then along the row, once that saves loads.
  const bool two_passes =
      kh > 1 && kw > 1 && spec.dilation_w == 1 && kh * kw > kh * spec.stride_w + kw + 1;
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y) {
    const Span rows = inside(y, spec.stride_h, spec.pad_top, kh, spec.dilation_h, a.h);
    const int64_t* offsets = row_offsets(a, rows, spec.dilation_h);
    const uint8_t* source = in.data;
    int64_t height = rows.count;
    if (two_passes && rows.count > 0) {
      uint8_t* maxima = thread_scratch<uint8_t, ForRows>(a.w * a.pitch);
      kernels.max_window({offsets, rows.count, 1, 0, 0, 0, 1, a.w * a.pitch}, in.data, maxima);
      static constexpr int64_t kStart[] = {0};
      offsets = kStart;
      source = maxima;
      height = 1;
    }
    const auto pool = [&](int64_t x, int64_t count, const Span& columns) {
      const bool empty = columns.count == 0 || height == 0;
      const Window window{offsets,
                          empty ? 0 : height,
                          columns.count,
                          spec.dilation_w * a.pitch,
                          spec.stride_w * a.pitch,
                          b.pitch,
                          count,
                          bytes};
      kernels.max_window(window, source + columns.begin * a.pitch, out.row(y) + x * b.pitch);
    };
    each_run_of_windows(spec, spec.dilation_w, a.w, b.w, pool);
  }
}

void avg_pool(const PoolSpec& spec, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  const int64_t bytes = common_bytes(in, out);
  // The window's positions inside the padded image.
  const auto padded = [](int64_t o, int64_t stride, int64_t before, int64_t kernel, int64_t size,
                         int64_t after) {
    const int64_t start = o * stride - before;
    return std::min(start + kernel, size + after) - start;
  };
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y) {
    const Span rows = inside(y, spec.stride_h, spec.pad_top, spec.kernel_h, 1, a.h);
    const int64_t* offsets = row_offsets(a, rows, 1);
    const int64_t padded_rows =
        padded(y, spec.stride_h, spec.pad_top, spec.kernel_h, a.h, spec.pad_bottom);
    const auto pool = [&](int64_t x, int64_t count, const Span& columns) {
      const int64_t valid = rows.count * columns.count;
      const int64_t divisor = spec.count_padding
                                  ? padded_rows * padded(x, spec.stride_w, spec.pad_left,
                                                         spec.kernel_w, a.w, spec.pad_right)
                                  : valid;
      const Average average{static_cast<int32_t>(valid * spec.zero_in),
                            spec.ratio / static_cast<float>(divisor), spec.finish};
      const Window window{offsets, rows.count, columns.count, a.pitch, spec.stride_w * a.pitch,
                          b.pitch, count,      bytes};
      kernels.average_window(window, average, in.data + columns.begin * a.pitch,
                             out.row(y) + x * b.pitch);
    };
    each_run_of_windows(spec, 1, a.w, b.w, pool);
    apply_table(kernels, spec.finish, out, y);
  }
}

void adaptive_avg_pool(const PoolSpec& spec, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  // A global average has one row: there, parts share the channels.
  const bool by_channels = b.h < part.count;
  Channels channels{0, common_bytes(in, out)};
  if (by_channels) channels = share_of_channels(channels.count, part);
  if (channels.count <= 0) return;
  const int64_t first = by_channels ? 0 : part.first(b.h);
  const int64_t last = by_channels ? b.h : part.last(b.h);
  for (int64_t y = first; y < last; ++y) {
    const int64_t top = adaptive_begin(y, a.h, b.h);
    const Span rows{top, adaptive_end(y, a.h, b.h) - top};
    const int64_t* offsets = row_offsets(a, rows, 1);
    for (int64_t x = 0; x < b.w; ++x) {
      const int64_t left = adaptive_begin(x, a.w, b.w);
      const int64_t width = adaptive_end(x, a.w, b.w) - left;
      const int64_t valid = rows.count * width;
      const Average average{static_cast<int32_t>(valid * spec.zero_in),
                            spec.ratio / static_cast<float>(valid), spec.finish};
      const Window window{offsets, rows.count, width, a.pitch, 0, 0, 1, channels.count};
      kernels.average_window(window, average, in.data + left * a.pitch + channels.begin,
                             out.row(y) + x * b.pitch + channels.begin);
    }
    apply_table(kernels, spec.finish, out, y, channels.begin, channels.count);
  }
}

}  // namespace adalayer::cpu

// Operations that move levels, and the resize of levels.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/image/ops.hpp"
#include "cpu/image/rows.hpp"

namespace adalayer::cpu {
namespace {

struct ForIndex {};
struct ForLow {};
struct ForSources {};
struct ForEnds {};

}  // namespace

// Sorts the lanes of every output block by the input block that they come from.
GatherPlan plan_gather(const int32_t* index, int64_t input, int64_t output) {
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (output + kBlock - 1) / kBlock;
  const int64_t input_blocks = (input + kBlock - 1) / kBlock;
  uint8_t* low = thread_scratch<uint8_t, ForLow>(blocks * kBlock);
  auto* ends = thread_scratch<int32_t, ForEnds>(blocks);
  // A block has at most 64 sources, and there are no more than input blocks.
  auto* sources = thread_scratch<GatherSource, ForSources>(blocks * std::min(kBlock, input_blocks));
  std::memset(low, 0, static_cast<size_t>(blocks * kBlock));
  int32_t end = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t begin = end;
    for (int64_t lane = 0; lane < kBlock && b * kBlock + lane < output; ++lane) {
      const int64_t from = index[b * kBlock + lane];
      const int64_t offset = from / kBlock * kBlock;
      low[b * kBlock + lane] = static_cast<uint8_t>(from % kBlock);
      int32_t s = begin;
      while (s < end && sources[s].offset != offset)
        ++s;
      if (s == end) {
        const int64_t left = input - offset;
        sources[end++] = {offset, left >= kBlock ? ~uint64_t{0} : (uint64_t{1} << left) - 1, 0};
      }
      sources[s].lanes |= uint64_t{1} << lane;
    }
    ends[b] = end;
  }
  bool interleaved = output % 2 == 0;
  for (int64_t c = 0; c < output / 2 && interleaved; ++c)
    interleaved = index[2 * c] == index[0] + c && index[2 * c + 1] == index[1] + c;
  return {index, interleaved, index[0], interleaved ? index[1] : 0, low, sources, ends};
}

void slice(int64_t axis, int64_t begin, int64_t step, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  if (axis == 0 && step != 1) {
    auto* index = thread_scratch<int32_t, ForIndex>(b.channels);
    for (int64_t c = 0; c < b.channels; ++c)
      index[c] = static_cast<int32_t>(begin + c * step);
    gather_channels(index, in, out, part);
    return;
  }
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y) {
    if (axis == 1) {
      const Pixels row = row_pixels(in, out, y);
      kernels.copy(
          {in.row(begin + y * step), row.in_step, row.out, row.out_step, row.bytes, row.count});
    } else if (axis == 0) {
      kernels.copy({in.row(y) + begin, a.pitch, out.row(y), b.pitch, b.channels, b.w});
    } else {
      kernels.copy(
          {in.pixel(y, begin), a.pitch * step, out.row(y), b.pitch, common_bytes(in, out), b.w});
    }
  }
}

void copy_piece(ConstImageView in, const uint8_t* table, ImageView out, int64_t axis, int64_t begin,
                Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  const int64_t top = axis == 1 ? begin : 0, left = axis == 1 ? 0 : begin;
  const int64_t first = std::max(part.first(b.h), top), last = std::min(part.last(b.h), top + a.h);
  for (int64_t y = first; y < last; ++y) {
    Pixels row{in.row(y - top), a.pitch, out.pixel(y, left), b.pitch, common_bytes(in, out), a.w};
    if (a.pitch == b.pitch) row = {row.in, 0, row.out, 0, a.w * a.pitch, 1};
    if (table == nullptr)
      kernels.copy(row);
    else
      kernels.lookup(table, row);
  }
}

void embedding(const EmbeddingSpec& spec, const int32_t* ids, ImageView out, Part part) {
  const ImageLayout& b = *out.layout;
  const auto bytes = static_cast<size_t>(spec.channels);
  // By pixels: a text is one row.
  for (int64_t i = part.first(b.h * b.w); i < part.last(b.h * b.w); ++i) {
    const int64_t row = std::clamp<int64_t>(ids[i], 0, spec.rows - 1);
    std::memcpy(out.pixel(i / b.w, i % b.w), spec.table + row * spec.channels, bytes);
  }
}

void gather_channels(const int32_t* index, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  const GatherPlan plan = plan_gather(index, a.channels, b.channels);
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y)
    kernels.gather(plan, {in.row(y), a.pitch, out.row(y), b.pitch, b.channels, b.w});
}

void pad(int64_t top, int64_t left, uint8_t level, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  const auto fill = [&](uint8_t* to, int64_t pixels) {
    if (pixels > 0) std::memset(to, level, static_cast<size_t>(pixels * b.pitch));
  };
  // Columns [begin, end) of the output come from the input; negative padding crops.
  const int64_t begin = std::min(std::max<int64_t>(left, 0), b.w);
  const int64_t end = std::max(std::min(left + a.w, b.w), begin);
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y) {
    uint8_t* row = out.row(y);
    if (y < top || y >= top + a.h) {
      fill(row, b.w);
      continue;
    }
    fill(row, begin);
    if (end > begin)
      kernels.copy({in.pixel(y - top, begin - left), a.pitch, row + begin * b.pitch, b.pitch,
                    common_bytes(in, out), end - begin});
    fill(row + end * b.pitch, b.w - end);
  }
}

void resize(const ResizeSpec& spec, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  const int64_t bytes = common_bytes(in, out);
  const int64_t first = part.first(b.h);
  const bool bounded = is_bounded(255.0 * std::fabs(static_cast<double>(spec.scale)) +
                                      std::fabs(static_cast<double>(spec.offset)),
                                  spec.finish);
  for (int64_t y = first; y < part.last(b.h); ++y) {
    if (spec.bilinear) {
      kernels.bilinear({in.row(spec.low_h[y]), in.row(spec.high_h[y]), a.pitch, &spec,
                        spec.part_h[y], bounded, out.row(y), b.pitch, b.w, bytes});
      apply_table(kernels, spec.finish, out, y);
    } else if (y > first && spec.low_h[y] == spec.low_h[y - 1]) {
      std::memcpy(out.row(y), out.row(y - 1), static_cast<size_t>(b.w * b.pitch));
    } else {
      kernels.copy({in.row(spec.low_h[y]), a.pitch, out.row(y), b.pitch, bytes, b.w, spec.low_w});
    }
  }
}

namespace {

/// c x h x w to one pixel, eight channels at a time: each pixel's eight levels go to eight planes.
void flatten(ConstImageView in, uint8_t* out, int64_t first, int64_t last) {
  const ImageLayout& l = *in.layout;
  const int64_t plane = l.h * l.w;
  for (int64_t c = first; c < last; c += 8) {
    const int64_t count = std::min<int64_t>(8, last - c);
    uint8_t* to = out + c * plane;
    for (int64_t y = 0; y < l.h; ++y) {
      const uint8_t* from = in.row(y) + c;
      for (int64_t x = 0; x < l.w; ++x, ++to, from += l.pitch) {
        if (count == 8) {
          for (int64_t k = 0; k < 8; ++k)
            to[k * plane] = from[k];
        } else {
          for (int64_t k = 0; k < count; ++k)
            to[k * plane] = from[k];
        }
      }
    }
  }
}

/// One position of an image in NCHW order.
struct Cursor {
  const ImageLayout& l;
  int64_t c, y, x;
  Cursor(const ImageLayout& layout, int64_t at)
      : l(layout), c(at / (layout.h * layout.w)), y(at / layout.w % layout.h), x(at % layout.w) {}
  bool flat() const { return l.h * l.w == 1; }
  int64_t offset() const { return l.offset(y, x) + c; }
  // A run within which the next position is `stride` bytes on.
  int64_t run() const { return flat() ? l.channels - c : l.w - x; }
  int64_t stride() const { return flat() ? 1 : l.pitch; }
  void advance(int64_t n) {
    if (flat()) {
      c += n;
      return;
    }
    x += n;
    if (x < l.w) return;
    x = 0;
    if (++y < l.h) return;
    y = 0;
    ++c;
  }
};

}  // namespace

void reshape(ConstImageView in, ImageView out, Part part) {
  const ImageLayout &a = *in.layout, &b = *out.layout;
  if (b.h * b.w == 1 && a.h * a.w > 1) {
    flatten(in, out.pixel(0, 0), part.first(a.channels), part.last(a.channels));
    return;
  }
  const int64_t count = b.channels * b.h * b.w;
  int64_t at = part.first(count);
  const int64_t last = part.last(count);
  Cursor from(a, at), to(b, at);
  while (at < last) {
    const int64_t run = std::min({from.run(), to.run(), last - at});
    const uint8_t* src = in.data + from.offset();
    uint8_t* dst = out.data + to.offset();
    const int64_t src_step = from.stride(), dst_step = to.stride();
    if (src_step == 1 && dst_step == 1) {
      std::memcpy(dst, src, static_cast<size_t>(run));
    } else {
      for (int64_t i = 0; i < run; ++i)
        dst[i * dst_step] = src[i * src_step];
    }
    from.advance(run);
    to.advance(run);
    at += run;
  }
}

}  // namespace adalayer::cpu

// Levels in any other order.
//
// An element's number in NCHW order is turned into its place in memory once per table, and not once
// per element: an image lies in memory as row offset + pixel offset + channel, each of them linear
// in its coordinate, so places may be added up like numbers as long as no coordinate carries over
// into the next one. Where channels alone change places, pixels are gathered as in a shuffle of
// channels.
#include <algorithm>
#include <cstring>

#include "cpu/image/ops.hpp"
#include "cpu/image/rows.hpp"

namespace adalayer::cpu {
namespace {

struct ForChannels {};
struct ForRows {};
struct ForColumns {};
struct ForIndex {};

/// Pixels that are written together, so that their levels are read from the same cache lines where
/// the channels of the output lie far apart in the input.
constexpr int64_t kBlock = 16;
/// Channels that are worth a copy of their own.
constexpr int64_t kShortRun = 8;

/// One table of a spec, and the places of its entries.
struct Table {
  const int32_t* index;
  int64_t count;
  int64_t* place;
  int64_t most_c = 0, most_y = 0, most_x = 0;

  void find(const ImageLayout& l) {
    const int64_t plane = l.h * l.w, origin = l.offset(0, 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = index[i] / plane, y = index[i] / l.w % l.h, x = index[i] % l.w;
      most_c = std::max(most_c, c);
      most_y = std::max(most_y, y);
      most_x = std::max(most_x, x);
      place[i] = l.offset(y, x) + c - origin;
    }
  }
  /// The end of the entries from `first` on whose places follow each other.
  int64_t run(int64_t first) const {
    int64_t end = first + 1;
    while (end < count && place[end] == place[first] + end - first)
      ++end;
    return end;
  }
};

/// Whether places may be added up: no coordinate carries, and rows lie equally far apart or only
/// one table moves them.
bool add_up(const ImageLayout& l, const Table& a, const Table& b, const Table& c) {
  const int moving = (a.most_y > 0) + (b.most_y > 0) + (c.most_y > 0);
  return a.most_c + b.most_c + c.most_c < l.channels && a.most_y + b.most_y + c.most_y < l.h &&
         a.most_x + b.most_x + c.most_x < l.w && (l.phases == 1 || moving <= 1);
}

/// Pixels as they are, wherever they go, with channels in the order of `channels`.
void by_channels(const Table& channels, const Table& rows, const Table& columns, ConstImageView in,
                 ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  auto* index = thread_scratch<int32_t, ForIndex>(b.channels);
  std::copy_n(channels.place, b.channels, index);
  // Rows and columns may begin at another channel: fewer lie behind those.
  const int64_t behind = a.channels - rows.most_c - columns.most_c;
  const GatherPlan plan = plan_gather(index, behind, b.channels);
  const uint8_t* origin = in.pixel(0, 0);
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y)
    for (int64_t x = 0, end = 0; x < b.w; x = end) {
      const int64_t step = x + 1 < b.w ? columns.place[x + 1] - columns.place[x] : 0;
      end = std::min(x + 2, b.w);
      while (end < b.w && columns.place[end] - columns.place[end - 1] == step)
        ++end;
      kernels.gather(plan, {origin + rows.place[y] + columns.place[x], step, out.pixel(y, x),
                            b.pitch, b.channels, end - x});
    }
}

void one_by_one(const RearrangeSpec& s, ConstImageView in, ImageView out, Part part) {
  const ImageLayout &a = *in.layout, &b = *out.layout;
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y)
    for (int64_t x = 0; x < b.w; ++x)
      for (int64_t c = 0; c < b.channels; ++c) {
        const int64_t at = int64_t{s.channel[c]} + s.row[y] + s.column[x];
        const int64_t from = a.offset(at / a.w % a.h, at % a.w) + at / (a.h * a.w);
        out.pixel(y, x)[c] = in.data[from];
      }
}

}  // namespace

void rearrange(const RearrangeSpec& s, ConstImageView in, ImageView out, Part part) {
  const ImageLayout &a = *in.layout, &b = *out.layout;
  Table channels{s.channel, b.channels, thread_scratch<int64_t, ForChannels>(b.channels)};
  Table rows{s.row, b.h, thread_scratch<int64_t, ForRows>(b.h)};
  Table columns{s.column, b.w, thread_scratch<int64_t, ForColumns>(b.w)};
  for (Table* table : {&channels, &rows, &columns})
    table->find(a);
  if (!add_up(a, channels, rows, columns)) return one_by_one(s, in, out, part);

  const uint8_t* origin = in.pixel(0, 0);
  int64_t runs = 0;
  for (int64_t c = 0; c < b.channels; c = channels.run(c))
    ++runs;
  const bool in_runs = runs * kShortRun <= b.channels;
  if (!in_runs && channels.most_y + channels.most_x == 0)
    return by_channels(channels, rows, columns, in, out, part);
  const int64_t last = part.last(b.h) * b.w;
  for (int64_t first = part.first(b.h) * b.w; first < last; first += kBlock) {
    const int64_t count = std::min(kBlock, last - first);
    const uint8_t* from[kBlock];
    uint8_t* to[kBlock];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t y = (first + k) / b.w, x = (first + k) % b.w;
      from[k] = origin + rows.place[y] + columns.place[x];
      to[k] = out.pixel(y, x);
    }
    if (in_runs) {
      for (int64_t c = 0, end = 0; c < b.channels; c = end) {
        end = channels.run(c);
        for (int64_t k = 0; k < count; ++k)
          std::memcpy(to[k] + c, from[k] + channels.place[c], static_cast<size_t>(end - c));
      }
      continue;
    }
    for (int64_t c = 0; c < b.channels; ++c) {
      const int64_t place = channels.place[c];
      for (int64_t k = 0; k < count; ++k)
        to[k][c] = from[k][place];
    }
  }
}

}  // namespace adalayer::cpu

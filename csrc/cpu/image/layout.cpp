#include "cpu/image/layout.hpp"

#include <algorithm>
#include <cstring>

namespace adalayer::cpu {
namespace {

constexpr int64_t kLine = 64;
// A kernel that keeps one position may read this many, which are neighbours or fill rows, and the
// tile unit so many of any stride.
constexpr int64_t kBlockPositions = 64, kTilePositions = 16;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

int64_t pixel_pitch(int64_t channels) {
  if (channels <= 4) return 4;
  if (channels <= 8) return 8;
  const int64_t pitch = round_up(channels, 16);
  return pitch % 1024 == 0 ? pitch + kLine : pitch;
}

ImageLayout image_layout(int64_t channels, int64_t h, int64_t w, const Padding& padding,
                         int64_t phases, int64_t columns_multiple, int64_t stride) {
  ImageLayout l;
  l.channels = channels;
  l.h = h;
  l.w = w;
  l.pitch = pixel_pitch(channels);
  l.pad_top = padding.top;
  l.pad_left = padding.left;
  // A row's right padding is the next row's left padding.
  l.columns = round_up(w + std::max(padding.left, padding.right), columns_multiple);
  l.phases = phases;
  l.phase_rows = (padding.top + h + padding.bottom + phases - 1) / phases;
  l.row_bytes = l.columns * l.pitch;
  // The last row has no next one: its right padding follows the rows.
  const int64_t tail = std::max(padding.left, padding.right) * l.pitch;
  l.image_bytes = round_up(phases * l.phase_rows * l.row_bytes + tail, kLine);
  const int64_t pixels =
      std::max(kBlockPositions * columns_multiple, kTilePositions * l.bounded(stride));
  l.slack = round_up(pixels * l.pitch, kLine) + kLine;
  return l;
}

void fill_padding(const ImageLayout& l, uint8_t* data, int64_t images, uint8_t zero_point,
                  Part part) {
  const int64_t left = l.pad_left * l.pitch;
  const int64_t right = (l.columns - l.pad_left - l.w) * l.pitch;
  const int64_t rows = l.phases * l.phase_rows;
  const int64_t tail = l.image_bytes - rows * l.row_bytes;
  for (int64_t n = 0; n < images; ++n, data += l.image_bytes) {
    for (int64_t p = part.first(rows); p < part.last(rows); ++p) {
      uint8_t* row = data + l.row_offset(p);
      if (p < l.pad_top || p >= l.pad_top + l.h) {
        std::memset(row, zero_point, static_cast<size_t>(l.row_bytes));
        continue;
      }
      if (left > 0) std::memset(row, zero_point, static_cast<size_t>(left));
      if (right > 0) std::memset(row + l.row_bytes - right, zero_point, static_cast<size_t>(right));
    }
    if (tail > 0 && part.index + 1 == part.count)
      std::memset(data + rows * l.row_bytes, zero_point, static_cast<size_t>(tail));
  }
}

}  // namespace adalayer::cpu

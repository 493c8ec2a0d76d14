// How the engine lays out one u8 image between operations.
#pragma once

#include <cstdint>

namespace adalayer::cpu {

/// u8 levels, pixels of all channels side by side ("NHWC"), in padded rows.
///
/// Padded row p = y + pad_top lies in phase p % phases, at row p / phases of it, so that the rows
/// which one kernel row of a strided convolution visits are neighbours:
///
///   offset(y, x) = ((p % phases) * phase_rows + p / phases) * row_bytes + (x + pad_left) * pitch
///
/// A convolution reads its input in place, without im2col or a copy. Only the tile unit asks for
/// phases: for it a block of output positions is a strided run of bytes. The right padding of a row
/// may be the left padding of the next one (columns counts pixels from one row's start to the next
/// one's).
///
/// Invariants: bytes between channels and pitch of a pixel are unspecified but readable; padding
/// pixels hold the zero point; `slack` readable bytes follow the last image, because kernels read
/// whole blocks.
struct ImageLayout {
  int64_t channels = 0, h = 0, w = 0;
  int64_t pitch = 0;  // bytes of one pixel, at least `channels`
  int64_t pad_top = 0, pad_left = 0;
  int64_t columns = 0;      // pixels per padded row
  int64_t phases = 1;       // the stride of the convolutions that read it
  int64_t phase_rows = 0;   // rows per phase
  int64_t row_bytes = 0;    // columns * pitch
  int64_t image_bytes = 0;  // phases * phase_rows * row_bytes: from image to image
  int64_t slack = 0;

  int64_t row_offset(int64_t padded_row) const {
    return (padded_row % phases * phase_rows + padded_row / phases) * row_bytes;
  }
  int64_t offset(int64_t y, int64_t x) const {
    return row_offset(y + pad_top) + (x + pad_left) * pitch;
  }
  /// Pixels of a stride, which are no more than there are where a second position follows.
  int64_t bounded(int64_t stride) const {
    return stride < columns * phases * phase_rows ? stride : columns * phases * phase_rows;
  }
  bool operator==(const ImageLayout&) const = default;
};

/// Bytes of a pixel: the channels rounded up to 16 (4, 8 below that), plus 64 where pixels would
/// otherwise lie a multiple of 1024 bytes apart and fight for the same cache sets.
int64_t pixel_pitch(int64_t channels);

/// What the readers of an image need around it.
struct Padding {
  int64_t top = 0, left = 0, bottom = 0, right = 0;
};

/// The layout of a c x h x w image with at least this padding around it, for readers that move
/// `phases` rows from one output row to the next. `columns_multiple`: columns is a multiple of it.
/// `stride`: the most pixels from one position of a block to the next.
ImageLayout image_layout(int64_t channels, int64_t h, int64_t w, const Padding& padding = {},
                         int64_t phases = 1, int64_t columns_multiple = 1, int64_t stride = 1);

/// One image in memory.
struct ImageView {
  const ImageLayout* layout = nullptr;
  uint8_t* data = nullptr;

  uint8_t* row(int64_t y) const { return data + layout->offset(y, 0); }
  uint8_t* pixel(int64_t y, int64_t x) const { return data + layout->offset(y, x); }
};
struct ConstImageView {
  const ImageLayout* layout = nullptr;
  const uint8_t* data = nullptr;

  ConstImageView() = default;
  ConstImageView(const ImageLayout* l, const uint8_t* d) : layout(l), data(d) {}
  ConstImageView(const ImageView& v) : layout(v.layout), data(v.data) {}  // NOLINT: a widening

  const uint8_t* row(int64_t y) const { return data + layout->offset(y, 0); }
  const uint8_t* pixel(int64_t y, int64_t x) const { return data + layout->offset(y, x); }
};

/// Floats of several images, a vector for every step of a sequence, or position of an image; all
/// distances are in elements.
struct StepFloats {
  float* data = nullptr;
  int64_t image = 0, step = 1, channel = 1;

  float* at(int64_t n, int64_t t) const { return data + n * image + t * step; }
};

/// A share of an operation: part `index` of `count` equal ones. How work is cut is up to the
/// operation (usually rows of the output); parts never write the same bytes.
struct Part {
  int64_t index = 0, count = 1;

  int64_t first(int64_t n) const { return n * index / count; }
  int64_t last(int64_t n) const { return n * (index + 1) / count; }
};

/// Writes `zero_point` to every pixel outside the image, `images` images from `data` on; of each
/// image, the given part of the padded rows.
void fill_padding(const ImageLayout& layout, uint8_t* data, int64_t images, uint8_t zero_point,
                  Part part = {});

}  // namespace adalayer::cpu

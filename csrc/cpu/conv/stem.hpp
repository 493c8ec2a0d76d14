// The first convolution of a network reads 1..4 channels: far too few for a step of 64 bytes. For
// the tile unit its input is therefore laid out so that neighbouring rows become channels. Other
// kernels multiply four bytes at a time; for them pixels lie without gaps, so that the bytes of a
// kernel row fill quads.
#pragma once

#include <span>
#include <vector>

#include "cpu/conv/matmul.hpp"
#include "cpu/image/layout.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

/// Row group g of the padded image holds padded rows g * step .. g * step + rows - 1; pixel x of
/// it has their values at that column side by side, four bytes (channels 0..3) for each row. The
/// convolution over it has a kernel of kernel_rows x KW, 4 * rows input channels, and no padding.
///
/// Dense: one row in each group, and a pixel has as many bytes as channels.
struct Stem {
  bool dense = false;
  int64_t rows = 1, step = 1;
  int64_t kernel_rows = 1;
  int64_t channels = 0, in_h = 0, in_w = 0;  // of the real image
  int64_t pad_top = 0, pad_left = 0;
  ConvShape shape;     // of the convolution over row groups
  ImageLayout layout;  // of the row groups
};

/// Whether a first convolution of this shape should be run over row groups, and how: whatever needs
/// the fewest steps.
bool stem_suits(const ConvShape& shape);
Stem plan_stem(const ConvShape& shape, Positions positions);

/// Weights [O][channels][KH][KW] as [O][4 * rows or channels][kernel_rows][KW].
std::vector<int8_t> stem_weights(const Stem& stem, const ConvShape& shape,
                                 std::span<const int8_t> weights);

/// One image (its tensor's first element at in.data) to row groups; padding becomes the zero point.
void pack_stem(const Stem& stem, const ActivationIn& in, uint8_t* out, Part part);

}  // namespace adalayer::cpu

// Activations as the matmul kernels read them: u8, padded, so that a block of output positions is a
// strided run of bytes and no im2col is needed. Index formula: FORMATS.md, section "Activations".
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernel_table.hpp"
#include "formats/panels.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

/// Byte geometry of one packed image: [group][channel block][row phase][row][column][pitch].
///
/// Row `p` of the padded image lies in phase p % stride_h at row p / stride_h, so the rows that one
/// kernel row visits are neighbours. Rows are flattened: the right padding of a row is the left
/// padding of the next one where both exist, and the positions between two output rows are computed
/// and dropped, which costs less than partial tiles.
struct PackedImage {
  int64_t groups, blocks, phases, rows, columns, pitch;
  int64_t row_bytes, phase_bytes, block_bytes, group_bytes, bytes;
  int64_t positions_per_row;  // flattened output positions between the starts of two output rows
  int64_t positions;          // flattened output positions, padding included
  int64_t copied;             // input columns that are read at all

  PackedImage(const ConvShape& s, int64_t groups_, int64_t blocks_, int64_t pitch_)
      : groups(groups_), blocks(blocks_), phases(s.stride_h), pitch(pitch_) {
    const int64_t out_h = s.out_h(), out_w = s.out_w();
    const int64_t need_w = (out_w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
    const int64_t need_h = (out_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
    columns = std::max(need_w - s.pad_left, std::min(s.pad_left + s.in_w, need_w));
    // Wide padding could be shared beyond the next row's first output; positions must not overlap.
    columns = std::max(columns, out_w * s.stride_w);
    columns = (columns + s.stride_w - 1) / s.stride_w * s.stride_w;
    copied = std::max<int64_t>(0, std::min(s.in_w, columns - s.pad_left));
    rows = (need_h + phases - 1) / phases + 1;  // one more: the last row's shared right padding
    row_bytes = columns * pitch;
    phase_bytes = rows * row_bytes;
    block_bytes = phases * phase_bytes;
    group_bytes = blocks * block_bytes;
    bytes = groups * group_bytes;
    positions_per_row = columns / s.stride_w;
    positions = (out_h - 1) * positions_per_row + out_w;
  }

  int64_t padded_rows() const { return rows * phases; }
  int64_t row_offset(int64_t padded_row) const {
    return padded_row % phases * phase_bytes + padded_row / phases * row_bytes;
  }
};

/// Fills one padded row of a packed image from input image `n` (all groups and channel blocks).
/// `scratch` holds in_w * in_channels + 64 bytes.
void pack_row(const ConvShape& shape, const ActivationIn& in, const KernelRow& kernels,
              const PackedImage& image, int64_t n, int64_t padded_row, uint8_t* packed,
              uint8_t* scratch);

}  // namespace adalayer::cpu

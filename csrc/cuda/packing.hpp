// Weights as the tensor-core kernels read them: index arithmetic alone, for host and device.
//
// The unit is a cell: 16 output channels x 64 values of the reduction, 128 * b bytes. A warp reads
// the first or second half (32 values) of a cell as the left operand of one product, four registers
// of four bytes in each lane (multiply_s8_u8 in simt.cuh says whose they are). A byte holds its
// weight in the highest b bits and zeros below: no sign has to be extended, and sums come out
// 2^(8 - b) times too large, exactly, which the epilogue shifts away.
//
// The b bits are split into planes of 8, 4, 2 and 1 bits, most significant first (7 = 4 + 2 + 1),
// which follow one another in the cell. Each lane's part of a plane of p bits is p words of 32
// bits, field by field from the highest bits of each byte down; halves of a plane are apart for p >
// 1, so that a half is one load of 4, 8 or 16 bytes per lane.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ADALAYER_ANYWHERE __host__ __device__ __forceinline__
#else
#define ADALAYER_ANYWHERE inline
#endif

namespace adalayer::cuda {

constexpr int kCellChannels = 16;
constexpr int kCellDepth = 64;
constexpr int kCellBytesPerBit = kCellChannels * kCellDepth / 8;  // 128
// A block of cells is four cells high at most: what one warp multiplies.
constexpr int kBlockChannels = 64;
// Depth of a step: what one stage of the pipeline holds.
constexpr int kStepDepth = 128;

/// Output channel, within a block of `cells` cells, of row `row` of cell `cell`. Chosen such that
/// a lane's sums belong to 2 * cells neighbouring channels, beginning at 2 * cells * (lane / 4).
/// (Cells of Form::Blocks are blocks of one cell.)
ADALAYER_ANYWHERE constexpr int block_channel(int cells, int cell, int row) {
  return (row % 8) * 2 * cells + cell * 2 + row / 8;
}

/// Bytes from the beginning of a cell to the plane of `plane` bits.
ADALAYER_ANYWHERE constexpr int plane_offset(int bits, int plane) {
  return plane == 8 || plane == 4 ? 0
         : plane == 2             ? (bits >= 4 ? 4 : 0) * kCellBytesPerBit
                                  : (bits - 1) * kCellBytesPerBit;
}

template <int kBits>
struct Unpack {
  static constexpr bool kEight = kBits == 8;
  static constexpr bool kFour = !kEight && kBits >= 4;
  static constexpr bool kTwo = !kEight && (kBits & 2) != 0;
  static constexpr bool kOne = !kEight && (kBits & 1) != 0;
  // Where the highest bit of a plane's field goes within the byte.
  static constexpr int kTwoTop = kFour ? 3 : 7;
  static constexpr int kOneTop = 8 - kBits;

  ADALAYER_ANYWHERE static constexpr uint32_t moved(uint32_t word, int left) {
    return left >= 0 ? word << left : word >> -left;
  }

  /// Registers of half `h` (0 or 1). wide: its four words of 8 bits, or two of 4 bits; two: its
  /// word of 2 bits; one: the cell's word of single bits.
  ADALAYER_ANYWHERE static void half(int h, const uint32_t* wide, uint32_t two, uint32_t one,
                                     uint32_t out[4]) {
    for (int r = 0; r < 4; ++r) {
      uint32_t v = 0;
      if (kEight) v = wide[r];
      if (kFour) v = moved(wide[r / 2], r % 2 * 4) & 0xF0F0F0F0u;
      if (kTwo) v |= moved(two, 2 * r - 7 + kTwoTop) & (0x03030303u << (kTwoTop - 1));
      if (kOne) v |= moved(one, 4 * h + r - 7 + kOneTop) & (0x01010101u << kOneTop);
      out[r] = v;
    }
  }
};

/// Rows of cells of `channels` output channels: whole blocks, the last one of one or two cells
/// where that is enough.
ADALAYER_ANYWHERE constexpr int cells_of(int channels) {
  const int rest = channels % kBlockChannels;
  return channels / kBlockChannels * 4 + (rest == 0 ? 0 : rest <= 16 ? 1 : rest <= 32 ? 2 : 4);
}

/// Byte and bit (its lowest, of `plane` bits) where the field of register `r` of half `h`, byte `i`
/// of `lane`'s, lies within a cell.
struct FieldPlace {
  int byte, bit;
};
ADALAYER_ANYWHERE constexpr FieldPlace field_place(int bits, int plane, int lane, int h, int r,
                                                   int i) {
  const int base = plane_offset(bits, plane);
  switch (plane) {
    case 8:
      return {base + h * 512 + lane * 16 + r * 4 + i, 0};
    case 4:
      return {base + h * 256 + lane * 8 + r / 2 * 4 + i, 4 - r % 2 * 4};
    case 2:
      return {base + h * 128 + lane * 4 + i, 6 - 2 * r};
    default:
      return {base + lane * 4 + i, 7 - (4 * h + r)};
  }
}

// Weights of which at most two of four neighbours in the reduction differ from zero (multiply_
// structured in simt.cuh) are stored without the others: a cell is then 128 values of the reduction
// deep, its data are packed as above, and behind them come the places of what was kept.
constexpr int kPlacesBytes = 2 * 32 * 4;  // of a cell: a word per lane and product

/// Where a cell's four bits of the four neighbours `four` (0 to 31) of row `row` lie, behind its
/// data.
ADALAYER_ANYWHERE constexpr FieldPlace places_place(int row, int four) {
  const int product = four / 16, half = four % 16 / 8;
  const int lane = row % 8 * 4 + row / 8 + 2 * half;
  return {product * 128 + lane * 4 + four % 8 / 2, four % 2 * 4};
}

/// Where 16 bytes `chunk` (0 to 7) of a row of 128 lie in shared memory: rotated within the row, so
/// that eight rows' chunks of one number are in different banks.
ADALAYER_ANYWHERE constexpr int chunk_offset(int row, int chunk) {
  return row * kStepDepth + ((chunk ^ (row & 7)) << 4);
}

}  // namespace adalayer::cuda

// What the driver of depthwise and grouped convolutions (conv/grouped.cpp) asks of an instruction
// set.
//
// A vector holds `lanes` pieces of 128 bits. 16 neighbouring channels ("a granule") of a u8 image
// fill one such piece, so a vector of bytes is a block of 16 * lanes channels of one pixel. Where
// fewer granules are left, a vector holds them of several output rows at once: its equal `splits`
// come from row lists of their own.
//
// Int32 sums of one block are four vectors, t = 0..3. Dword i of 128-bit piece l of vector t is
// channel order[4 * t + i] of granule l; packing the four vectors to bytes stays within the pieces.
// Weights and constants lie in that order.
//
//   Depthwise   The kernel rows are cut into runs of `rows`. Bytes of one run of input rows are
//               interleaved, so that a dword holds that many vertical taps of one channel, and each
//               interleaved column serves all outputs that it is a tap of. Weights are vectors
//               [block][t][run][kx][output row]. `expand` spreads a channel over its outputs.
//   InLane      Groups of 4, 8 or 16 channels in and out, or smaller ones that fill 4: inputs and
//               outputs of a group share a 128-bit piece. Step k multiplies dword k of every group.
//               Weights are vectors [block][ky][kx][k][half][t].
//   Broadcast   All others: dword k of one group's inputs meets all outputs of the group, `tiles`
//               vectors of 4 * lanes channels at a time. Weights are vectors
//               [ky][kx][k][half][tiles]; constants [correction, scale, bias][tiles].
//
// With halves = 2 there is no dot product of four bytes: bytes 0, 2 and 1, 3 of a dword are
// multiplied as two pairs of int16, and weights are int16.
#pragma once

#include <cstdint>

namespace adalayer::cpu {

/// One block of channels (Broadcast: some tiles of one group) in `count` neighbouring columns of
/// the output, in `splits` x `out_rows` rows.
struct GroupedTile {
  const uint8_t* const* rows;  // [splits][row_count] input rows, at the first tap and channel
  int64_t row_count;
  int64_t pitch;  // bytes of an input pixel
  int64_t kernel_w, stride_w, dilation_w;
  const void* weights;
  const void* constants;  // int32 correction[t], float scale[t], float bias[t]: vectors
  int weight_rows;        // Depthwise: output rows that the weights are for, at least out_rows
  int quads;              // InLane: 1, 2, 4 dwords of a group; Broadcast: any number
  int tiles;              // Broadcast: 1 or 2
  int splits;
  int out_rows;         // Depthwise: 1 or 2
  uint8_t* const* out;  // [splits][out_rows] at the first column and channel
  int64_t out_pitch;
  int32_t* const* sums;  // null, or instead of `out`: correction + products, in the sums' order;
  int64_t sums_pitch;    // elements
  const uint8_t* const* residual;  // the same, or null
  int64_t residual_pitch;
  int64_t count;
  int64_t bytes;          // channels that exist: of a split, or of the tiles
  const uint8_t* expand;  // Depthwise: [16 * lanes] byte shuffle of the loaded input, or null
  const uint8_t* widen;   // [4][16] byte shuffle from a granule to dwords of vector t
  const uint8_t* narrow;  // [16] byte shuffle from packed sums to channels, or null
  float residual_scale, inv_scale, lo, hi;
  int32_t residual_zero, zero_point;
  bool bounded;      // ConvEpilogue::bounded
  uint8_t* scratch;  // Depthwise: interleaved columns
};

struct GroupedKernels {
  int lanes;
  int rows;    // Depthwise: input rows per dword
  int halves;  // 1, or 2 without a dot product of bytes
  void (*depthwise)(const GroupedTile&);
  void (*in_lane)(const GroupedTile&);
  void (*broadcast)(const GroupedTile&);
};

#ifdef ADALAYER_HAVE_AVX2
namespace avx2 {
extern const GroupedKernels kGrouped;
}
#endif
#ifdef ADALAYER_HAVE_NEON
namespace neon {
extern const GroupedKernels kGrouped;
}
#endif
#ifdef ADALAYER_HAVE_AVX512
namespace avx512 {
extern const GroupedKernels kGrouped;
}
#endif
#ifdef ADALAYER_HAVE_AVX512VNNI
namespace avx512vnni {
extern const GroupedKernels kGrouped;
}
#endif

}  // namespace adalayer::cpu

// Packed weights of linear layers with float activations: index arithmetic, for host and device.
//
// The unit is 16 output features x 256 input features, 512 * b bytes, read once and in order by one
// warp. A lane's 128 weights are 64 pairs, in the order of the left operand's registers of 16
// products (multiply_half in simt.cuh): pair 4 * s + r is register r of product s. They are stored
// as w + 2^(b - 1) in planes of 8, 4, 2 and 1 bits, least significant first (7 = 4 + 2 + 1). In a
// plane of p bits a word of 32 bits has 16 / p pairs, pair j at bits j * p and 16 + j * p; a lane
// reads four words at a time.
#pragma once

#include "cuda/packing.hpp"

namespace adalayer::cuda {

constexpr int kLinearRows = 16;    // output features of a unit
constexpr int kLinearDepth = 256;  // input features
constexpr int kLinearPairs = 64;   // of a lane
ADALAYER_ANYWHERE constexpr int64_t linear_unit_bytes(int bits) { return int64_t{512} * bits; }

/// Input feature, within a unit, of product `s`, register `r`, half `i` in `lane`. The two products
/// 2k and 2k + 1 share 8 neighbouring features per lane, so that activations are read 16 bytes at a
/// time; sums do not mind the order.
ADALAYER_ANYWHERE constexpr int linear_column(int lane, int s, int r, int i) {
  return s / 2 * 32 + lane % 4 * 8 + s % 2 * 4 + r / 2 * 2 + i;
}
ADALAYER_ANYWHERE constexpr int linear_row(int lane, int r) { return lane / 4 + 8 * (r % 2); }

/// Where a plane of the unit begins, in bytes; `before` is the bits of the planes in front of it.
ADALAYER_ANYWHERE constexpr int linear_plane(int before) { return 512 * before; }

/// Byte and bit of the field of half `i` of pair `pair` in `lane`, within a plane of `p` bits.
ADALAYER_ANYWHERE constexpr FieldPlace linear_place(int p, int lane, int pair, int i) {
  const int pairs = 16 / p, word = pair / pairs, bit = pair % pairs * p + 16 * i;
  return {word / 4 * 512 + lane * 16 + word % 4 * 4 + bit / 8, bit % 8};
}

}  // namespace adalayer::cuda

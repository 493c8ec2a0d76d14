// Winograd convolution in whole numbers, in scalar form: fewer products, the same sums.
//
// F(m x m, 3 x 3) makes m x m outputs of a 3x3 convolution of stride 1 from (m + 2) x (m + 2)
// inputs with as many products, instead of 9 for each output. Along one axis
//
//   y = (output * ((weight * g) . (input * d))) / divisor,
//
// and over an image the same along both. What is usually said with fractions is here:
// - `weight` has each row multiplied by a number of its own that makes it whole, and no larger than
//   that, so that taps stay small;
// - `output` makes up for it, so that all rows have the same divisor;
// - everything after the products is linear, so sums may wrap modulo 2^32. In the end an odd factor
//   is divided off, by its inverse modulo 2^32, and the power of two by a shift, which is exact as
//   long as the sum itself, not what was made of it on the way, fits the bits that are left.
//
// So the int32 sums are those of the direct convolution, bit for bit, wherever winograd_exact().
#pragma once

#include <cstdint>
#include <span>

#include "reference/spec.hpp"

namespace adalayer {

enum class WinogradForm : uint8_t { F2x2, F4x4 };
inline constexpr int kWinogradForms = 2;

namespace reference {

inline constexpr int kMostWinogradTile = 4, kMostWinogradTaps = kMostWinogradTile + 2;

/// One axis of a form.
struct WinogradAxis {
  int tile;  // outputs
  int taps;  // inputs, and products
  int8_t input[kMostWinogradTaps][kMostWinogradTaps];
  int8_t weight[kMostWinogradTaps][3];
  int8_t output[kMostWinogradTile][kMostWinogradTaps];
  // Of both axes together: the divisor is odd * 2^shift.
  uint32_t odd_inverse;  // modulo 2^32
  int shift;
};
const WinogradAxis& winograd_axis(WinogradForm form);

// F(2x2) with products of bytes. Its factors are differences of levels, or of sums of two, and fit
// int8 where no level is larger than this; but one tap's (the second row's and column's) are sums
// of four levels. With 128 taken off, those do, too, and 128 times the tap is added to its
// products.
inline constexpr int kMostWinogradByteLevel = 63;
inline constexpr int kWinogradSumTap = 5, kWinogradSumOffset = 128;

/// Taps of one 3x3 kernel, [taps][taps]. They fit int16 for every int8 kernel.
void winograd_taps(WinogradForm form, const int8_t* kernel, int16_t* taps);
/// Levels [taps][taps] to the factors of the products. They fit int16 for all u8 levels.
void winograd_input(WinogradForm form, const uint8_t* levels, int16_t* factors);
/// Those of F(2x2) in bytes, modulo 256.
void winograd_byte_input(const uint8_t* levels, int8_t* factors);
/// Sums over all channels of the products [taps][taps], modulo 2^32, to sums [tile][tile].
void winograd_output(WinogradForm form, const uint32_t* products, int32_t* sums);

/// Whether the form gives the sums of w * a for all levels a of 0 .. qmax: max(sum w+, sum w-) *
/// qmax of every output channel is below what the shift leaves. `weights` is [O][I][3][3].
bool winograd_exact(WinogradForm form, std::span<const int8_t> weights, int64_t out_channels,
                    int qmax = 255);

/// Whether the algorithm applies: 3x3, stride 1, no dilation, one group.
bool winograd_suits(const ConvShape& shape);

/// conv2d_accumulate() by this algorithm; the shape suits and the form is exact.
void winograd_accumulate(WinogradForm form, const ConvShape& shape, const ActivationIn& in,
                         const int8_t* weight, int32_t* acc);

}  // namespace reference
}  // namespace adalayer

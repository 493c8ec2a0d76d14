// The three steps of a Winograd convolution (reference/winograd.hpp) for one block of tiles, as
// each instruction set has them.
#pragma once

#include <cstdint>

#include "reference/winograd.hpp"

namespace adalayer::cpu {

/// Output channels whose taps lie together.
constexpr int kWinogradGroup = 16;

/// Factors of one tile. Reads whole vectors of up to 32 channels, writes up to the next multiple of
/// 32: what lies behind `channels` meets taps of zero.
struct WinogradInputArgs {
  const uint8_t* rows[reference::kMostWinogradTaps];  // the tile's first pixel in each row
  int64_t pitch;                                      // from pixel to pixel
  int64_t channels;
  int16_t* factors;    // of the tile: [taps * taps] at tap_stride, [channels] each
  int64_t tap_stride;  // elements
};

/// Taps of one group of output channels from its weights, in the call that multiplies with them.
struct WinogradTapsArgs {
  const int8_t* weights;  // [9][elements], in the order of the taps
  int64_t elements;       // of a tap: a multiple of 32
  const bool* narrow;     // [taps * taps] of int8, else of int16
  const int64_t* offset;  // [taps * taps] of each tap, bytes
  uint8_t* taps;          // [taps * taps] as WinogradProductArgs has them
};

/// products[r][o] = sum over channels of factors[r][c] * tap[o][c], of one of the taps * taps.
struct WinogradProductArgs {
  const int16_t* factors;
  int64_t factor_stride;  // elements from row to row, a row being a tile
  const uint8_t* taps;    // [pairs of channels][16 outputs][2] of int8 (`narrow`) or int16
  int64_t group_bytes;    // to the next group's taps
  bool narrow;
  int64_t pairs;
  int rows;           // any number
  int groups;         // 1 .. WinogradKernels::groups
  int32_t* products;  // [rows][16 * groups]
};

/// Sums of the outputs (i, j) of each tile t, at t * tile_stride + i * row_stride + j * width.
struct WinogradOutputArgs {
  const int32_t* products;  // of the first tile: [taps * taps] at tap_stride, [tiles][width] each
  int64_t tap_stride;       // elements, like all strides here
  int tiles;
  int width;  // 16 * groups
  int32_t* sums;
  int64_t tile_stride, row_stride;
};

// F(2x2) where all levels and taps are small enough for products of bytes: factors and taps of int8
// (reference/winograd.hpp), and as many neighbouring channels in a `cell` as an instruction adds
// up.

struct WinogradByteInputArgs {
  const uint8_t* rows[4];  // as in WinogradInputArgs
  int64_t pitch;
  int64_t channels;
  int8_t* factors;     // of the tile: [16] at tap_stride, of each the first cell
  int64_t tap_stride;  // bytes
};

/// products[r][o] = base[o] + sum over channels of factors[r][c] * tap[o][c], of one of the 16
/// taps.
struct WinogradByteProductArgs {
  const int8_t* factors;
  int64_t depth;       // bytes of a row's factors, a row being a tile
  const int8_t* taps;  // [cells][16 outputs][cell]
  int64_t cells;
  const int32_t* base;  // [16], or null: zeros
  int rows;             // any number
  int32_t* products;    // [rows] at product_stride, [16] each
  int64_t product_stride;
};

struct WinogradByteKernels {
  int cell;
  // Rows whose cells lie beside each other: [rows / together][cells][together][cell].
  int together;
  int rows;  // that `multiply` has in registers at once
  void (*input)(const WinogradByteInputArgs&);
  void (*multiply)(const WinogradByteProductArgs&);
};

struct WinogradKernels {
  const char* name;
  int groups;  // of output channels that `multiply` takes at once
  int rows;    // that it has in registers at once: blocks are made of so many tiles
  void (*multiply)(const WinogradProductArgs&);
  // By form:
  void (*input[kWinogradForms])(const WinogradInputArgs&);
  void (*output[kWinogradForms])(const WinogradOutputArgs&);
  void (*taps[kWinogradForms])(const WinogradTapsArgs&);
};

#ifdef ADALAYER_HAVE_AVX2
namespace avx2 {
extern const WinogradKernels kWinograd;
}
#endif
#ifdef ADALAYER_HAVE_AVXVNNI
namespace avxvnni {
extern const WinogradKernels kWinograd;
}
#endif
#ifdef ADALAYER_HAVE_NEON
namespace neon {
extern const WinogradKernels kWinograd;
}
#endif
#ifdef ADALAYER_HAVE_DOTPROD
namespace dotprod {
extern const WinogradByteKernels kWinogradBytes;
}
#endif
#ifdef ADALAYER_HAVE_I8MM
namespace i8mm {
extern const WinogradByteKernels kWinogradBytes;
}
#endif
#ifdef ADALAYER_HAVE_AVX512
namespace avx512 {
extern const WinogradKernels kWinograd;
}
#endif
#ifdef ADALAYER_HAVE_AVX512VNNI
namespace avx512vnni {
extern const WinogradKernels kWinograd;
}
#endif

}  // namespace adalayer::cpu

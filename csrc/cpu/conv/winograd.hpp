// Winograd convolution of u8 images in place: 3x3, stride 1, the bits of the direct convolution
// with 2.25 or 4 times fewer products (reference/winograd.hpp says how and where that is exact).
//
// What it asks of its input is what the direct convolution asks (image/layout.hpp): the padding of
// the shape, pixels of any pitch, and the slack behind the last image. Tiles that stick out at the
// bottom or to the right read whatever lies there; that reaches no output that is kept.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/conv_epilogue.hpp"
#include "cpu/image/layout.hpp"
#include "cpu/kernel_table.hpp"
#include "reference/winograd.hpp"

namespace adalayer::cpu {

/// How the taps of one layer lie: [group of 16 output channels][taps * taps][cells of input
/// channels][16][cell], of int8 for taps of which all values fit, else of int16. A cell is a pair
/// of channels; for products of bytes, of which all taps are int8, it is what the kernels say, and
/// behind the taps of a group lie 16 int32, which are added to the products of kWinogradSumTap.
struct WinogradTaps {
  WinogradForm form = WinogradForm::F2x2;
  int64_t out_channels = 0, in_channels = 0;
  int area = 0;    // taps * taps
  int narrow = 0;  // of them, those in int8
  int cell = 2;
  std::array<bool, reference::kMostWinogradTaps * reference::kMostWinogradTaps> is_narrow{};
  std::array<int64_t, reference::kMostWinogradTaps * reference::kMostWinogradTaps> offset{};
  int64_t base_offset = 0;  // of what is added, for products of bytes
  int64_t group_bytes = 0;

  bool in_bytes() const { return cell > 2; }
  int64_t groups() const { return (out_channels + kWinogradGroup - 1) / kWinogradGroup; }
  int64_t cells() const { return (in_channels + cell - 1) / cell; }
  /// Elements of a tap.
  int64_t elements() const { return cells() * cell * kWinogradGroup; }
  int64_t bytes() const { return groups() * group_bytes; }
  /// "taps s8", "32 of 36 taps s8", for people.
  std::string describe() const;
};

/// Most bytes that the taps of weights of so many bits take, whatever the weights.
int64_t winograd_most_bytes(WinogradForm form, const ConvShape& shape, int bits,
                            const WinogradByteKernels* bytes = nullptr);

/// Weights from which taps are made in the call, a group at a time: [group of 16 output channels],
/// each [9][cells of input channels][16][cell], packed to `bits` as tiles are (formats/panels.hpp).
int64_t winograd_packed_group_bytes(const WinogradTaps& taps, int bits);
void pack_winograd_weights(const WinogradTaps& taps, std::span<const int8_t> weights, int bits,
                           uint8_t* out);

/// Throws InvalidArgument unless the shape suits and the form is exact for these weights
/// [O][I][3][3] and levels of 0 .. qmax. With `bytes`, products are of bytes wherever levels and
/// taps are small enough for that.
WinogradTaps plan_winograd_taps(WinogradForm form, const ConvShape& shape,
                                std::span<const int8_t> weights, int qmax = 255,
                                const WinogradByteKernels* bytes = nullptr);
/// Writes taps.bytes() to `out`, which is 64-byte aligned.
void pack_winograd_taps(const WinogradTaps& taps, std::span<const int8_t> weights, uint8_t* out);
/// What is added to the products of a group's kWinogradSumTap, from its taps, where they are in
/// bytes.
void write_winograd_base(const WinogradTaps& taps, uint8_t* group);

/// Both, where the taps have a buffer of their own.
struct WinogradWeights {
  WinogradTaps taps;
  AlignedBuffer data;

  size_t bytes() const { return data.size(); }
};
WinogradWeights derive_winograd(WinogradForm form, const ConvShape& shape,
                                std::span<const int8_t> weights, int qmax = 255,
                                const WinogradByteKernels* bytes = nullptr);

/// What follows from the shapes alone.
struct WinogradPlan {
  ConvShape shape;  // of one image
  WinogradForm form = WinogradForm::F2x2;
  int tile = 0, area = 0;  // outputs of an axis, taps * taps
  // Null: products of int16. Else its kernels, for taps of WinogradTaps::in_bytes().
  const WinogradByteKernels* bytes = nullptr;
  int64_t tiles_h = 0, tiles_w = 0;
  int64_t depth = 0;    // elements of a tile's factors of one tap
  int block = 0;        // most tiles whose factors are in the cache at once
  int64_t in_base = 0;  // byte of the first tile's first column in a row
  int64_t in_pitch = 0, out_pitch = 0;
  int64_t in_image_bytes = 0, out_image_bytes = 0, residual_image_bytes = 0;
  std::vector<int32_t> in_row;  // [tiles_h * tile + 2] bytes; behind the last, the last
  // [tiles][tile * tile] byte in the image, or -1: dropped. Empty where there is no such image.
  std::vector<int32_t> out_offset, residual_offset;

  int64_t tiles() const { return tiles_h * tiles_w; }
  int64_t factor_bytes() const { return bytes == nullptr ? 2 : 1; }
};

/// The plan without its tables, which do not matter to winograd_scratch_bytes().
WinogradPlan plan_winograd_blocks(WinogradForm form, const ConvShape& shape,
                                  const WinogradKernels& kernels,
                                  const WinogradByteKernels* bytes = nullptr);
/// `out` is null for a float output, `residual` where there is none.
WinogradPlan plan_winograd(WinogradForm form, const ConvShape& shape, const ImageLayout& in,
                           const ImageLayout* out, const ImageLayout* residual,
                           const WinogradKernels& kernels,
                           const WinogradByteKernels* bytes = nullptr);

/// Bytes that run_winograd() needs in each thread, 64-byte aligned. `made_bytes`: of a group's taps
/// that are made in the call, else 0.
int64_t winograd_scratch_bytes(const WinogradPlan& plan, const WinogradKernels& kernels,
                               int64_t made_bytes = 0);

struct WinogradCall {
  const WinogradPlan& plan;
  const WinogradTaps& taps;
  const uint8_t* data;  // of the taps, or
  int packed_bits = 0;  // not 0: packed weights of so many bits
  const ConvEpilogue* epilogue;
  const uint8_t* in;  // first image
  int64_t images;
  uint8_t* out;
  const uint8_t* residual;  // or null
  bool by_columns;          // parts are output channels, else tiles
};

/// The same with a plain tensor as output; the call's out, residual and epilogue are not used.
struct TensorWinogradCall {
  WinogradCall conv;
  const OutputSpec& out;
  const int32_t* correction;  // [out channels]
  int64_t first_image = 0;    // of the tensor, where conv.in's first one goes
};

/// One part of a convolution. `row` finishes the sums.
void run_winograd(const WinogradCall& call, const WinogradKernels& kernels, const KernelRow& row,
                  uint8_t* scratch, Part part);
void run_winograd(const TensorWinogradCall& call, const WinogradKernels& kernels,
                  const KernelRow& row, uint8_t* scratch, Part part);

/// Bytes [first, second) of the taps, or packed weights, that a part by columns reads.
std::pair<int64_t, int64_t> winograd_weight_range(const WinogradTaps& taps, int64_t group_bytes,
                                                  const WinogradKernels& kernels, Part part);

/// How to cut it for `threads` threads: by columns where the taps are by far the larger side.
bool winograd_prefers_columns(const WinogradPlan& plan, const WinogradTaps& taps, int64_t images,
                              int threads);

}  // namespace adalayer::cpu

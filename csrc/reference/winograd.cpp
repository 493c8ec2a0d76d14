#include "reference/winograd.hpp"

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace adalayer::reference {
namespace {

// The points 0, 1, -1 and infinity; rows of `weight` times 1, 2, 2, 1.
constexpr WinogradAxis kF2{.tile = 2,
                           .taps = 4,
                           .input = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}},
                           .weight = {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 1}},
                           .output = {{2, 1, 1, 0}, {0, 1, -1, -2}},
                           .odd_inverse = 1,
                           .shift = 2};

// The points 0, 1, -1, 2, -2 and infinity; rows of `weight` times 4, 6, 6, 24, 24, 1.
constexpr WinogradAxis kF4{
    .tile = 4,
    .taps = 6,
    .input = {{4, 0, -5, 0, 1, 0},
              {0, -4, -4, 1, 1, 0},
              {0, 4, -4, -1, 1, 0},
              {0, -2, -1, 2, 1, 0},
              {0, 2, -1, -2, 1, 0},
              {0, 4, 0, -5, 0, 1}},
    .weight = {{1, 0, 0}, {-1, -1, -1}, {-1, 1, -1}, {1, 2, 4}, {1, -2, 4}, {0, 0, 1}},
    .output = {{6, 4, 4, 1, 1, 0}, {0, 4, -4, 2, -2, 0}, {0, 4, 4, 4, 4, 0}, {0, 4, -4, 8, -8, 24}},
    .odd_inverse = 954437177,  // 9 times that is 2 * 2^32 + 1
    .shift = 6};

/// out [rows][rows] = matrix * in * matrix', with in [columns][columns]; modulo 2^32.
template <class Matrix, class In>
void both_axes(const Matrix& matrix, int rows, int columns, const In* in, uint32_t* out) {
  uint32_t half[kMostWinogradTaps][kMostWinogradTaps];
  for (int i = 0; i < rows; ++i)
    for (int x = 0; x < columns; ++x) {
      half[i][x] = 0;
      for (int y = 0; y < columns; ++y)
        half[i][x] +=
            static_cast<uint32_t>(matrix[i][y]) * static_cast<uint32_t>(in[y * columns + x]);
    }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < rows; ++j) {
      uint32_t sum = 0;
      for (int x = 0; x < columns; ++x)
        sum += static_cast<uint32_t>(matrix[j][x]) * half[i][x];
      out[i * rows + j] = sum;
    }
}

/// The same with results that fit int16.
template <class Matrix, class In>
void both_axes(const Matrix& matrix, int rows, int columns, const In* in, int16_t* out) {
  uint32_t wide[kMostWinogradTaps * kMostWinogradTaps];
  both_axes(matrix, rows, columns, in, wide);
  for (int i = 0; i < rows * rows; ++i)
    out[i] = static_cast<int16_t>(wide[i]);
}

}  // namespace

const WinogradAxis& winograd_axis(WinogradForm form) {
  return form == WinogradForm::F4x4 ? kF4 : kF2;
}

void winograd_taps(WinogradForm form, const int8_t* kernel, int16_t* taps) {
  const WinogradAxis& axis = winograd_axis(form);
  both_axes(axis.weight, axis.taps, 3, kernel, taps);
}

void winograd_input(WinogradForm form, const uint8_t* levels, int16_t* factors) {
  const WinogradAxis& axis = winograd_axis(form);
  both_axes(axis.input, axis.taps, axis.taps, levels, factors);
}

void winograd_byte_input(const uint8_t* levels, int8_t* factors) {
  int16_t words[4 * 4];
  winograd_input(WinogradForm::F2x2, levels, words);
  words[kWinogradSumTap] -= kWinogradSumOffset;
  for (int i = 0; i < 4 * 4; ++i)
    factors[i] = static_cast<int8_t>(words[i]);
}

void winograd_output(WinogradForm form, const uint32_t* products, int32_t* sums) {
  const WinogradAxis& axis = winograd_axis(form);
  uint32_t multiples[kMostWinogradTile * kMostWinogradTile];
  both_axes(axis.output, axis.tile, axis.taps, products, multiples);
  for (int i = 0; i < axis.tile * axis.tile; ++i)
    sums[i] = static_cast<int32_t>(multiples[i] * axis.odd_inverse) >> axis.shift;
}

bool winograd_exact(WinogradForm form, std::span<const int8_t> weights, int64_t out_channels,
                    int qmax) {
  const int64_t limit = int64_t{1} << (31 - winograd_axis(form).shift);
  const int64_t each = out_channels == 0 ? 0 : static_cast<int64_t>(weights.size()) / out_channels;
  for (int64_t o = 0; o < out_channels; ++o) {
    int64_t sum = 0, absolute = 0;
    for (int64_t k = 0; k < each; ++k) {
      const int w = weights[o * each + k];
      sum += w;
      absolute += std::abs(w);
    }
    // The larger one of sum w+ and sum w-.
    if ((absolute + std::abs(sum)) / 2 * qmax >= limit) return false;
  }
  return true;
}

bool winograd_suits(const ConvShape& s) {
  return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1 && s.groups == 1;
}

void winograd_accumulate(WinogradForm form, const ConvShape& s, const ActivationIn& in,
                         const int8_t* weight, int32_t* acc) {
  const WinogradAxis& axis = winograd_axis(form);
  const int64_t tile = axis.tile, area = axis.taps * axis.taps, ins = s.in_channels;
  const int32_t zero = in.grid.zero_point;
  // The level at (y, x), the zero point outside of the image.
  const auto level = [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    if (y < 0 || y >= s.in_h || x < 0 || x >= s.in_w) return static_cast<uint8_t>(zero);
    const int64_t at = in.layout == Layout::NCHW ? ((n * ins + c) * s.in_h + y) * s.in_w + x
                                                 : ((n * s.in_h + y) * s.in_w + x) * ins + c;
    return in.dtype == DType::U8 ? static_cast<const uint8_t*>(in.data)[at]
                                 : quantize_value(static_cast<const float*>(in.data)[at], in.grid);
  };
  std::vector<int16_t> taps(static_cast<size_t>(s.out_channels * ins * area));
  std::vector<int32_t> weight_sums(static_cast<size_t>(s.out_channels), 0);
  for (int64_t k = 0; k < s.out_channels * ins; ++k) {
    winograd_taps(form, weight + k * 9, taps.data() + k * area);
    for (int64_t i = 0; i < 9; ++i)
      weight_sums[k / ins] += weight[k * 9 + i];
  }
  std::vector<int16_t> factors(static_cast<size_t>(ins * area));
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t y = 0; y < s.out_h(); y += tile)
      for (int64_t x = 0; x < s.out_w(); x += tile) {
        for (int64_t c = 0; c < ins; ++c) {
          uint8_t levels[kMostWinogradTaps * kMostWinogradTaps];
          for (int64_t k = 0; k < area; ++k)
            levels[k] = level(n, c, y + k / axis.taps - s.pad_top, x + k % axis.taps - s.pad_left);
          winograd_input(form, levels, factors.data() + c * area);
        }
        for (int64_t o = 0; o < s.out_channels; ++o) {
          uint32_t products[kMostWinogradTaps * kMostWinogradTaps] = {};
          for (int64_t c = 0; c < ins; ++c)
            for (int64_t k = 0; k < area; ++k)
              products[k] += static_cast<uint32_t>(factors[c * area + k]) *
                             static_cast<uint32_t>(taps[(o * ins + c) * area + k]);
          int32_t sums[kMostWinogradTile * kMostWinogradTile];
          winograd_output(form, products, sums);
          for (int64_t i = 0; i < std::min(tile, s.out_h() - y); ++i)
            for (int64_t j = 0; j < std::min(tile, s.out_w() - x); ++j)
              acc[((n * s.out_channels + o) * s.out_h() + y + i) * s.out_w() + x + j] =
                  sums[i * tile + j] - zero * weight_sums[o];
        }
      }
}

}  // namespace adalayer::reference

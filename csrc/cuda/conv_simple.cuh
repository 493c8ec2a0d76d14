// Convolutions without tensor cores: depthwise, and any at all.
#pragma once

#include "cuda/conv_output.cuh"

namespace adalayer::cuda {

/// Signed or unsigned byte `i` of a word.
ADALAYER_DEVICE int32_t signed_byte(uint32_t word, int i) {
  return static_cast<int8_t>(word >> (8 * i));
}
ADALAYER_DEVICE int32_t unsigned_byte(uint32_t word, int i) { return (word >> (8 * i)) & 0xFFu; }

/// One thread: four channels of kDepthwiseColumns neighbouring positions.
ADALAYER_KERNEL ADALAYER_THREADS(128) conv_depthwise(ADALAYER_PARAMS DepthwiseParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int32_t pitch_words = p.size.pitch / 4;
  const int32_t columns = (p.positions_w + kDepthwiseColumns - 1) / kDepthwiseColumns;
  const int64_t index = static_cast<int64_t>(block_x()) * block_threads() + thread_index();
  const int64_t total = static_cast<int64_t>(p.batch) * p.positions_h * columns * pitch_words;
  if (index >= total) return;
  const auto word = static_cast<int32_t>(index % pitch_words);
  int64_t rest = index / pitch_words;
  const auto column = static_cast<int32_t>(rest % columns);
  rest /= columns;
  const auto oy = static_cast<int32_t>(rest % p.positions_h);
  const auto n = static_cast<int32_t>(rest / p.positions_h);
  const auto* image = reinterpret_cast<const uint32_t*>(p.in) +
                      static_cast<int64_t>(n) * p.size.h * p.size.w * pitch_words + word;
  const int32_t ox0 = column * kDepthwiseColumns;
  const uint32_t outside = static_cast<uint32_t>(p.zero_point) * 0x01010101u;
  int32_t sums[kDepthwiseColumns][4] = {};
  for (int32_t ky = 0; ky < p.kernel_h; ++ky) {
    const int32_t y = oy * p.stride_h - p.pad_top + ky * p.dilation_h;
    const bool row_inside = y >= 0 && y < p.size.h;
    for (int32_t kx = 0; kx < p.kernel_w; ++kx) {
      const uint32_t w = load_constant(p.weights + (ky * p.kernel_w + kx) * pitch_words + word);
      ADALAYER_UNROLL
      for (int i = 0; i < kDepthwiseColumns; ++i) {
        const int32_t x = (ox0 + i) * p.stride_w - p.pad_left + kx * p.dilation_w;
        const uint32_t a = row_inside && x >= 0 && x < p.size.w
                               ? image[(static_cast<int64_t>(y) * p.size.w + x) * pitch_words]
                               : outside;
        ADALAYER_UNROLL
        for (int c = 0; c < 4; ++c)
          sums[i][c] += unsigned_byte(a, c) * signed_byte(w, c);
      }
    }
  }
  ADALAYER_UNROLL
  for (int i = 0; i < kDepthwiseColumns; ++i) {
    if (ox0 + i >= p.positions_w) break;
    const int32_t pixel = (n * p.positions_h + oy) * p.positions_w + ox0 + i;
    if (p.out.levels == nullptr) {
      for (int c = 0; c < 4; ++c)
        if (word * 4 + c < p.size.c) store_output(sums[i][c], pixel, word * 4 + c, p.out);
      continue;
    }
    const int64_t at = static_cast<int64_t>(pixel) * pitch_words + word;
    const bool residual = p.out.residual != nullptr;
    const uint32_t r = residual ? reinterpret_cast<const uint32_t*>(p.out.residual)[at] : 0u;
    uint32_t q = 0;
    ADALAYER_UNROLL
    for (int c = 0; c < 4; ++c) {
      const float y = sum_value(sums[i][c], p.out.channels[word * 4 + c]);
      const auto level = static_cast<uint8_t>(unsigned_byte(r, c));
      q |= static_cast<uint32_t>(output_level(y, residual, level, p.out)) << (8 * c);
    }
    reinterpret_cast<uint32_t*>(p.out.levels)[at] = q;
  }
}

/// One thread per output, written like the scalar interpreter: it takes the zero point away itself,
/// so that corrections are zero.
ADALAYER_KERNEL ADALAYER_THREADS(128) conv_direct(ADALAYER_PARAMS DirectParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int32_t channels = p.out.channels_count;
  const int64_t index = static_cast<int64_t>(block_x()) * block_threads() + thread_index();
  const int64_t total = static_cast<int64_t>(p.batch) * p.out.out_h * p.out.out_w * channels;
  if (index >= total) return;
  const auto o = static_cast<int32_t>(index % channels);
  const auto pixel = static_cast<int32_t>(index / channels);
  const int32_t ox = pixel % p.out.out_w, oy = pixel / p.out.out_w % p.out.out_h;
  const int32_t n = pixel / p.out.out_w / p.out.out_h;
  const uint8_t* image = p.in + static_cast<int64_t>(n) * p.size.h * p.size.w * p.size.pitch +
                         o / p.group_out * p.group_in;
  const int8_t* weights =
      p.weights + static_cast<int64_t>(o) * p.kernel_h * p.kernel_w * p.group_in;
  int32_t sum = 0;
  for (int32_t ky = 0; ky < p.kernel_h; ++ky) {
    int32_t y = oy * p.stride_h - p.pad_top + ky * p.dilation_h;
    if (p.transposed) {
      const int32_t up = oy + p.pad_top - ky * p.dilation_h;
      y = up >= 0 && up % p.stride_h == 0 ? up / p.stride_h : -1;
    }
    for (int32_t kx = 0; kx < p.kernel_w; ++kx) {
      int32_t x = ox * p.stride_w - p.pad_left + kx * p.dilation_w;
      if (p.transposed) {
        const int32_t up = ox + p.pad_left - kx * p.dilation_w;
        x = up >= 0 && up % p.stride_w == 0 ? up / p.stride_w : -1;
      }
      // What lies outside holds the zero point and adds nothing.
      if (y < 0 || y >= p.size.h || x < 0 || x >= p.size.w) continue;
      const uint8_t* a = image + (static_cast<int64_t>(y) * p.size.w + x) * p.size.pitch;
      const int8_t* w = weights + (ky * p.kernel_w + kx) * p.group_in;
      for (int32_t c = 0; c < p.group_in; ++c)
        sum += (static_cast<int32_t>(a[c]) - p.zero_point) * w[c];
    }
  }
  store_output(sum, pixel, o, p.out);
}

}  // namespace adalayer::cuda

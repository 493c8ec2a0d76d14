// Matrix times few vectors with float activations: y = x W^T, half or bfloat16 x, packed W.
//
// A block has 16 output features and all of the input features, which its warps share; each warp
// streams its units of packed weights through registers, where they become whole numbers in half or
// bfloat16 exactly, and multiplies on tensor cores, 8 rows of x at a time.
#pragma once

#include "cuda/law.cuh"
#include "cuda/linear_packing.hpp"

namespace adalayer::cuda {

struct LinearParams {
  const uint16_t* x;       // [rows][in_features]
  uint16_t* y;             // [rows][out_features]
  const uint8_t* weights;  // [out / 16][units][linear_unit_bytes]
  const float* scale;      // [out], padded to 16
  const float* bias;
  int32_t rows, in_features, out_features;
  int32_t units;    // along the input features
  int32_t aligned;  // rows of x begin at multiples of 16 bytes
};

constexpr int kLinearWarps = 8;

/// Pairs of whole numbers as pairs of half or bfloat16.
template <bool kBfloat, int kBits>
ADALAYER_DEVICE uint32_t whole_to_pair(uint32_t fields) {
  constexpr int kZero = 1 << (kBits - 1);
  if constexpr (kBfloat && kBits == 8) {
    // 128 + u does not fit the 8 digits of a bfloat16; w itself does.
    const float low = to_float_rn(static_cast<int32_t>(fields & 0xFFFFu) - kZero);
    const float high = to_float_rn(static_cast<int32_t>(fields >> 16) - kZero);
    return float_bits(low) >> 16 | (float_bits(high) & 0xFFFF0000u);
  } else if constexpr (kBfloat) {
    // 128 + u, exactly; less 128 + zero.
    constexpr uint32_t kLess = 0x4300u + kZero;
    return sub_bfloat_pairs(fields | 0x43004300u, kLess | kLess << 16);
  } else {
    // 1024 + u, exactly; less 1024 + zero.
    constexpr uint32_t kLess = 0x6400u + kZero;
    return sub_half_pairs(fields | 0x64006400u, kLess | kLess << 16);
  }
}

/// Eight values of a row of x from feature `k` on; zeros where there are none.
ADALAYER_DEVICE Words4 load_row(const LinearParams& p, int32_t row, int32_t k) {
  if (row >= p.rows || k >= p.in_features) return {0, 0, 0, 0};
  const uint16_t* at = p.x + static_cast<int64_t>(row) * p.in_features + k;
  if (p.aligned && k + 8 <= p.in_features) return *reinterpret_cast<const Words4*>(at);
  uint32_t v[4] = {};
  for (int i = 0; i < 8 && k + i < p.in_features; ++i)
    v[i / 2] |= static_cast<uint32_t>(at[i]) << (16 * (i % 2));
  return {v[0], v[1], v[2], v[3]};
}

/// Weights of pair `pair` of a unit, from the lane's words of all planes.
template <bool kBfloat, int kBits>
ADALAYER_DEVICE uint32_t unpack_pair(const uint32_t (&words)[kBits][4], int pair) {
  uint32_t fields = 0;
  int before = 0;
  ADALAYER_UNROLL
  for (int plane = 8; plane > 0; plane /= 2) {
    if (kBits - before < plane) continue;
    const int pairs = 16 / plane, word = pair / pairs, shift = pair % pairs * plane;
    const uint32_t mask = ((1u << plane) - 1) * 0x00010001u;
    fields |= ((words[before + word / 4][word % 4] >> shift) & mask) << before;
    before += plane;
  }
  return whole_to_pair<kBfloat, kBits>(fields);
}

template <bool kBfloat, int kBits, int kColumns>
ADALAYER_KERNEL ADALAYER_THREADS(32 * kLinearWarps) linear_small(ADALAYER_PARAMS LinearParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int g = lane / 4, t = lane % 4;
  const auto block = static_cast<int32_t>(block_x());
  const int32_t first_row = static_cast<int32_t>(block_y()) * 8 * kColumns;
  float sums[kColumns][4] = {};
  for (int32_t unit = warp; unit < p.units; unit += kLinearWarps) {
    const uint8_t* from =
        p.weights + (static_cast<int64_t>(block) * p.units + unit) * linear_unit_bytes(kBits);
    // All of the lane's words of this unit: plane after plane, kBits vectors of four words.
    uint32_t words[kBits][4];
    ADALAYER_UNROLL
    for (int v = 0; v < kBits; ++v) {
      const Words4 w = load_streamed(reinterpret_cast<const Words4*>(from + v * 512 + lane * 16));
      words[v][0] = w.x, words[v][1] = w.y, words[v][2] = w.z, words[v][3] = w.w;
    }
    ADALAYER_UNROLL
    for (int two = 0; two < 8; ++two) {  // pairs of products
      const int32_t k = unit * kLinearDepth + linear_column(lane, 2 * two, 0, 0);
      Words4 x[kColumns];
      ADALAYER_UNROLL
      for (int j = 0; j < kColumns; ++j)
        x[j] = load_row(p, first_row + j * 8 + g, k);
      ADALAYER_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int s = 2 * two + h;
        uint32_t left[4];
        ADALAYER_UNROLL
        for (int r = 0; r < 4; ++r)
          left[r] = unpack_pair<kBfloat, kBits>(words, 4 * s + r);
        ADALAYER_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          const uint32_t right[2] = {h == 0 ? x[j].x : x[j].z, h == 0 ? x[j].y : x[j].w};
          multiply_half<kBfloat>(sums[j], left, right);
        }
      }
    }
  }
  // Warps add up in a fixed order: the same bits every time.
  auto* shared = reinterpret_cast<float*>(shared_memory());  // [warps][kColumns][4][32]
  ADALAYER_UNROLL
  for (int j = 0; j < kColumns; ++j)
    ADALAYER_UNROLL
  for (int r = 0; r < 4; ++r)
    shared[((warp * kColumns + j) * 4 + r) * 32 + lane] = sums[j][r];
  sync_threads();
  for (int item = warp; item < kColumns * 4; item += kLinearWarps) {
    const int j = item / 4, r = item % 4;
    float sum = 0.0f;
    for (int w = 0; w < kLinearWarps; ++w)
      sum = add_rn(sum, shared[((w * kColumns + j) * 4 + r) * 32 + lane]);
    const int32_t out = block * kLinearRows + g + r / 2 * 8;
    const int32_t row = first_row + j * 8 + 2 * t + r % 2;
    if (row >= p.rows || out >= p.out_features) continue;
    const float y = fma_rn(sum, load_constant(p.scale + out), load_constant(p.bias + out));
    p.y[static_cast<int64_t>(row) * p.out_features + out] =
        kBfloat ? to_bfloat_rn(y) : to_half_rn(y);
  }
}

}  // namespace adalayer::cuda

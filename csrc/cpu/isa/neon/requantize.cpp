// Requantization with the instructions of every 64-bit ARM processor.
//
// fcvtns rounds to nearest even and saturates, where x86 gives -2^31: the clamp comes before it, as
// everywhere, or is provably not reached (ConvEpilogue::bounded).
#include <arm_neon.h>

#include <cstring>

#include "cpu/isa/neon/neon.hpp"

namespace adalayer::cpu::neon {
namespace {

/// The epilogue of sixteen neighbouring channels, in registers.
struct Columns {
  float32x4_t scale[4], bias[4], lo, hi, inv_scale, residual_scale;
  int32x4_t correction[4], residual_zero;
  int16x8_t zero;
  uint8x16_t lo_bytes, hi_bytes;

  Columns(const ConvEpilogue& e, int64_t channel)
      : lo(vdupq_n_f32(e.finish.lo)),
        hi(vdupq_n_f32(e.finish.hi)),
        inv_scale(vdupq_n_f32(e.finish.inv_scale)),
        residual_scale(vdupq_n_f32(e.residual_scale)),
        residual_zero(vdupq_n_s32(e.residual_zero)),
        zero(vdupq_n_s16(static_cast<int16_t>(e.finish.zero_point))),
        lo_bytes(level(e, e.finish.lo)),
        hi_bytes(level(e, e.finish.hi)) {
    for (int k = 0; k < 4; ++k) {
      scale[k] = vld1q_f32(e.scale + channel + 4 * k);
      bias[k] = vld1q_f32(e.bias + channel + 4 * k);
      correction[k] =
          e.correction == nullptr ? vdupq_n_s32(0) : vld1q_s32(e.correction + channel + 4 * k);
    }
  }

  template <bool kResidual, bool kBounded>
  uint8x16_t levels(const int32_t* sums, const uint8_t* residual) const {
    int16x4_t relative[4];
    [[maybe_unused]] uint16x8_t wide[2];
    if constexpr (kResidual) {
      const uint8x16_t r = vld1q_u8(residual);
      wide[0] = vmovl_u8(vget_low_u8(r));
      wide[1] = vmovl_high_u8(r);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const int32x4_t sum = vaddq_s32(vld1q_s32(sums + 4 * k), correction[k]);
      float32x4_t y = vfmaq_f32(bias[k], vcvtq_f32_s32(sum), scale[k]);
      if constexpr (kResidual) {
        const uint16x4_t four = k % 2 == 0 ? vget_low_u16(wide[k / 2]) : vget_high_u16(wide[k / 2]);
        const int32x4_t level = vreinterpretq_s32_u32(vmovl_u16(four));
        const float32x4_t value = vcvtq_f32_s32(vsubq_s32(level, residual_zero));
        y = vaddq_f32(y, vmulq_f32(value, residual_scale));
      }
      y = vmulq_f32(y, inv_scale);
      // A result is no signalling NaN, and a quiet one yields the bound.
      if constexpr (!kBounded) y = vminnmq_f32(vmaxnmq_f32(y, lo), hi);
      relative[k] = vqmovn_s32(vcvtnq_s32_f32(y));
    }
    const int16x8_t low = vqaddq_s16(vcombine_s16(relative[0], relative[1]), zero);
    const int16x8_t high = vqaddq_s16(vcombine_s16(relative[2], relative[3]), zero);
    const uint8x16_t q = vqmovun_high_s16(vqmovun_s16(low), high);
    if constexpr (kBounded) return vminq_u8(vmaxq_u8(q, lo_bytes), hi_bytes);
    return q;
  }

 private:
  static uint8x16_t level(const ConvEpilogue& e, float relative) {
    return vdupq_n_u8(static_cast<uint8_t>(static_cast<int>(relative) + e.finish.zero_point));
  }
};

/// One column tile: the constants of its sixteen channels serve all rows.
template <bool kResidual, bool kBounded>
void requantize_tile(const RequantizeArgs& a, int t) {
  const int width = (a.whole ? 16 * a.tiles : a.cols) - 16 * t;
  if (width <= 0) return;
  const auto count = static_cast<size_t>(width < 16 ? width : 16);
  const Columns columns(*a.epilogue, a.channel + 16 * t);
  const int32_t* sums = a.sums + 16 * t;
  for (int r = 0; r < a.rows; ++r, sums += 16 * a.tiles) {
    if (a.out_offset[r] < 0) continue;
    const uint8_t* residual = kResidual ? a.residual + a.residual_offset[r] + 16 * t : nullptr;
    const uint8x16_t q = columns.levels<kResidual, kBounded>(sums, residual);
    uint8_t* const out = a.out + a.out_offset[r] + 16 * t;
    if (count == 16) {
      vst1q_u8(out, q);
      continue;
    }
    uint8_t levels[16];
    vst1q_u8(levels, q);
    std::memcpy(out, levels, count);
  }
}

template <bool kResidual>
void requantize_tiles(const RequantizeArgs& a) {
  for (int t = 0; t < a.tiles; ++t)
    if (a.epilogue->bounded)
      requantize_tile<kResidual, true>(a, t);
    else
      requantize_tile<kResidual, false>(a, t);
}

/// The table of a finish, for the levels that stand in the output.
void look_up(const RequantizeArgs& a) {
  const int64_t bytes = a.whole ? 16 * a.tiles : a.cols;
  for (int r = 0, end = 0; r < a.rows; r = end) {
    end = r + 1;
    if (a.out_offset[r] < 0) continue;
    const int32_t step = end < a.rows ? a.out_offset[end] - a.out_offset[r] : 0;
    while (end < a.rows && a.out_offset[end] >= 0 &&
           a.out_offset[end] - a.out_offset[end - 1] == step)
      ++end;
    uint8_t* const first = a.out + a.out_offset[r];
    kNeonImage.lookup(a.epilogue->finish.table, {first, step, first, step, bytes, end - r});
  }
}

}  // namespace

void requantize(const RequantizeArgs& a) {
  if (a.residual != nullptr)
    requantize_tiles<true>(a);
  else
    requantize_tiles<false>(a);
  if (a.epilogue->finish.table != nullptr) look_up(a);
}

}  // namespace adalayer::cpu::neon

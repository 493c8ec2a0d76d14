// Depthwise and grouped convolutions with the instructions of every 64-bit ARM processor: smlal of
// int16, as exact as the levels and weights that were widened.
//
// A register of data has four dwords' first int16 and then their second ones, so that smlal and
// smlal2 add both to the same four sums.
#include <arm_neon.h>

#include "cpu/grouped_kernels.hpp"

namespace adalayer::cpu::neon {
namespace {

#include "cpu/isa/shared/grouped.inl"

struct Words128 {
  using I = int32x4_t;
  using F = float32x4_t;
  static constexpr int kBytes = 16, kDwords = 4, kLanes = 1;
  static constexpr int kRows = 2, kHalves = 2;
  static constexpr int kColumns = 8;
  static constexpr int kKnownTaps = 3;
  static constexpr int kInLaneColumns = 4, kBroadcastSums = 16;

  static I zero() { return vdupq_n_s32(0); }
  static I load(const void* p) { return dwords(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static I load_weights(const void* p) {
    static constexpr uint8_t kApart[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
    return dwords(vqtbl1q_u8(bytes(load(p)), vld1q_u8(kApart)));
  }
  static void store(void* p, I v) { vst1q_u8(static_cast<uint8_t*>(p), bytes(v)); }
  static I load_constant(const void* p, int i) {
    return load(static_cast<const uint8_t*>(p) + 16 * i);
  }
  static F as_floats(I v) { return vreinterpretq_f32_s32(v); }
  static I broadcast_granule(const uint8_t* p) { return load(p); }
  static I broadcast_dword(const uint8_t* p) { return vdupq_n_s32(four(p)); }
  static I widen_bytes(const uint8_t* p) {
    const uint8x8_t v = vreinterpret_u8_s32(vdup_n_s32(four(p)));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(v))));
  }

  template <int kSplit>
  static I load_split(const uint8_t* const* p, int64_t, int64_t offset) {
    static_assert(kSplit == 1);
    return load(p[0] + offset);
  }
  template <int kSplit>
  static void store_split(uint8_t* const* p, int64_t, int64_t offset, I v, int64_t count) {
    store_bytes(p[0] + offset, v, count);
  }
  template <int kSplit>
  static void store_sums(int32_t* const* p, int64_t, int64_t offset, I v) {
    vst1q_s32(p[0] + offset, v);
  }
  static void store_dwords(int32_t* p, I v, int64_t count) {
    if (count >= 4) return vst1q_s32(p, v);
    int32_t all[4];
    vst1q_s32(all, v);
    for (int64_t i = 0; i < count; ++i)
      p[i] = all[i];
  }
  static void store_dwords_as_bytes(uint8_t* p, I v, int64_t count) {
    const uint16x4_t words = vqmovun_s32(v);
    store_bytes(p, dwords(vcombine_u8(vqmovn_u16(vcombine_u16(words, words)), vdup_n_u8(0))),
                count < 4 ? count : 4);
  }

  /// Two rows of bytes to int16, 4 channels in every vector: of the first row, then of the second.
  static void interleave(const I* row, uint8_t* to) {
    const uint8x16_t a = bytes(row[0]), b = bytes(row[1]);
    const auto put = [&](int at, uint16x8_t x, uint16x8_t y) {
      const uint64x2_t p = vreinterpretq_u64_u16(x), q = vreinterpretq_u64_u16(y);
      vst1q_u64(reinterpret_cast<uint64_t*>(to + at), vzip1q_u64(p, q));
      vst1q_u64(reinterpret_cast<uint64_t*>(to + at + 16), vzip2q_u64(p, q));
    };
    put(0, vmovl_u8(vget_low_u8(a)), vmovl_u8(vget_low_u8(b)));
    put(32, vmovl_high_u8(a), vmovl_high_u8(b));
  }
  static I dot(I sum, I data, I w) {
    const int16x8_t d = vreinterpretq_s16_s32(data), v = vreinterpretq_s16_s32(w);
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(d), vget_low_s16(v)), d, v);
  }
  static I dot_column(I sum, I data, I w) { return dot(sum, data, w); }
  /// Bytes 0, 2 or 1, 3 of each dword as int16: the first ones, then the second.
  static I half(I v, int which) {
    static constexpr uint8_t kHalf[2][16] = {
        {0, 255, 4, 255, 8, 255, 12, 255, 2, 255, 6, 255, 10, 255, 14, 255},
        {1, 255, 5, 255, 9, 255, 13, 255, 3, 255, 7, 255, 11, 255, 15, 255}};
    return dwords(vqtbl1q_u8(bytes(v), vld1q_u8(kHalf[which])));
  }
  template <int kQuads, int kQuad>
  static I quad_of_group(I v) {
    if constexpr (kQuads == 1) return v;
    if constexpr (kQuads == 2) return kQuad == 0 ? vtrn1q_s32(v, v) : vtrn2q_s32(v, v);
    return vdupq_laneq_s32(v, kQuad);
  }

  static F set1(float v) { return vdupq_n_f32(v); }
  static I set1_bytes(int v) { return dwords(vdupq_n_u8(static_cast<uint8_t>(v))); }
  static I set1_words(int v) { return vreinterpretq_s32_s16(vdupq_n_s16(static_cast<int16_t>(v))); }
  static I set1_dwords(int v) { return vdupq_n_s32(v); }
  static F to_floats(I v) { return vcvtq_f32_s32(v); }
  static I round(F v) { return vcvtnq_s32_f32(v); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F add_floats(F a, F b) { return vaddq_f32(a, b); }
  static F mul_floats(F a, F b) { return vmulq_f32(a, b); }
  // Of results, which are no signalling NaN: a quiet one yields the other operand, the bound.
  static F max(F a, F b) { return vmaxnmq_f32(a, b); }
  static F min(F a, F b) { return vminnmq_f32(a, b); }
  static I shuffle_bytes(I v, I by) { return dwords(vqtbl1q_u8(bytes(v), bytes(by))); }
  static I pack_words(I a, I b) { return vreinterpretq_s32_s16(vqmovn_high_s32(vqmovn_s32(a), b)); }
  static I pack_bytes(I a, I b) {
    return dwords(vqmovun_high_s16(vqmovun_s16(words(a)), words(b)));
  }
  static I add_words(I a, I b) { return vreinterpretq_s32_s16(vqaddq_s16(words(a), words(b))); }
  static I add_dwords(I a, I b) { return vaddq_s32(a, b); }
  static I sub_dwords(I a, I b) { return vsubq_s32(a, b); }
  static I max_bytes(I a, I b) { return dwords(vmaxq_u8(bytes(a), bytes(b))); }
  static I min_bytes(I a, I b) { return dwords(vminq_u8(bytes(a), bytes(b))); }
  static I max_dwords(I a, I b) { return vmaxq_s32(a, b); }
  static I min_dwords(I a, I b) { return vminq_s32(a, b); }

 private:
  static uint8x16_t bytes(I v) { return vreinterpretq_u8_s32(v); }
  static int16x8_t words(I v) { return vreinterpretq_s16_s32(v); }
  static I dwords(uint8x16_t v) { return vreinterpretq_s32_u8(v); }
  static int32_t four(const uint8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return v;
  }
  static void store_bytes(uint8_t* p, I v, int64_t count) {
    if (count >= 16) return vst1q_u8(p, bytes(v));
    uint64_t rest = vgetq_lane_u64(vreinterpretq_u64_s32(v), 0);
    if ((count & 8) != 0) {
      __builtin_memcpy(p, &rest, 8);
      rest = vgetq_lane_u64(vreinterpretq_u64_s32(v), 1);
      p += 8;
    }
    for (int64_t i = 0; i < (count & 7); ++i, rest >>= 8)
      p[i] = static_cast<uint8_t>(rest);
  }
};

}  // namespace

const GroupedKernels kGrouped{Words128::kLanes,    Words128::kRows,   Words128::kHalves,
                              depthwise<Words128>, in_lane<Words128>, broadcast<Words128>};

}  // namespace adalayer::cpu::neon

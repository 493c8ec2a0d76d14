// The image kernels with the instructions of every 64-bit ARM processor. Short loads of bytes go by
// dwords.
#include <arm_neon.h>

#include <cstring>

#include "cpu/image_kernels.hpp"

namespace adalayer::cpu {
namespace neon {
namespace {

struct Whole {};

struct V {
  using F = float32x4_t;
  using I = int32x4_t;
  static constexpr int64_t kLanes = 4, kBlock = 16;

  static uint8x16_t u8(I v) { return vreinterpretq_u8_s32(v); }
  static uint16x8_t u16(I v) { return vreinterpretq_u16_s32(v); }
  static int16x8_t s16(I v) { return vreinterpretq_s16_s32(v); }
  static uint32x4_t u32(I v) { return vreinterpretq_u32_s32(v); }
  static I from(uint8x16_t v) { return vreinterpretq_s32_u8(v); }
  static I from(uint16x8_t v) { return vreinterpretq_s32_u16(v); }
  static I from(int16x8_t v) { return vreinterpretq_s32_s16(v); }
  static I from(uint32x4_t v) { return vreinterpretq_s32_u32(v); }
  static int32_t dword(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return v;
  }

  static F set(float v) { return vdupq_n_f32(v); }
  static I set8(int v) { return from(vdupq_n_u8(static_cast<uint8_t>(v))); }
  static I set16(int v) { return from(vdupq_n_s16(static_cast<int16_t>(v))); }
  static I set32(int32_t v) { return vdupq_n_s32(v); }
  static I zero() { return vdupq_n_s32(0); }
  static I iota() {
    static constexpr int32_t kNumbers[4] = {0, 1, 2, 3};
    return vld1q_s32(kNumbers);
  }

  template <class Left>
  static I ints(const uint8_t* p, Left) {
    const uint8x8_t v = vreinterpret_u8_s32(vdup_n_s32(dword(p)));
    return from(vmovl_u16(vget_low_u16(vmovl_u8(v))));
  }
  template <class Left>
  static F bytes(const uint8_t* p, Left left) {
    return to_float(ints(p, left));
  }
  static F floats(const float* p, Whole) { return vld1q_f32(p); }
  static F floats(const float* p, int64_t left) {
    if (left >= 4) return vld1q_f32(p);
    F v = vdupq_n_f32(0.0f);
    if (left > 0) v = vld1q_lane_f32(p, v, 0);
    if (left > 1) v = vld1q_lane_f32(p + 1, v, 1);
    if (left > 2) v = vld1q_lane_f32(p + 2, v, 2);
    return v;
  }
  static void store_floats(float* p, F v, Whole) { vst1q_f32(p, v); }
  static void store_floats(float* p, F v, int64_t left) {
    if (left >= 4) return vst1q_f32(p, v);
    if (left > 0) vst1q_lane_f32(p, v, 0);
    if (left > 1) vst1q_lane_f32(p + 1, v, 1);
    if (left > 2) vst1q_lane_f32(p + 2, v, 2);
  }
  static I load(const uint8_t* p, Whole) { return from(vld1q_u8(p)); }
  static I load(const uint8_t* p, int64_t left) {
    if (left > 12) return load(p, Whole{});
    I v = vsetq_lane_s32(dword(p), zero(), 0);
    if (left > 4) v = vsetq_lane_s32(dword(p + 4), v, 1);
    if (left > 8) v = vsetq_lane_s32(dword(p + 8), v, 2);
    return v;
  }
  static I load_zero(const uint8_t* p, int64_t left) {
    static constexpr uint8_t kPlaces[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const auto count = static_cast<uint8_t>(left < 16 ? left : 16);
    return from(vandq_u8(u8(load(p, left)), vcltq_u8(vld1q_u8(kPlaces), vdupq_n_u8(count))));
  }
  static void store(uint8_t* p, I v, Whole) { vst1q_u8(p, u8(v)); }
  static void store(uint8_t* p, I v, int64_t left) {
    if (left >= 16) return store(p, v, Whole{});
    uint64_t rest = vgetq_lane_u64(vreinterpretq_u64_s32(v), 0);
    if ((left & 8) != 0) {
      std::memcpy(p, &rest, 8);
      rest = vgetq_lane_u64(vreinterpretq_u64_s32(v), 1);
      p += 8;
    }
    if ((left & 4) != 0) {
      std::memcpy(p, &rest, 4);
      rest >>= 32;
      p += 4;
    }
    for (int64_t i = 0; i < (left & 3); ++i, rest >>= 8)
      p[i] = static_cast<uint8_t>(rest);
  }
  /// Three floats to four lanes; reads a fourth.
  template <class Left>
  static F triples(const float* p, Left) {
    return vld1q_f32(p);
  }
  static I gather32(const uint8_t* p, I offsets) {
    I v = vdupq_n_s32(dword(p + vgetq_lane_s32(offsets, 0)));
    v = vsetq_lane_s32(dword(p + vgetq_lane_s32(offsets, 1)), v, 1);
    v = vsetq_lane_s32(dword(p + vgetq_lane_s32(offsets, 2)), v, 2);
    return vsetq_lane_s32(dword(p + vgetq_lane_s32(offsets, 3)), v, 3);
  }
  static F gather_floats(const float* p, const int32_t* index, Whole) {
    return gather_floats(p, index, int64_t{4});
  }
  static F gather_floats(const float* p, const int32_t* index, int64_t left) {
    F v = vdupq_n_f32(p[index[0]]);
    if (left > 1) v = vsetq_lane_f32(p[index[1]], v, 1);
    if (left > 2) v = vsetq_lane_f32(p[index[2]], v, 2);
    if (left > 3) v = vsetq_lane_f32(p[index[3]], v, 3);
    return v;
  }

  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  // max_x86 and min_x86, for any NaN and both zeros: fmaxnm has another rule for those.
  static F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static I round(F v) { return vcvtnq_s32_f32(v); }
  static F nearest(F v) { return vrndnq_f32(v); }
  static F to_float(I v) { return vcvtq_f32_s32(v); }
  static F power(F n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
  }

  static I packs32(I a, I b) { return from(vqmovn_high_s32(vqmovn_s32(a), b)); }
  static I packus16(I a, I b) { return from(vqmovun_high_s16(vqmovun_s16(s16(a)), s16(b))); }
  static I unmix(I v) { return v; }
  static I adds16(I a, I b) { return from(vqaddq_s16(s16(a), s16(b))); }
  static I add16(I a, I b) { return from(vaddq_s16(s16(a), s16(b))); }
  static I sub16(I a, I b) { return from(vsubq_s16(s16(a), s16(b))); }
  /// Whole numbers that fit int16.
  static void store_bytes(uint8_t* p, I v) {
    const int16x4_t shorts = vmovn_s32(v);
    const uint32_t four =
        vget_lane_u32(vreinterpret_u32_u8(vqmovun_s16(vcombine_s16(shorts, shorts))), 0);
    __builtin_memcpy(p, &four, sizeof four);
  }
  static I add32(I a, I b) { return vaddq_s32(a, b); }
  static I sub32(I a, I b) { return vsubq_s32(a, b); }
  static I mul32(I a, I b) { return vmulq_s32(a, b); }
  static I min32(I a, I b) { return vminq_s32(a, b); }
  static I add64(I a, I b) {
    return vreinterpretq_s32_s64(vaddq_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  }
  static I max8(I a, I b) { return from(vmaxq_u8(u8(a), u8(b))); }
  static I min8(I a, I b) { return from(vminq_u8(u8(a), u8(b))); }
  static I bit_and(I a, I b) { return vandq_s32(a, b); }
  static I bit_or(I a, I b) { return vorrq_s32(a, b); }
  template <int n>
  static I shl16(I v) {
    return from(vshlq_n_u16(u16(v), n));
  }
  template <int n>
  static I shr16(I v) {
    return from(vshrq_n_u16(u16(v), n));
  }
  template <int n>
  static I shl32(I v) {
    return vshlq_n_s32(v, n);
  }
  template <int n>
  static I shr32(I v) {
    return from(vshrq_n_u32(u32(v), n));
  }
  static I unpack_low8(I v) { return from(vmovl_u8(vget_low_u8(u8(v)))); }
  static I unpack_high8(I v) { return from(vmovl_high_u8(u8(v))); }
  static I unpack_low32(I a, I b) { return vzip1q_s32(a, b); }
  static I unpack_high32(I a, I b) { return vzip2q_s32(a, b); }
  static I unpack_low64(I a, I b) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  }
  static I unpack_high64(I a, I b) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  }
  static I dot16(I a, I b) {
    return vpaddq_s32(vmull_s16(vget_low_s16(s16(a)), vget_low_s16(s16(b))),
                      vmull_high_s16(s16(a), s16(b)));
  }
  static I sum8(I v) { return vreinterpretq_s32_u64(vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(u8(v))))); }
  static int64_t total32(I v) { return vaddlvq_s32(v); }
  static int64_t total64(I v) { return vaddvq_s64(vreinterpretq_s64_s32(v)); }

  static float64x2_t set_double(double v) { return vdupq_n_f64(v); }
  template <class Left>
  static F centred(const uint8_t* p, Left left, float64x2_t mean) {
    const I q = ints(p, left);
    const float64x2_t low = vcvtq_f64_s64(vmovl_s32(vget_low_s32(q)));
    const float64x2_t high = vcvtq_f64_s64(vmovl_high_s32(q));
    return vcvt_high_f32_f64(vcvt_f32_f64(vsubq_f64(low, mean)), vsubq_f64(high, mean));
  }
  struct Doubles {
    float64x2_t low = vdupq_n_f64(0.0), high = vdupq_n_f64(0.0);
    void add(F v) {
      low = vaddq_f64(low, vcvt_f64_f32(vget_low_f32(v)));
      high = vaddq_f64(high, vcvt_high_f64_f32(v));
    }
    F inverse() const {
      const float64x2_t one = vdupq_n_f64(1.0);
      return vcvt_high_f32_f64(vcvt_f32_f64(vdivq_f64(one, low)), vdivq_f64(one, high));
    }
  };
};

/// tbl looks up 64 bytes, and tbx leaves the lane as it is where the index lies elsewhere.
struct Pieces {
  uint8x16x4_t quarter[4];
  explicit Pieces(const uint8_t* table) {
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < 4; ++i)
        quarter[k].val[i] = vld1q_u8(table + 64 * k + 16 * i);
  }
  V::I operator()(V::I index) const {
    const uint8x16_t at = V::u8(index), quarter_bytes = vdupq_n_u8(64);
    uint8x16_t found = vqtbl4q_u8(quarter[0], at), rest = at;
    for (int k = 1; k < 4; ++k) {
      rest = vsubq_u8(rest, quarter_bytes);
      found = vqtbx4q_u8(found, quarter[k], rest);
    }
    return V::from(found);
  }
};

void interleave_sixteen(const uint8_t* a, const uint8_t* b, uint8_t* out) {
  vst2q_u8(out, {vld1q_u8(a), vld1q_u8(b)});
}

#include "cpu/isa/shared/image.inl"
// The rest of it.
#include "cpu/isa/shared/attention.inl"
#include "cpu/isa/shared/floats.inl"
#include "cpu/isa/shared/linear.inl"
#include "cpu/isa/shared/recurrence.inl"
// What they all define.
#include "cpu/isa/shared/image_table.inl"

}  // namespace
}  // namespace neon

const ImageKernels kNeonImage = neon::kImage;

}  // namespace adalayer::cpu

// Packed tiles over registers of 128 bits, for planar.inl. Included inside the unnamed namespace of
// one ISA file only, after cpu/isa/shared/unrolled.hpp.

struct Bytes128 {
  using T = uint8x16_t;
  static constexpr int kBytes = 16;
  static T load(const uint8_t* p) { return vld1q_u8(p); }
  static void store(int8_t* p, T v) { vst1q_s8(p, vreinterpretq_s8_u8(v)); }
  static T bit_or(T a, T b) { return vorrq_u8(a, b); }
  template <int kBits, int kWidth, int kT, int kAt>
  static T field(T chunk) {
    // What the shift leaves of neighbouring fields, the mask drops.
    constexpr int kShift = kAt - kT * kWidth;
    if constexpr (kShift > 0) chunk = vshlq_n_u8(chunk, kShift);
    if constexpr (kShift < 0) chunk = vshrq_n_u8(chunk, -kShift);
    return vandq_u8(chunk, vdupq_n_u8(((1 << kWidth) - 1) << kAt));
  }
  /// Signed weights.
  template <int kBits>
  static T finish(T u) {
    const T sign = vdupq_n_u8(1 << (kBits - 1));
    return vsubq_u8(veorq_u8(u, sign), sign);
  }
};

#include "cpu/isa/shared/planar.inl"

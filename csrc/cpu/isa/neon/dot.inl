// Matrix times vector with udot, for the rows whose machines have it. Included inside the unnamed
// namespace of one ISA file only, like gemv.inl, which needs it.

struct UnsignedDot {
  using Sum = uint32x4_t;
  static constexpr int kRegisters = 1;
  static Sum zero() { return vdupq_n_u32(0); }
  static uint32x4_t total(Sum sum) { return sum; }
  template <int kBits>
  static void dot(Sum& sum, uint8x16_t a0, uint8x16_t w0, uint8x16_t a1, uint8x16_t w1) {
    sum = vdotq_u32(vdotq_u32(sum, w0, a0), w1, a1);
  }
};

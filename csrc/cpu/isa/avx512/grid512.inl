// A grid in registers, 16 values at a time. Included inside the unnamed namespace of one ISA file
// only.

__mmask16 tail_mask(int64_t left) {
  return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
}

/// A grid in registers. The order of max and min makes NaN the lowest level, as in spec.hpp.
struct Grid {
  __m512 inv, lo, hi;
  __m512i zero;
  explicit Grid(const ActivationGrid& g)
      : inv(_mm512_set1_ps(g.inv_scale)),
        lo(_mm512_set1_ps(static_cast<float>(-g.zero_point))),
        hi(_mm512_set1_ps(static_cast<float>(g.qmax - g.zero_point))),
        zero(_mm512_set1_epi32(g.zero_point)) {}
  __m512i relative(__m512 x) const {
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(x, inv), lo), hi));
  }
  __m512i levels(__m512 x) const { return _mm512_add_epi32(relative(x), zero); }
};

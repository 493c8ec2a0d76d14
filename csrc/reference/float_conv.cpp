#include "reference/float_conv.hpp"

#include <algorithm>

namespace adalayer::reference {

void float_conv(const FloatConvSpec& spec, const float* x, float* y) {
  const ConvShape& s = spec.shape;
  const int64_t terms = s.reduction(), taps = s.kernel_h * s.kernel_w;
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  for (int64_t o = 0; o < s.out_channels; ++o) {
    const float* weights = spec.weights + o * terms;
    const int64_t first = o / s.group_out() * s.group_in();
    for (int64_t oy = 0; oy < out_h; ++oy)
      for (int64_t ox = 0; ox < out_w; ++ox) {
        float sum = spec.bias[o];
        for (int64_t begin = 0; begin < terms; begin += kFloatBlock) {
          float chain = 0.0f;
          for (int64_t k = begin; k < std::min(begin + kFloatBlock, terms); ++k) {
            const int64_t iy = oy * s.stride_h - s.pad_top + k % taps / s.kernel_w * s.dilation_h;
            const int64_t ix = ox * s.stride_w - s.pad_left + k % s.kernel_w * s.dilation_w;
            const bool inside = iy >= 0 && iy < s.in_h && ix >= 0 && ix < s.in_w;
            const float value = inside ? x[((first + k / taps) * s.in_h + iy) * s.in_w + ix] : 0.0f;
            chain = std::fmaf(value, weights[k], chain);
          }
          sum += chain;
        }
        if (spec.clamps()) sum = min_x86(max_x86(sum, spec.lo), spec.hi);
        y[(o * out_h + oy) * out_w + ox] = sum;
      }
  }
}

}  // namespace adalayer::reference

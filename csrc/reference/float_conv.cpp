#include "reference/float_conv.hpp"

#include <algorithm>
#include <vector>

namespace adalayer::reference {

void float_conv(const FloatConvSpec& spec, const float* x, float* y) {
  const ConvShape& s = spec.shape;
  const int64_t terms = s.reduction(), taps = s.kernel_h * s.kernel_w;
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  std::vector<float> window(static_cast<size_t>(terms));  // of all outputs of a group
  for (int64_t group = 0; group < s.groups; ++group)
    for (int64_t oy = 0; oy < out_h; ++oy)
      for (int64_t ox = 0; ox < out_w; ++ox) {
        for (int64_t k = 0; k < terms; ++k) {
          const int64_t iy = oy * s.stride_h - s.pad_top + k % taps / s.kernel_w * s.dilation_h;
          const int64_t ix = ox * s.stride_w - s.pad_left + k % s.kernel_w * s.dilation_w;
          const bool inside = iy >= 0 && iy < s.in_h && ix >= 0 && ix < s.in_w;
          const int64_t c = group * s.group_in() + k / taps;
          window[static_cast<size_t>(k)] = inside ? x[(c * s.in_h + iy) * s.in_w + ix] : 0.0f;
        }
        for (int64_t o = group * s.group_out(); o < (group + 1) * s.group_out(); ++o) {
          const float* weights = spec.weights + o * terms;
          float sum = spec.bias[o];
          for (int64_t begin = 0; begin < terms; begin += kFloatBlock) {
            float chain = 0.0f;
            for (int64_t k = begin; k < std::min(begin + kFloatBlock, terms); ++k)
              chain = std::fmaf(window[static_cast<size_t>(k)], weights[k], chain);
            sum += chain;
          }
          if (spec.clamps()) sum = min_x86(max_x86(sum, spec.lo), spec.hi);
          y[(o * out_h + oy) * out_w + ox] = sum;
        }
      }
}

}  // namespace adalayer::reference

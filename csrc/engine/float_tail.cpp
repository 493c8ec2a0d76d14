#include "engine/float_tail.hpp"

#include <algorithm>
#include <cmath>

namespace adalayer::engine {

namespace {

/// Positions of the image that a window covers along one axis, and what it counts with padding.
struct Window {
  int64_t begin, end, padded;
};

Window fixed_window(int64_t i, int64_t in, int64_t kernel, int64_t stride, int64_t pad,
                    int64_t pad_end) {
  const int64_t start = i * stride - pad;
  return {std::max<int64_t>(start, 0), std::min(start + kernel, in),
          std::min(start + kernel, in + pad_end) - start};
}

Window adaptive_window(int64_t i, int64_t in, int64_t out) {
  return {adaptive_begin(i, in, out), adaptive_end(i, in, out), 0};
}

/// Channels whose sums are added up side by side: one sum alone waits for each of its additions.
constexpr int64_t kChannels = 8;

/// The sums of a window of `count` channels, each in the order of its rows.
void add_up(const float* in, int64_t plane, int64_t in_w, const Window& y, const Window& x,
            int64_t count, double* sums) {
  std::fill_n(sums, kChannels, 0.0);
  for (int64_t iy = y.begin; iy < y.end; ++iy)
    for (int64_t ix = x.begin; ix < x.end; ++ix) {
      const float* at = in + iy * in_w + ix;
      if (count == kChannels) {
        for (int64_t k = 0; k < kChannels; ++k)
          sums[k] += static_cast<double>(at[k * plane]);
      } else {
        for (int64_t k = 0; k < count; ++k)
          sums[k] += static_cast<double>(at[k * plane]);
      }
    }
}

}  // namespace

void average_f32(const PoolSpec& s, bool adaptive, const float* in, int64_t in_h, int64_t in_w,
                 float* out, int64_t out_h, int64_t out_w, int64_t first_channel,
                 int64_t last_channel) {
  const int64_t plane = in_h * in_w;
  for (int64_t c = first_channel; c < last_channel; c += kChannels)
    for (int64_t oy = 0; oy < out_h; ++oy)
      for (int64_t ox = 0; ox < out_w; ++ox) {
        const Window y =
            adaptive ? adaptive_window(oy, in_h, out_h)
                     : fixed_window(oy, in_h, s.kernel_h, s.stride_h, s.pad_top, s.pad_bottom);
        const Window x =
            adaptive ? adaptive_window(ox, in_w, out_w)
                     : fixed_window(ox, in_w, s.kernel_w, s.stride_w, s.pad_left, s.pad_right);
        const int64_t divisor = s.count_padding && !adaptive
                                    ? y.padded * x.padded
                                    : (y.end - y.begin) * (x.end - x.begin);
        const int64_t count = std::min(kChannels, last_channel - c);
        double sums[kChannels];
        add_up(in + c * plane, plane, in_w, y, x, count, sums);
        for (int64_t k = 0; k < count; ++k)
          out[((c + k) * out_h + oy) * out_w + ox] =
              static_cast<float>(sums[k] / static_cast<double>(divisor));
      }
}

void maximum_f32(const PoolSpec& s, const float* in, int64_t in_h, int64_t in_w, float* out,
                 int64_t out_h, int64_t out_w, int64_t first_channel, int64_t last_channel) {
  for (int64_t c = first_channel; c < last_channel; ++c)
    for (int64_t oy = 0; oy < out_h; ++oy)
      for (int64_t ox = 0; ox < out_w; ++ox) {
        float most = -INFINITY;
        for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
          const int64_t iy = oy * s.stride_h - s.pad_top + ky * s.dilation_h;
          if (iy < 0 || iy >= in_h) continue;
          for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
            const int64_t ix = ox * s.stride_w - s.pad_left + kx * s.dilation_w;
            if (ix < 0 || ix >= in_w) continue;
            const float v = in[(c * in_h + iy) * in_w + ix];
            if (v > most || v != v) most = v;
          }
        }
        out[(c * out_h + oy) * out_w + ox] = most;
      }
}

}  // namespace adalayer::engine

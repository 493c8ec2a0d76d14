#include "reference/reference.hpp"

#include <limits>
#include <string>
#include <vector>

#include "core/status.hpp"
#include "core/thread_pool.hpp"

namespace adalayer {

void validate(const ConvShape& s) {
  const auto require = [](bool ok, const char* what, int64_t got) {
    if (!ok) throw InvalidArgument(std::string("conv2d: ") + what + ", got " + std::to_string(got));
  };
  // Above this any index product below could leave int64, whatever the tensor claims.
  constexpr int64_t kMaxExtent = int64_t{1} << 31;
  const auto extent = [&](int64_t v, int64_t low, const char* what) {
    require(v >= low && v < kMaxExtent, what, v);
  };
  extent(s.batch, 0, "batch must be in [0, 2^31)");
  extent(s.in_channels, 1, "input channels must be in [1, 2^31)");
  extent(s.out_channels, 1, "output channels must be in [1, 2^31)");
  extent(s.in_h, 0, "input height must be in [0, 2^31)");
  extent(s.in_w, 0, "input width must be in [0, 2^31)");
  extent(s.kernel_h, 1, "kernel height must be in [1, 2^31)");
  extent(s.kernel_w, 1, "kernel width must be in [1, 2^31)");
  extent(s.stride_h, 1, "vertical stride must be in [1, 2^31)");
  extent(s.stride_w, 1, "horizontal stride must be in [1, 2^31)");
  extent(s.dilation_h, 1, "vertical dilation must be in [1, 2^31)");
  extent(s.dilation_w, 1, "horizontal dilation must be in [1, 2^31)");
  extent(s.pad_top, 0, "padding must be in [0, 2^31)");
  extent(s.pad_left, 0, "padding must be in [0, 2^31)");
  extent(s.pad_bottom, 0, "padding must be in [0, 2^31)");
  extent(s.pad_right, 0, "padding must be in [0, 2^31)");
  extent(s.groups, 1, "groups must be in [1, 2^31)");
  require(s.in_channels % s.groups == 0, "input channels must be divisible by groups",
          s.in_channels);
  require(s.out_channels % s.groups == 0, "output channels must be divisible by groups",
          s.out_channels);
  require(s.in_h + s.pad_top + s.pad_bottom >= s.dilation_h * (s.kernel_h - 1) + 1,
          "padded input height is smaller than the dilated kernel, height", s.in_h);
  require(s.in_w + s.pad_left + s.pad_right >= s.dilation_w * (s.kernel_w - 1) + 1,
          "padded input width is smaller than the dilated kernel, width", s.in_w);
}

void check_accumulator(int64_t reduction, int bits) {
  const int64_t per_term = int64_t{255} << (bits - 1);
  if (reduction > ((int64_t{1} << 31) - 1) / per_term) {
    throw InvalidArgument("a reduction over " + std::to_string(reduction) + " products at " +
                          std::to_string(bits) + " bits could overflow the int32 accumulator");
  }
}

namespace reference {
namespace {

/// Index of element (n, c, y, x) of a tensor of c_total channels of h x w.
int64_t index_of(Layout layout, int64_t n, int64_t c, int64_t y, int64_t x, int64_t c_total,
                 int64_t h, int64_t w) {
  return layout == Layout::NCHW ? ((n * c_total + c) * h + y) * w + x
                                : ((n * h + y) * w + x) * c_total + c;
}

/// Levels less their zero point, [N][H][W][C], each quantized once: a term of a sum is a product,
/// and what lies outside of the image, which is the zero point, adds nothing.
std::vector<int16_t> centred(const ConvShape& s, const ActivationIn& in) {
  const int32_t z = in.grid.zero_point;
  std::vector<int16_t> levels(static_cast<size_t>(s.batch * s.in_h * s.in_w * s.in_channels));
  size_t at = 0;
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t y = 0; y < s.in_h; ++y)
      for (int64_t x = 0; x < s.in_w; ++x)
        for (int64_t c = 0; c < s.in_channels; ++c) {
          const int64_t i = index_of(in.layout, n, c, y, x, s.in_channels, s.in_h, s.in_w);
          const int32_t level =
              in.dtype == DType::U8
                  ? static_cast<const uint8_t*>(in.data)[i]
                  : quantize_value(static_cast<const float*>(in.data)[i], in.grid);
          levels[at++] = static_cast<int16_t>(level - z);
        }
  return levels;
}

int32_t accumulate(const ConvShape& s, const int16_t* levels, const int8_t* weight, int64_t n,
                   int64_t o, int64_t oy, int64_t ox) {
  const int64_t cg = s.group_in(), taps = s.kernel_h * s.kernel_w;
  const int64_t first = o / s.group_out() * cg;
  int32_t acc = 0;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    const int64_t y = oy * s.stride_h + ky * s.dilation_h - s.pad_top;
    if (y < 0 || y >= s.in_h) continue;
    for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
      const int64_t x = ox * s.stride_w + kx * s.dilation_w - s.pad_left;
      if (x < 0 || x >= s.in_w) continue;
      const int16_t* a = levels + ((n * s.in_h + y) * s.in_w + x) * s.in_channels + first;
      const int8_t* w = weight + o * s.reduction() + ky * s.kernel_w + kx;
      for (int64_t c = 0; c < cg; ++c)
        acc += int32_t{w[c * taps]} * int32_t{a[c]};
    }
  }
  return acc;
}

template <class Sink>
void for_each_output(const ConvShape& s, const ActivationIn& in, const int8_t* weight, int threads,
                     Sink&& sink) {
  const std::vector<int16_t> levels = centred(s, in);
  const int64_t oh = s.out_h(), ow = s.out_w();
  parallel_for(s.batch * s.out_channels, threads, [&](int64_t task, int) {
    const int64_t n = task / s.out_channels, o = task % s.out_channels;
    for (int64_t y = 0; y < oh; ++y)
      for (int64_t x = 0; x < ow; ++x)
        sink(n, o, y, x, accumulate(s, levels.data(), weight, n, o, y, x));
  });
}

}  // namespace

void conv2d(const ConvShape& s, const ActivationIn& in, const int8_t* weight, const OutputSpec& out,
            int threads) {
  const int64_t oh = s.out_h(), ow = s.out_w();
  for_each_output(
      s, in, weight, threads, [&](int64_t n, int64_t o, int64_t y, int64_t x, int32_t acc) {
        const int64_t i = index_of(out.layout, n, o, y, x, s.out_channels, oh, ow);
        if (out.dtype == DType::F32) {
          static_cast<float*>(out.data)[i] = output_value(acc, o, i, out);
        } else {
          static_cast<uint8_t*>(out.data)[i] =
              requantize_u8(acc, out.scale[o], out.bias[o], out.lo, out.hi, out.zero_point);
        }
      });
}

void conv2d_accumulate(const ConvShape& s, const ActivationIn& in, const int8_t* weight,
                       int32_t* acc, int threads) {
  const int64_t oh = s.out_h(), ow = s.out_w();
  for_each_output(s, in, weight, threads,
                  [&](int64_t n, int64_t o, int64_t y, int64_t x, int32_t value) {
                    acc[index_of(Layout::NCHW, n, o, y, x, s.out_channels, oh, ow)] = value;
                  });
}

void quantize(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q) {
  for (int64_t i = 0; i < n; ++i)
    q[i] = quantize_value(x[i], grid);
}

void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y) {
  for (int64_t i = 0; i < n; ++i)
    y[i] = dequantize_value(quantize_value(x[i], grid), scale, grid.zero_point);
}

}  // namespace reference
}  // namespace adalayer

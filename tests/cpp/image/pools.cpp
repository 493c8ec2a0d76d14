// Pools against plain loops over their windows.
#include <algorithm>
#include <cstring>
#include <string>

#include "image/cases.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

namespace {

struct WindowCase {
  PoolSpec spec;
  int64_t in_h, in_w, out_h, out_w;
};

WindowCase random_windows(bool dilated, int64_t c) {
  for (;;) {
    WindowCase w;
    PoolSpec& s = w.spec;
    s.kernel_h = uniform(1, 5);
    s.kernel_w = uniform(0, 1) == 1 ? s.kernel_h : uniform(1, 5);
    if (uniform(0, 2) == 0) s.kernel_h = s.kernel_w = pick<int64_t>({2, 3});
    s.stride_h = uniform(1, 3);
    s.stride_w = uniform(1, 3);
    s.pad_top = uniform(0, static_cast<int>(s.kernel_h) / 2);
    s.pad_left = uniform(0, static_cast<int>(s.kernel_w) / 2);
    s.pad_bottom = uniform(0, static_cast<int>(s.kernel_h) / 2);
    s.pad_right = uniform(0, static_cast<int>(s.kernel_w) / 2);
    if (dilated && uniform(0, 2) == 0) {
      s.dilation_h = uniform(1, 3);
      s.dilation_w = uniform(1, 3);
    }
    w.in_h = uniform(1, c > 100 ? 6 : 10);
    w.in_w = uniform(1, c > 100 ? 7 : 14);
    const int64_t ceil_h = uniform(0, 1) * (s.stride_h - 1);
    const int64_t ceil_w = uniform(0, 1) * (s.stride_w - 1);
    const int64_t left_h =
        w.in_h + s.pad_top + s.pad_bottom - s.dilation_h * (s.kernel_h - 1) - 1 + ceil_h;
    const int64_t left_w =
        w.in_w + s.pad_left + s.pad_right - s.dilation_w * (s.kernel_w - 1) - 1 + ceil_w;
    if (left_h < 0 || left_w < 0) continue;
    w.out_h = left_h / s.stride_h + 1;
    w.out_w = left_w / s.stride_w + 1;
    // A last window that starts behind the image is left out, as torch does.
    if ((w.out_h - 1) * s.stride_h >= w.in_h + s.pad_top) --w.out_h;
    if ((w.out_w - 1) * s.stride_w >= w.in_w + s.pad_left) --w.out_w;
    if (w.out_h > 0 && w.out_w > 0) return w;
  }
}

/// fn(iy, ix) for the window's positions inside the image.
template <class Fn>
void each_position(const WindowCase& w, int64_t y, int64_t x, const Fn& fn) {
  const PoolSpec& s = w.spec;
  for (int64_t i = 0; i < s.kernel_h; ++i) {
    for (int64_t j = 0; j < s.kernel_w; ++j) {
      const int64_t iy = y * s.stride_h - s.pad_top + i * s.dilation_h;
      const int64_t ix = x * s.stride_w - s.pad_left + j * s.dilation_w;
      if (iy >= 0 && iy < w.in_h && ix >= 0 && ix < w.in_w) fn(iy, ix);
    }
  }
}

}  // namespace

TEST(max_pool) {
  for (const int64_t c : channel_counts()) {
    for (int round = 0; round < 3; ++round) {
      const WindowCase w = random_windows(true, c);
      const Image in(c, w.in_h, w.in_w);
      check_operation(
          "max_pool " + std::to_string(w.spec.kernel_h) + "x" + std::to_string(w.spec.kernel_w),
          random_layout(c, w.out_h, w.out_w),
          [&](int64_t k, int64_t y, int64_t x) {
            int best = 0;
            each_position(w, y, x,
                          [&](int64_t iy, int64_t ix) { best = std::max(best, in(k, iy, ix)); });
            return best;
          },
          [&](ImageView out, Part part) { max_pool(w.spec, in.view(), out, part); });
    }
  }
}

TEST(avg_pool) {
  for (const int64_t c : channel_counts()) {
    for (int round = 0; round < 2; ++round) {
      WindowCase w = random_windows(false, c);
      PoolSpec& s = w.spec;
      const RandomFinish f;
      s.finish = f.finish;
      s.zero_in = uniform(0, 255);
      s.ratio = uniform(0, 4) == 0 ? random_scale() : static_cast<float>(uniform(1, 300)) * 0.01f;
      s.count_padding = uniform(0, 1) == 1;
      const Image in(c, w.in_h, w.in_w);
      check_operation(
          "avg_pool", random_layout(c, w.out_h, w.out_w),
          [&](int64_t k, int64_t y, int64_t x) -> int {
            int64_t sum = 0, valid = 0;
            each_position(w, y, x, [&](int64_t iy, int64_t ix) {
              sum += in(k, iy, ix);
              ++valid;
            });
            int64_t divisor = valid;
            if (s.count_padding) {
              divisor = 0;
              for (int64_t i = 0; i < s.kernel_h; ++i)
                for (int64_t j = 0; j < s.kernel_w; ++j)
                  divisor += y * s.stride_h - s.pad_top + i < w.in_h + s.pad_bottom &&
                             x * s.stride_w - s.pad_left + j < w.in_w + s.pad_right;
            }
            return finish_u8(average_value(sum, valid, divisor, s), s.finish);
          },
          [&](ImageView out, Part part) { avg_pool(s, in.view(), out, part); });
    }
  }
}

namespace {

void check_adaptive(const Image& in, int64_t out_h, int64_t out_w) {
  const RandomFinish f;
  PoolSpec s;
  s.finish = f.finish;
  s.zero_in = uniform(0, 255);
  s.ratio = static_cast<float>(uniform(1, 300)) * 0.01f;
  const ImageLayout& l = in.layout;
  check_operation(
      "adaptive", random_layout(l.channels, out_h, out_w),
      [&](int64_t k, int64_t y, int64_t x) -> int {
        int64_t sum = 0, valid = 0;
        for (int64_t iy = adaptive_begin(y, l.h, out_h); iy < adaptive_end(y, l.h, out_h); ++iy) {
          for (int64_t ix = adaptive_begin(x, l.w, out_w); ix < adaptive_end(x, l.w, out_w); ++ix) {
            sum += in(k, iy, ix);
            ++valid;
          }
        }
        return finish_u8(average_value(sum, valid, valid, s), s.finish);
      },
      [&](ImageView out, Part part) { adaptive_avg_pool(s, in.view(), out, part); });
}

}  // namespace

TEST(adaptive_avg_pool) {
  for (const int64_t c : channel_counts()) {
    const Size s(c);
    const Image in(c, s.h, s.w);
    check_adaptive(in, 1, 1);
    check_adaptive(in, uniform(1, 7), uniform(1, 7));
  }
  // Sums beyond 16 bits, all levels at their largest.
  for (const int64_t c : {1, 5, 64, 300}) {
    Image in(c, 40, 53);
    std::memset(in.memory.data(), 255, in.memory.size());
    check_adaptive(in, 1, 1);
    check_adaptive(Image(c, 1, 600), 1, 2);
    check_adaptive(Image(c, 300, 2), 1, 1);
  }
}

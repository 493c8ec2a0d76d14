// The operations between convolutions on every instruction set against plain loops over the
// formulas: values, and which bytes each part writes. Inputs lie between unreadable pages, with
// only the 3 bytes of slack behind them that the kernels may read.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "cpu/image/attention.hpp"
#include "cpu/image/float_conv.hpp"
#include "cpu/image/ops.hpp"
#include "cpu/kernel_table.hpp"
#include "exact.hpp"
#include "seed.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

namespace {

std::mt19937 rng(check::seed(20240711));

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

template <class T>
T pick(const std::vector<T>& values) {
  return values[static_cast<size_t>(uniform(0, static_cast<int>(values.size()) - 1))];
}

const std::vector<int64_t>& channel_counts() {
  static const std::vector<int64_t> counts = [] {
    std::vector<int64_t> c;
    for (int64_t i = 1; i <= 70; ++i)
      c.push_back(i);
    for (const int64_t i : {127, 128, 129, 255, 256, 257, 1024})
      c.push_back(i);
    return c;
  }();
  return counts;
}

/// A layout with padding, phases and a pitch beyond what the channels need, now and then.
ImageLayout random_layout(int64_t c, int64_t h, int64_t w) {
  Padding padding;
  if (uniform(0, 1) == 1) padding = {uniform(0, 2), uniform(0, 2), uniform(0, 2), uniform(0, 2)};
  const int64_t phases = uniform(1, 2);
  ImageLayout l = image_layout(c, h, w, padding, phases, uniform(0, 3) == 0 ? 4 : 1);
  if (uniform(0, 2) == 0) {
    l.pitch += 16 * uniform(1, 4);
    l.row_bytes = l.columns * l.pitch;
    l.image_bytes = l.phases * l.phase_rows * l.row_bytes + 8 * l.pitch;
  }
  return l;
}

uint8_t random_level() {
  static int mode = 0;
  static int left = 0;
  if (left-- <= 0) {
    mode = uniform(0, 5);
    left = uniform(1, 4000);
  }
  if (mode == 0) return 0;
  if (mode == 1) return 255;
  if (mode == 2) return uniform(0, 1) == 1 ? 255 : 0;
  return static_cast<uint8_t>(rng());
}

/// An input image of random levels; everything around the pixels is random too.
struct Image {
  ImageLayout layout;
  Exact<uint8_t> memory;

  explicit Image(const ImageLayout& l) : layout(l), memory(static_cast<size_t>(l.image_bytes) + 3) {
    for (size_t i = 0; i < memory.size(); ++i)
      memory[i] = random_level();
  }
  Image(int64_t c, int64_t h, int64_t w) : Image(random_layout(c, h, w)) {}
  ConstImageView view() const { return {&layout, memory.data()}; }
  int operator()(int64_t c, int64_t y, int64_t x) const {
    return memory[static_cast<size_t>(layout.offset(y, x) + c)];
  }
};

std::string describe(const ImageLayout& l) {
  return std::to_string(l.channels) + "x" + std::to_string(l.h) + "x" + std::to_string(l.w) +
         " pitch " + std::to_string(l.pitch) + " phases " + std::to_string(l.phases);
}

using Level = std::function<int(int64_t c, int64_t y, int64_t x)>;
using Operation = std::function<void(ImageView out, Part part)>;

/// Runs the operation on every instruction set in 1, 2 and 3 parts. `first` and `count`: the
/// channels that it writes; `exact`: it leaves the bytes behind them alone.
void check_operation(const std::string& what, const ImageLayout& l, const Level& expected,
                     const Operation& run, int64_t first = 0, int64_t count = -1,
                     bool exact = false) {
  if (count < 0) count = l.channels;
  const auto size = static_cast<size_t>(l.image_bytes) + 3;
  // What each byte may be: outside, spare (between channels and pitch), or an expected level.
  constexpr int kOutside = -1, kSpare = -2;
  std::vector<int> want(size, kOutside);
  for (int64_t y = 0; y < l.h; ++y) {
    for (int64_t x = 0; x < l.w; ++x) {
      const int64_t at = l.offset(y, x);
      if (!exact)
        for (int64_t c = 0; c < l.pitch; ++c)
          want[static_cast<size_t>(at + c)] = kSpare;
      for (int64_t c = 0; c < count; ++c)
        want[static_cast<size_t>(at + first + c)] = expected(c, y, x);
    }
  }
  std::vector<uint8_t> canary(size);
  for (auto& byte : canary)
    byte = static_cast<uint8_t>(rng());
  for (const Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    const check::Family family(isa_name(isa));
    for (int64_t parts = 1; parts <= 3; ++parts) {
      // Two runs over opposite canaries show every byte that is written, whatever its value.
      Exact<uint8_t> a(size), b(size);
      std::vector<uint8_t> writer(size, 0);
      int64_t twice = 0, outside = 0, missing = 0, wrong = 0;
      for (int64_t part = 0; part < parts; ++part) {
        std::vector<uint8_t> before_a(canary), before_b(size);
        for (size_t i = 0; i < size; ++i)
          before_b[i] = static_cast<uint8_t>(~canary[i]);
        std::memcpy(a.data(), before_a.data(), size);
        std::memcpy(b.data(), before_b.data(), size);
        run({&l, a.data()}, {part, parts});
        run({&l, b.data()}, {part, parts});
        for (size_t i = 0; i < size; ++i) {
          const bool written = a[i] != before_a[i] || b[i] != before_b[i];
          if (!written) continue;
          outside += want[i] == kOutside;
          twice += writer[i] != 0;
          writer[i] = 1;
          if (want[i] >= 0) wrong += a[i] != want[i] || b[i] != want[i];
        }
      }
      for (size_t i = 0; i < size; ++i)
        missing += want[i] >= 0 && writer[i] == 0;
      CHECK_MSG(outside == 0 && twice == 0 && missing == 0 && wrong == 0,
                what + " " + describe(l) + " " + std::string(isa_name(isa)) + " parts " +
                    std::to_string(parts) + ": outside " + std::to_string(outside) + ", twice " +
                    std::to_string(twice) + ", missing " + std::to_string(missing) + ", wrong " +
                    std::to_string(wrong));
    }
  }
  force_isa("auto");
}

float random_scale() {
  // Ties (0.5), values that leave the int32 range, and overflows to infinity and NaN.
  static const std::vector<float> kSpecial = {0.5f, -0.5f, 1.0f, 0.25f, 1e9f, -3e8f, 3e38f, 0.0f};
  if (uniform(0, 3) == 0) return pick(kSpecial);
  return static_cast<float>(uniform(-2000, 2000)) * 1e-3f;
}
float random_offset() {
  return uniform(0, 5) == 0 ? pick<float>({3e38f, -3e38f, 0.5f, -1e9f})
                            : static_cast<float>(uniform(-30000, 30000)) * 0.01f;
}

struct RandomFinish {
  std::vector<uint8_t> table;
  U8Finish finish;
  RandomFinish() {
    finish.zero_point = uniform(0, 2) == 0 ? pick<int>({0, 255}) : uniform(0, 255);
    int low = 0, high = 255;
    if (uniform(0, 1) == 1) {
      low = uniform(0, 255);
      high = uniform(low, 255);
    }
    finish.lo = static_cast<float>(low - finish.zero_point);
    finish.hi = static_cast<float>(high - finish.zero_point);
    finish.inv_scale = pick<float>({1.0f, 0.37f, 1.9f});
    if (uniform(0, 2) == 0) {
      for (int i = 0; i < 256; ++i)
        table.push_back(static_cast<uint8_t>(rng()));
      finish.table = table.data();
    }
  }
};

std::vector<float> random_floats(int64_t n, float (*value)()) {
  std::vector<float> v;
  for (int64_t i = 0; i < n; ++i)
    v.push_back(value());
  return v;
}

std::vector<uint8_t> random_table() {
  std::vector<uint8_t> table(256);
  for (auto& v : table)
    v = static_cast<uint8_t>(rng());
  return table;
}

/// Sizes of an image with c channels, small where there are many.
struct Size {
  int64_t h, w;
  explicit Size(int64_t c) : h(uniform(1, c > 100 ? 3 : 6)), w(uniform(1, c > 100 ? 4 : 11)) {}
};

}  // namespace

TEST(lookup) {
  for (const int64_t c : channel_counts()) {
    const Size s(c);
    const Image in(c, s.h, s.w);
    const auto table = Exact<uint8_t>::of(random_table());
    const auto expected = [&](int64_t k, int64_t y, int64_t x) -> int {
      return table[static_cast<size_t>(in(k, y, x))];
    };
    check_operation("lookup", random_layout(c, s.h, s.w), expected,
                    [&](ImageView out, Part part) { lookup(table.data(), in.view(), out, part); });
  }
}

TEST(add_and_mul) {
  for (const int64_t c : channel_counts()) {
    for (const bool broadcast : {false, true}) {
      const Size s(c);
      const Image a(c, s.h, s.w), b(c, broadcast ? 1 : s.h, broadcast ? 1 : s.w);
      const auto level_b = [&](int64_t k, int64_t y, int64_t x) {
        return broadcast ? b(k, 0, 0) : b(k, y, x);
      };
      const RandomFinish f;
      const PairSpec spec{uniform(0, 255), uniform(0, 255), random_scale(), random_scale(),
                          f.finish};
      check_operation(
          broadcast ? "broadcast add" : "add", random_layout(c, s.h, s.w),
          [&](int64_t k, int64_t y, int64_t x) -> int {
            return add_u8(static_cast<uint8_t>(a(k, y, x)), static_cast<uint8_t>(level_b(k, y, x)),
                          spec);
          },
          [&](ImageView out, Part part) { add(spec, a.view(), b.view(), out, part); });
      check_operation(
          broadcast ? "broadcast mul" : "mul", random_layout(c, s.h, s.w),
          [&](int64_t k, int64_t y, int64_t x) -> int {
            return mul_u8(static_cast<uint8_t>(a(k, y, x)), static_cast<uint8_t>(level_b(k, y, x)),
                          spec);
          },
          [&](ImageView out, Part part) { mul(spec, a.view(), b.view(), out, part); });
    }
  }
}

/// NaN is the lowest level, on processors whose conversion makes 0 of it, too.
TEST(product_of_infinity_and_nothing) {
  const Image a(20, 3, 5), b(a.layout);
  U8Finish finish;
  finish.lo = -50.0f;
  finish.hi = 60.0f;
  finish.zero_point = 90;
  const PairSpec spec{3, 100, 3e38f, 0.0f, finish};
  check_operation(
      "mul", a.layout,
      [&](int64_t k, int64_t y, int64_t x) -> int {
        return mul_u8(static_cast<uint8_t>(a(k, y, x)), static_cast<uint8_t>(b(k, y, x)), spec);
      },
      [&](ImageView out, Part part) { mul(spec, a.view(), b.view(), out, part); });
}

TEST(elementwise_in_place) {
  for (const int64_t c : {1, 3, 7, 20, 64, 100}) {
    const Image a(c, 3, 5), b(a.layout);
    const RandomFinish f;
    const PairSpec spec{20, 30, 0.3f, 0.4f, f.finish};
    for (const Isa isa : supported_isas()) {
      force_isa(isa_name(isa));
      const check::Family family(isa_name(isa));
      auto copy = Exact<uint8_t>::of(
          std::vector<uint8_t>(a.memory.data(), a.memory.data() + a.memory.size()));
      const ImageView out{&a.layout, copy.data()};
      add(spec, out, b.view(), out, {0, 1});
      bool same = true;
      for (int64_t y = 0; y < 3; ++y)
        for (int64_t x = 0; x < 5; ++x)
          for (int64_t k = 0; k < c; ++k)
            same &= out.pixel(y, x)[k] == add_u8(static_cast<uint8_t>(a(k, y, x)),
                                                 static_cast<uint8_t>(b(k, y, x)), spec);
      CHECK_MSG(same, describe(a.layout) + " " + std::string(isa_name(isa)));
    }
    force_isa("auto");
  }
}

TEST(affine) {
  for (const int64_t c : channel_counts()) {
    const Size s(c);
    const Image in(c, s.h, s.w);
    const RandomFinish f;
    const bool tame = uniform(0, 1) == 1;
    auto scales = random_floats(c, random_scale), biases = random_floats(c, random_offset);
    if (tame)
      for (int64_t k = 0; k < c; ++k) {
        scales[static_cast<size_t>(k)] = static_cast<float>(uniform(-4, 4)) * 0.25f;
        biases[static_cast<size_t>(k)] = static_cast<float>(uniform(-100, 100)) * 0.5f;
      }
    const auto scale = Exact<float>::of(scales), bias = Exact<float>::of(biases);
    const AffineSpec spec{scale.data(), bias.data(), f.finish};
    check_operation(
        "affine", random_layout(c, s.h, s.w),
        [&](int64_t k, int64_t y, int64_t x) -> int {
          return affine_u8(static_cast<uint8_t>(in(k, y, x)), k, spec);
        },
        [&](ImageView out, Part part) { affine(spec, in.view(), out, part); });
  }
}

TEST(affine_image) {
  for (const int64_t c : channel_counts())
    for (int form = 0; form < 4; ++form) {
      const Size s(c);
      const Image in(c, s.h, s.w);
      const RandomFinish f;
      const bool of_image[] = {form % 2 == 1, form >= 2};
      const int64_t elements = c * s.h * s.w;
      const auto scale = Exact<float>::of(random_floats(of_image[0] ? elements : c, random_scale));
      const auto bias = Exact<float>::of(random_floats(of_image[1] ? elements : c, random_offset));
      const AffineImageSpec spec{scale.data(), bias.data(), of_image[0], of_image[1], f.finish};
      const double largest = affine_image_bound(spec, c, elements);
      check_operation(
          "affine_image " + std::to_string(form), random_layout(c, s.h, s.w),
          [&](int64_t k, int64_t y, int64_t x) -> int {
            const int64_t at = (y * s.w + x) * c + k;
            const float value =
                std::fmaf(static_cast<float>(in(k, y, x)), scale[size_t(of_image[0] ? at : k)],
                          bias[size_t(of_image[1] ? at : k)]);
            return finish_u8(value, spec.finish);
          },
          [&](ImageView out, Part part) { affine_image(spec, largest, in.view(), out, part); });
    }
}

TEST(constant) {
  for (const int64_t c : channel_counts()) {
    const Size s(c);
    std::vector<uint8_t> drawn(static_cast<size_t>(c * s.h * s.w));
    for (auto& level : drawn)
      level = random_level();
    const auto levels = Exact<uint8_t>::of(drawn);
    check_operation(
        "constant", random_layout(c, s.h, s.w),
        [&](int64_t k, int64_t y, int64_t x) -> int {
          return levels[static_cast<size_t>((y * s.w + x) * c + k)];
        },
        [&](ImageView out, Part part) { constant(levels.data(), out, part); });
  }
}

TEST(copy_piece) {
  for (const int64_t c : channel_counts())
    for (const int64_t axis : {1, 2}) {
      // Three pieces; the parts are of all of them together.
      std::vector<Image> pieces;
      std::vector<int64_t> begins;
      const Size s(c);
      int64_t end = 0;
      for (int k = 0; k < 3; ++k) {
        const int64_t n = uniform(1, 4);
        pieces.emplace_back(c, axis == 1 ? n : s.h, axis == 1 ? s.w : n);
        begins.push_back(end);
        end += n;
      }
      const auto table = random_table();
      const size_t mapped = static_cast<size_t>(uniform(0, 3));
      check_operation(
          "copy_piece " + std::to_string(axis),
          random_layout(c, axis == 1 ? end : s.h, axis == 1 ? s.w : end),
          [&](int64_t k, int64_t y, int64_t x) -> int {
            const int64_t at = axis == 1 ? y : x;
            const size_t piece = at >= begins[2] ? 2 : at >= begins[1] ? 1 : 0;
            const int64_t inside = at - begins[piece];
            const int q = pieces[piece](k, axis == 1 ? inside : y, axis == 1 ? x : inside);
            return piece == mapped ? table[static_cast<size_t>(q)] : q;
          },
          [&](ImageView out, Part part) {
            for (size_t k = 0; k < pieces.size(); ++k)
              copy_piece(pieces[k].view(), k == mapped ? table.data() : nullptr, out, axis,
                         begins[k], part);
          });
    }
}

TEST(copy_channels) {
  for (const int64_t c : channel_counts()) {
    const Size s(c);
    const Image in(c, s.h, s.w);
    const int64_t before = uniform(0, 40), behind = uniform(0, 40);
    const auto table = random_table();
    const bool mapped = uniform(0, 1) == 1;
    check_operation(
        "copy_channels", random_layout(before + c + behind, s.h, s.w),
        [&](int64_t k, int64_t y, int64_t x) -> int {
          const int q = in(k, y, x);
          return mapped ? table[static_cast<size_t>(q)] : q;
        },
        [&](ImageView out, Part part) {
          copy_channels(in.view(), mapped ? table.data() : nullptr, out, before, part);
        },
        before, c, true);
  }
}

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

TEST(slice) {
  for (const int64_t c : channel_counts()) {
    for (int64_t axis = 0; axis < 3; ++axis) {
      const Size s(c);
      const int64_t n = axis == 0 ? c : axis == 1 ? s.h : s.w;
      const int64_t begin = uniform(0, static_cast<int>(n) - 1), step = uniform(1, 3);
      const int64_t length = uniform(1, static_cast<int>((n - begin + step - 1) / step));
      const Image in(c, s.h, s.w);
      const int64_t shape[3] = {axis == 0 ? length : c, axis == 1 ? length : s.h,
                                axis == 2 ? length : s.w};
      check_operation(
          "slice axis " + std::to_string(axis), random_layout(shape[0], shape[1], shape[2]),
          [&](int64_t k, int64_t y, int64_t x) {
            if (axis == 0) return in(begin + k * step, y, x);
            return axis == 1 ? in(k, begin + y * step, x) : in(k, y, begin + x * step);
          },
          [&](ImageView out, Part part) { slice(axis, begin, step, in.view(), out, part); });
    }
  }
}

TEST(rearrange) {
  for (int round = 0; round < 80; ++round) {
    const int64_t c = pick(channel_counts()), h = uniform(1, 6), w = uniform(1, 6);
    const Image in(c, h, w);
    std::vector<std::vector<int32_t>> tables;
    if (round % 4 == 3) {
      // Channels shuffled, all of them or a half, of pixels that are moved, or repeated.
      const int64_t sizes[] = {h, w}, steps[] = {w, 1};
      std::vector<int32_t> order;
      const auto half = static_cast<int>(c / 2);
      for (int64_t k = 0; k < c; ++k)
        order.push_back(static_cast<int32_t>(k % 2 * half + k / 2));
      if (uniform(0, 1) == 0) std::shuffle(order.begin(), order.end(), rng);
      if (uniform(0, 1) == 0 && half > 0) order.erase(order.begin(), order.begin() + half);
      for (int32_t& k : order)
        k *= static_cast<int32_t>(h * w);
      tables.push_back(std::move(order));
      for (int axis = 0; axis < 2; ++axis) {
        const int shift = uniform(0, 3);
        std::vector<int32_t> table;
        for (int64_t i = 0; i < sizes[axis] + uniform(0, 2); ++i)
          table.push_back(static_cast<int32_t>((i + shift) % sizes[axis] * steps[axis]));
        tables.push_back(std::move(table));
      }
    } else if (round % 4 != 0) {
      // Axes in another order; places in memory add up.
      const int64_t sizes[] = {c, h, w}, steps[] = {h * w, w, 1};
      std::vector<size_t> order = {0, 1, 2};
      if (round % 4 == 1) std::shuffle(order.begin(), order.end(), rng);
      for (const size_t axis : order) {
        std::vector<int32_t> table;
        for (int64_t i = 0; i < sizes[axis]; ++i)
          table.push_back(static_cast<int32_t>(i * steps[axis]));
        if (uniform(0, 2) == 0) std::reverse(table.begin(), table.end());
        tables.push_back(std::move(table));
      }
    } else {
      // Any elements: sums of entries carry from one coordinate into the next.
      auto left = static_cast<int32_t>(c * h * w - 1);
      for (int axis = 0; axis < 3; ++axis) {
        std::vector<int32_t> table;
        for (int i = uniform(1, axis == 0 ? 70 : 6); i > 0; --i)
          table.push_back(uniform(0, left));
        left -= *std::max_element(table.begin(), table.end());
        tables.push_back(std::move(table));
      }
    }
    const RearrangeSpec spec{tables[0].data(), tables[1].data(), tables[2].data()};
    const auto size = [&](size_t axis) { return static_cast<int64_t>(tables[axis].size()); };
    check_operation(
        "rearrange of " + describe(in.layout), random_layout(size(0), size(1), size(2)),
        [&](int64_t oc, int64_t oy, int64_t ox) {
          const int64_t at = int64_t{tables[0][static_cast<size_t>(oc)]} +
                             tables[1][static_cast<size_t>(oy)] +
                             tables[2][static_cast<size_t>(ox)];
          return in(at / (h * w), at / w % h, at % w);
        },
        [&](ImageView out, Part part) { rearrange(spec, in.view(), out, part); });
  }
}

/// What a thread does around its pass through a program: the tile unit's configuration.
struct KernelScope {
  const KernelRow* row = active_kernels();
  KernelScope() {
    if (row != nullptr) row->begin();
  }
  ~KernelScope() {
    if (row != nullptr) row->end();
  }
};

/// Sizes around a block of queries, a group of keys or channels, and their halves.
AttentionShape random_attention() {
  AttentionShape n;
  n.sequences = uniform(0, 2) == 0 ? uniform(2, 3) : 1;
  n.queries = pick<int64_t>({1, 2, 5, 23, 24, 25, 31, 33, 49, 65});
  n.keys = uniform(0, 2) == 0 ? n.queries : pick<int64_t>({1, 2, 15, 16, 17, 33, 64, 65, 130});
  n.key_heads = uniform(1, 3);
  n.heads = n.key_heads * uniform(1, 2);
  n.depth = pick<int64_t>({1, 2, 3, 8, 17, 32, 64, 70});
  n.width = pick<int64_t>({1, 7, 15, 16, 17, 31, 33, 64, 65});
  return n;
}

namespace {

/// Runs `run(out, part)` over a float tensor on every instruction set in 1 to 3 parts; each element
/// must be written once, with the bits of `expected`.
void check_floats(const std::string& what, const std::vector<float>& expected,
                  const std::function<void(float*, Part)>& run) {
  const size_t n = expected.size();
  for (const Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    const check::Family family(isa_name(isa));
    for (int64_t parts = 1; parts <= 3; ++parts) {
      std::vector<int> writers(n, 0);
      int64_t wrong = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const Exact<float> out(n);
        for (size_t i = 0; i < n; ++i)
          out[i] = -12345.75f;
        run(out.data(), {part, parts});
        for (size_t i = 0; i < n; ++i) {
          if (out[i] == -12345.75f) continue;
          ++writers[i];
          wrong += std::memcmp(&out[i], &expected[i], sizeof(float)) != 0;
        }
      }
      const auto once = static_cast<size_t>(std::count(writers.begin(), writers.end(), 1));
      CHECK_MSG(wrong == 0 && once == n, what + " " + std::string(isa_name(isa)) + " parts " +
                                             std::to_string(parts) + ": wrong " +
                                             std::to_string(wrong) + ", written once " +
                                             std::to_string(once) + " of " + std::to_string(n));
    }
  }
  force_isa("auto");
}

}  // namespace

TEST(attention) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int round = 0; round < 80; ++round) {
    const AttentionShape n = random_attention();
    AttentionSpec s;
    s.zero_q = pick<int32_t>({0, 127, 255});
    s.zero_k = pick<int32_t>({0, 127, 255});
    s.zero_v = pick<int32_t>({0, 127, 255});
    s.scale = pick<float>({0.0f, 1e-5f, 1e-3f, -0.01f, 1e30f});
    s.value_scale = 0.05f;
    s.causal = uniform(0, 3) == 0;
    s.finish = {-20.0f, 220.0f, 30, nullptr, pick<float>({20.0f, 1e30f})};
    const int64_t matrix = n.queries * n.keys;
    const bool rows = n.sequences > 1 && uniform(0, 1) == 1, heads = uniform(0, 1) == 1;
    Exact<float> mask(
        static_cast<size_t>((rows ? n.sequences : 1) * (heads ? n.heads : 1) * matrix));
    for (size_t i = 0; i < mask.size(); ++i)
      mask[i] = uniform(0, 3) == 0 ? -kInfinity : static_cast<float>(uniform(-30, 30)) / 8.0f;
    if (round % 2 == 1) {
      if (uniform(0, 1) == 1)
        for (int64_t j = 0; j < n.keys; ++j)  // a query that meets no key
          mask[static_cast<size_t>(j)] = -kInfinity;
      s.mask = mask.data();
      s.mask_head = heads ? matrix : 0;
      s.mask_sequence = rows ? (heads ? n.heads : 1) * matrix : 0;
    }
    Exact<float> hidden(static_cast<size_t>(n.keys));
    for (size_t i = 0; i < hidden.size(); ++i)
      hidden[i] = uniform(0, 2) == 0 ? pick<float>({-kInfinity, -3e38f}) : 0.0f;
    if (n.sequences == 1 && round % 4 > 1) s.keys = hidden.data();
    // One sequence may lie in several rows, and keys and values in others.
    const auto image = [&](int64_t channels, int64_t tokens) {
      int64_t h = n.sequences;
      if (h == 1 && tokens % 5 == 0) h = 5;
      return Image(channels, h, n.sequences > 1 ? tokens : tokens / h);
    };
    const Image q = image(n.heads * n.depth, n.queries), k = image(n.key_heads * n.depth, n.keys),
                v = image(n.key_heads * n.width, n.keys);
    const auto planar = [&](const Image& from) {
      std::vector<uint8_t> levels;
      for (int64_t c = 0; c < from.layout.channels; ++c)
        for (int64_t y = 0; y < from.layout.h; ++y)
          for (int64_t x = 0; x < from.layout.w; ++x)
            levels.push_back(static_cast<uint8_t>(from(c, y, x)));
      return levels;
    };
    const int64_t h = q.layout.h, w = q.layout.w;
    std::vector<float> reals(static_cast<size_t>(n.heads * n.width * h * w));
    reference::attention(n, s, planar(q).data(), planar(k).data(), planar(v).data(), reals.data());
    check_operation(
        "attention of " + describe(q.layout) + " with " + describe(k.layout),
        random_layout(n.heads * n.width, h, w),
        [&](int64_t c, int64_t y, int64_t x) {
          return finish_u8(reals[static_cast<size_t>((c * h + y) * w + x)], s.finish);
        },
        [&](ImageView out, Part part) {
          const KernelScope scope;
          attention(n, s, q.view(), k.view(), v.view(), out, part);
        },
        0, -1, true);
    check_floats("attention_f32 of " + describe(q.layout), reals, [&](float* out, Part part) {
      const KernelScope scope;
      attention_f32(n, s, q.view(), k.view(), v.view(), {out, 1, h * w}, part);
    });
  }
}

TEST(gather_channels) {
  for (const int64_t c : channel_counts()) {
    for (int kind = 0; kind < 3; ++kind) {
      if (kind == 0 && c % 2 != 0) continue;
      // Shuffle of two groups, of any groups, and any selection.
      std::vector<int32_t> order;
      if (kind < 2) {
        int64_t groups = kind == 0 ? 2 : uniform(1, 8);
        while (c % groups != 0)
          --groups;
        for (int64_t i = 0; i < c; ++i)
          order.push_back(static_cast<int32_t>(i % groups * (c / groups) + i / groups));
      } else {
        for (int64_t i = uniform(1, 300); i > 0; --i)
          order.push_back(uniform(0, static_cast<int>(c) - 1));
      }
      const Size s(c);
      const Image in(c, s.h, s.w);
      const auto index = Exact<int32_t>::of(order);
      check_operation(
          "gather", random_layout(static_cast<int64_t>(order.size()), s.h, s.w),
          [&](int64_t k, int64_t y, int64_t x) { return in(order[static_cast<size_t>(k)], y, x); },
          [&](ImageView out, Part part) { gather_channels(index.data(), in.view(), out, part); });
    }
  }
}

TEST(pad) {
  for (const int64_t c : channel_counts()) {
    const Size s(c);
    const Image in(c, s.h, s.w);
    const int64_t top = uniform(-2, 3), left = uniform(-3, 3);
    const int64_t h = std::max<int64_t>(1, top + s.h + uniform(-2, 3));
    const int64_t w = std::max<int64_t>(1, left + s.w + uniform(-2, 3));
    const auto level = static_cast<uint8_t>(rng());
    check_operation(
        "pad", random_layout(c, h, w),
        [&](int64_t k, int64_t y, int64_t x) -> int {
          const int64_t iy = y - top, ix = x - left;
          return iy >= 0 && iy < s.h && ix >= 0 && ix < s.w ? in(k, iy, ix) : level;
        },
        [&](ImageView out, Part part) { pad(top, left, level, in.view(), out, part); });
  }
}

namespace {

/// Tables of one axis: any positions, or those of an enlargement.
struct Axis {
  std::vector<int32_t> low, high;
  std::vector<float> part;
  Axis(int64_t in, int64_t out) {
    const bool random = uniform(0, 1) == 1;
    const auto last = static_cast<int32_t>(in - 1);
    for (int64_t i = 0; i < out; ++i) {
      low.push_back(random ? uniform(0, last) : static_cast<int32_t>(i * in / out));
      high.push_back(random ? uniform(0, last) : std::min(low.back() + 1, last));
      part.push_back(static_cast<float>(uniform(0, 64)) / 64.0f);
    }
  }
};

struct ResizeCase {
  Axis h, w;
  RandomFinish f;
  Exact<int32_t> low_h, high_h, low_w, high_w;
  Exact<float> part_h, part_w;
  ResizeSpec spec;
  ResizeCase(int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, bool bilinear)
      : h(in_h, out_h),
        w(in_w, out_w),
        low_h(Exact<int32_t>::of(h.low)),
        high_h(Exact<int32_t>::of(h.high)),
        low_w(Exact<int32_t>::of(w.low)),
        high_w(Exact<int32_t>::of(w.high)),
        part_h(Exact<float>::of(h.part)),
        part_w(Exact<float>::of(w.part)),
        spec{bilinear,      low_h.data(),  high_h.data(),  part_h.data(),   low_w.data(),
             high_w.data(), part_w.data(), random_scale(), random_offset(), f.finish} {}
  ResizeCase(const ResizeCase&) = delete;
};

}  // namespace

TEST(resize) {
  for (const int64_t c : channel_counts()) {
    for (const bool bilinear : {false, true}) {
      const Size s(c);
      const Image in(c, s.h, s.w);
      const int64_t h = uniform(1, 8), w = uniform(1, c > 100 ? 5 : 14);
      const ResizeCase r(s.h, s.w, h, w, bilinear);
      const ResizeSpec& spec = r.spec;
      check_operation(
          bilinear ? "bilinear" : "nearest", random_layout(c, h, w),
          [&](int64_t k, int64_t y, int64_t x) -> int {
            const int y0 = spec.low_h[y], y1 = spec.high_h[y];
            const int x0 = spec.low_w[x], x1 = spec.high_w[x];
            if (!bilinear) return in(k, y0, x0);
            const float y_value =
                blend(static_cast<float>(in(k, y0, x0)), static_cast<float>(in(k, y0, x1)),
                      static_cast<float>(in(k, y1, x0)), static_cast<float>(in(k, y1, x1)),
                      spec.part_w[x], spec.part_h[y]);
            return finish_u8(std::fmaf(y_value, spec.scale, spec.offset), spec.finish);
          },
          [&](ImageView out, Part part) { resize(spec, in.view(), out, part); });
    }
  }
}

TEST(rms_norm) {
  for (const int64_t c : channel_counts()) {
    const Size s(c);
    const Image in(c, s.h, s.w);
    const RandomFinish f;
    const auto gamma = Exact<float>::of(random_floats(c, random_scale));
    const auto beta = Exact<float>::of(random_floats(c, random_offset));
    LayerNormSpec spec;
    spec.about_zero = true;
    spec.zero_point = uniform(0, 255);
    spec.step = uniform(1, 100) * 0.0137;
    spec.eps = pick<double>({1e-5, 1e-6, 1e-12});
    spec.gamma = gamma.data();
    spec.beta = beta.data();
    spec.finish = f.finish;
    check_operation(
        "rms_norm", random_layout(c, s.h, s.w),
        [&](int64_t k, int64_t y, int64_t x) -> int {
          int64_t sum = 0;
          for (int64_t i = 0; i < c; ++i) {
            const int64_t q = in(i, y, x) - spec.zero_point;
            sum += q * q;
          }
          const double mean = static_cast<double>(sum) / static_cast<double>(c);
          const double rms = 1.0 / std::sqrt(mean * (spec.step * spec.step) + spec.eps);
          const auto q = static_cast<float>(in(k, y, x) - spec.zero_point);
          const float value =
              std::fmaf(q * static_cast<float>(rms * spec.step), spec.gamma[k], spec.beta[k]);
          return finish_u8(value, spec.finish);
        },
        [&](ImageView out, Part part) { layer_norm(spec, in.view(), out, part); });
  }
}

TEST(embedding) {
  for (const int64_t c : channel_counts()) {
    const Size s(c);
    const int64_t rows = pick<int64_t>({1, 2, 30});
    auto table = Exact<uint8_t>(static_cast<size_t>(rows * c));
    for (size_t i = 0; i < table.size(); ++i)
      table[i] = random_level();
    auto ids = Exact<int32_t>(static_cast<size_t>(s.h * s.w));
    for (size_t i = 0; i < ids.size(); ++i)
      ids[i] = uniform(0, static_cast<int>(rows) - 1);
    // Somebody wrote into the memory after it was checked: another row, and nothing outside.
    if (c % 3 == 0) ids[0] = pick<int32_t>({INT32_MIN, -1, static_cast<int32_t>(rows), INT32_MAX});
    const EmbeddingSpec spec{table.data(), rows, c};
    check_operation(
        "embedding", random_layout(c, s.h, s.w),
        [&](int64_t k, int64_t y, int64_t x) -> int {
          const int64_t id = ids[static_cast<size_t>(y * s.w + x)];
          return table[static_cast<size_t>(std::clamp<int64_t>(id, 0, rows - 1) * c + k)];
        },
        [&](ImageView out, Part part) { embedding(spec, ids.data(), out, part); });
  }
}

TEST(layer_norm) {
  for (const int64_t c : channel_counts()) {
    const Size s(c);
    const Image in(c, s.h, s.w);
    const RandomFinish f;
    const auto gamma = Exact<float>::of(random_floats(c, random_scale));
    const auto beta = Exact<float>::of(random_floats(c, random_offset));
    LayerNormSpec spec;
    spec.step = uniform(1, 100) * 0.0137;
    spec.eps = pick<double>({1e-5, 1e-6, 1e-12});
    spec.gamma = gamma.data();
    spec.beta = beta.data();
    spec.finish = f.finish;
    check_operation(
        "layer_norm", random_layout(c, s.h, s.w),
        [&](int64_t k, int64_t y, int64_t x) -> int {
          int64_t s1 = 0, s2 = 0;
          for (int64_t i = 0; i < c; ++i) {
            s1 += in(i, y, x);
            s2 += in(i, y, x) * in(i, y, x);
          }
          const double mean = static_cast<double>(s1) / static_cast<double>(c);
          const double var = static_cast<double>(c * s2 - s1 * s1) / static_cast<double>(c * c);
          const double rstd = 1.0 / std::sqrt(var * (spec.step * spec.step) + spec.eps);
          const auto centred = static_cast<float>(in(k, y, x) - mean);
          const float value = std::fmaf(centred * static_cast<float>(rstd * spec.step),
                                        spec.gamma[k], spec.beta[k]);
          return finish_u8(value, spec.finish);
        },
        [&](ImageView out, Part part) { layer_norm(spec, in.view(), out, part); });
  }
}

TEST(group_norm) {
  for (const int64_t c : channel_counts()) {
    std::vector<int64_t> divisors;
    for (int64_t g = 1; g <= c; ++g)
      if (c % g == 0) divisors.push_back(g);
    const int64_t groups = uniform(0, 1) == 1 ? 1 : pick(divisors), channels = c / groups;
    const Size s(c);
    const Image in(c, s.h, s.w);
    const RandomFinish f;
    const auto gamma = Exact<float>::of(random_floats(c, random_scale));
    const auto beta = Exact<float>::of(random_floats(c, random_offset));
    GroupNormSpec spec;
    spec.groups = groups;
    spec.norm.step = uniform(1, 100) * 0.0137;
    spec.norm.eps = pick<double>({1e-5, 1e-6, 1e-12});
    spec.norm.gamma = gamma.data();
    spec.norm.beta = beta.data();
    spec.norm.finish = f.finish;
    spec.norm.finish.table = nullptr;
    const int64_t count = channels * s.h * s.w;
    std::vector<int64_t> s1(static_cast<size_t>(groups)), s2(static_cast<size_t>(groups));
    for (int64_t k = 0; k < c; ++k)
      for (int64_t y = 0; y < s.h; ++y)
        for (int64_t x = 0; x < s.w; ++x) {
          s1[static_cast<size_t>(k / channels)] += in(k, y, x);
          s2[static_cast<size_t>(k / channels)] += in(k, y, x) * in(k, y, x);
        }
    check_operation(
        "group_norm of " + std::to_string(groups), random_layout(c, s.h, s.w),
        [&](int64_t k, int64_t y, int64_t x) -> int {
          const auto g = static_cast<size_t>(k / channels);
          const double mean = static_cast<double>(s1[g]) / static_cast<double>(count);
          const double var = static_cast<double>(count * s2[g] - s1[g] * s1[g]) /
                             static_cast<double>(count * count);
          const double step = spec.norm.step;
          const double rstd = 1.0 / std::sqrt(var * (step * step) + spec.norm.eps);
          const auto centred = static_cast<float>(in(k, y, x) - mean);
          const float value = std::fmaf(centred * static_cast<float>(rstd * step), gamma[size_t(k)],
                                        beta[size_t(k)]);
          return finish_u8(value, spec.norm.finish);
        },
        [&](ImageView out, Part part) { group_norm(spec, in.view(), out, part); });
  }
}

TEST(reshape) {
  for (const int64_t c : {1, 2, 3, 5, 8, 17, 33, 70}) {
    const Size s(c);
    const int64_t plane = s.h * s.w;
    const Image image(c, s.h, s.w), flat(c * plane, 1, 1);
    check_operation(
        "flatten", random_layout(c * plane, 1, 1),
        [&](int64_t k, int64_t, int64_t) { return image(k / plane, k % plane / s.w, k % s.w); },
        [&](ImageView out, Part part) { reshape(image.view(), out, part); });
    check_operation(
        "unflatten", random_layout(c, s.h, s.w),
        [&](int64_t k, int64_t y, int64_t x) { return flat(k * plane + y * s.w + x, 0, 0); },
        [&](ImageView out, Part part) { reshape(flat.view(), out, part); }, 0, -1, true);
  }
}

TEST(quantize_image) {
  for (const int64_t c : channel_counts()) {
    for (const Layout order : {Layout::NCHW, Layout::NHWC}) {
      const int64_t h = uniform(1, 4), w = uniform(1, c > 100 ? 20 : 40);
      ActivationGrid grid;
      grid.qmax = pick<int>({255, 255, 15, 1});
      grid.zero_point = uniform(0, grid.qmax);
      grid.inv_scale = pick<float>({1.0f, 2.0f, 37.5f, 1e-3f});
      std::vector<float> values = random_floats(c * h * w, [] {
        if (uniform(0, 20) == 0)
          return pick<float>(
              {std::nanf(""), HUGE_VALF, -HUGE_VALF, 3e38f, -0.0f, 0.5f, 1.5f, 2.5f});
        return static_cast<float>(uniform(-3000, 3000)) * 0.01f;
      });
      const auto x = Exact<float>::of(values);
      check_operation(
          order == Layout::NCHW ? "quantize NCHW" : "quantize NHWC", random_layout(c, h, w),
          [&](int64_t k, int64_t y, int64_t column) -> int {
            const int64_t at =
                order == Layout::NCHW ? (k * h + y) * w + column : (y * w + column) * c + k;
            return quantize_value(values[static_cast<size_t>(at)], grid);
          },
          [&](ImageView out, Part part) { quantize_image(x.data(), order, grid, out, part); });
    }
  }
}

TEST(dequantize_image) {
  for (const int64_t c : channel_counts()) {
    for (const bool vector : {false, true}) {
      const int64_t h = vector ? 1 : uniform(1, 5), w = vector ? 1 : uniform(1, 40);
      const Image in(c, h, w);
      const float scale = 0.0173f;
      const int32_t zero_point = uniform(0, 255);
      std::vector<float> expected;
      for (int64_t k = 0; k < c; ++k)
        for (int64_t y = 0; y < h; ++y)
          for (int64_t x = 0; x < w; ++x)
            expected.push_back(
                dequantize_value(static_cast<uint8_t>(in(k, y, x)), scale, zero_point));
      check_floats("dequantize " + describe(in.layout), expected, [&](float* out, Part part) {
        dequantize_image(in.view(), scale, zero_point, out, part);
      });
    }
  }
}

TEST(resize_f32) {
  for (int round = 0; round < 60; ++round) {
    const int64_t c = uniform(1, 4), in_h = uniform(1, 9), in_w = uniform(1, 9);
    const int64_t h = uniform(1, 20), w = uniform(1, 50);
    const bool bilinear = round % 2 == 0;
    const ResizeCase r(in_h, in_w, h, w, bilinear);
    const ResizeSpec& spec = r.spec;
    const auto in = Exact<float>::of(random_floats(
        c * in_h * in_w, [] { return static_cast<float>(uniform(-9999, 9999)) * 0.317f; }));
    std::vector<float> expected;
    for (int64_t k = 0; k < c; ++k) {
      for (int64_t y = 0; y < h; ++y) {
        for (int64_t x = 0; x < w; ++x) {
          const auto at = [&](int64_t iy, int64_t ix) {
            return in[static_cast<size_t>((k * in_h + iy) * in_w + ix)];
          };
          const int y0 = spec.low_h[y], y1 = spec.high_h[y];
          const int x0 = spec.low_w[x], x1 = spec.high_w[x];
          expected.push_back(bilinear ? blend(at(y0, x0), at(y0, x1), at(y1, x0), at(y1, x1),
                                              spec.part_w[x], spec.part_h[y])
                                      : at(y0, x0));
        }
      }
    }
    check_floats("resize_f32", expected, [&](float* out, Part part) {
      resize_f32(spec, in.data(), c, in_h, in_w, out, h, w, part);
    });
  }
}

TEST(softmax_f32) {
  for (const int64_t positions : {1, 2, 3, 7, 8, 16, 17, 40}) {
    for (const int64_t c : {1, 2, 9, 16, 21, 100, 1000}) {
      const auto in = Exact<float>::of(random_floats(c * positions, [] {
        return static_cast<float>(uniform(-3000, 3000)) * pick<float>({0.01f, 0.0001f, 1.0f});
      }));
      std::vector<float> expected(static_cast<size_t>(c * positions));
      double worst = 0.0;
      for (int64_t p = 0; p < positions; ++p) {
        const auto at = [&](int64_t k) { return static_cast<size_t>(k * positions + p); };
        float top = in[at(0)];
        for (int64_t k = 1; k < c; ++k)
          top = std::max(top, in[at(k)]);
        double sum = 0.0, exact_sum = 0.0;
        for (int64_t k = 0; k < c; ++k) {
          sum += static_cast<double>(softmax_exp(in[at(k)] - top));
          exact_sum += std::exp(static_cast<double>(in[at(k)]) - static_cast<double>(top));
        }
        for (int64_t k = 0; k < c; ++k) {
          expected[at(k)] = softmax_exp(in[at(k)] - top) * static_cast<float>(1.0 / sum);
          const double exact =
              std::exp(static_cast<double>(in[at(k)]) - static_cast<double>(top)) / exact_sum;
          worst = std::max(worst, std::fabs(static_cast<double>(expected[at(k)]) - exact));
        }
      }
      CHECK_MSG(worst < 4e-7, std::to_string(worst));
      check_floats("softmax", expected,
                   [&](float* out, Part part) { softmax_f32(in.data(), c, positions, out, part); });
    }
  }
}

TEST(functions_and_pairs_of_floats) {
  for (const int64_t n : {1, 7, 8, 15, 16, 17, 33, 1000}) {
    const auto values = [&] {
      auto v = random_floats(n, [] {
        return static_cast<float>(uniform(-3000, 3000)) * pick<float>({0.01f, 0.0001f, 1.0f});
      });
      for (const float special : {0.0f, -0.0f, 3e38f, -3e38f, 88.0f, -88.0f, 1e-30f})
        v[static_cast<size_t>(uniform(0, static_cast<int>(n) - 1))] = special;
      return Exact<float>::of(v);
    };
    const auto a = values(), b = values();
    for (int function = 0; function < kFloatFunctions; ++function) {
      const FloatFunctionSpec spec{static_cast<FloatFunction>(function), -0.75f, 1.5f};
      std::vector<float> expected;
      double worst = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        const auto x = static_cast<double>(a[static_cast<size_t>(i)]);
        const float y = float_function(a[static_cast<size_t>(i)], spec);
        expected.push_back(y);
        const double sigmoid = 1.0 / (1.0 + std::exp(-x));
        if (spec.function == FloatFunction::Sigmoid && x > -80.0)
          worst = std::max(worst, std::fabs(static_cast<double>(y) - sigmoid) / sigmoid);
        if (spec.function == FloatFunction::Tanh)
          worst = std::max(worst, std::fabs(static_cast<double>(y) - std::tanh(x)));
      }
      CHECK_MSG(worst < 4e-7, std::to_string(worst));
      check_floats("function " + std::to_string(function), expected,
                   [&](float* out, Part part) { function_f32(spec, a.data(), n, out, part); });
    }
    for (int k = 0; k < kFloatPairs; ++k) {
      const auto pair = static_cast<FloatPair>(k);
      std::vector<float> expected;
      for (int64_t i = 0; i < n; ++i)
        expected.push_back(float_pair(a[static_cast<size_t>(i)], b[static_cast<size_t>(i)], pair));
      check_floats("pair " + std::to_string(k), expected, [&](float* out, Part part) {
        combine_f32(pair, a.data(), b.data(), n, out, part);
      });
    }
  }
}

TEST(norms_to_floats) {
  for (const int64_t c : channel_counts()) {
    std::vector<int64_t> divisors;
    for (int64_t g = 1; g <= c; ++g)
      if (c % g == 0) divisors.push_back(g);
    const Size s(c);
    const Image in(c, s.h, s.w);
    const auto gamma = Exact<float>::of(random_floats(c, random_scale));
    const auto beta = Exact<float>::of(random_floats(c, random_offset));
    GroupNormSpec spec;
    spec.groups = pick(divisors);
    spec.norm.about_zero = uniform(0, 1) == 1;
    spec.norm.zero_point = uniform(0, 255);
    spec.norm.step = uniform(1, 100) * 0.0137;
    spec.norm.gamma = gamma.data();
    spec.norm.beta = beta.data();
    const int64_t plane = s.h * s.w, channels = c / spec.groups;
    /// The levels of `n` channels from `first` on, at positions [begin, end).
    const auto moments = [&](int64_t first, int64_t n, int64_t begin, int64_t end) {
      int64_t s1 = 0, s2 = 0;
      for (int64_t p = begin; p < end; ++p)
        for (int64_t k = first; k < first + n; ++k) {
          const int64_t level = in(k, p / s.w, p % s.w);
          s1 += level;
          s2 += level * level;
        }
      return layer_norm_moments(s1, s2, n * (end - begin), spec.norm);
    };
    std::vector<float> rows, groups;
    for (int64_t k = 0; k < c; ++k)
      for (int64_t p = 0; p < plane; ++p) {
        const auto level = static_cast<uint8_t>(in(k, p / s.w, p % s.w));
        rows.push_back(layer_norm_value(level, k, moments(0, c, p, p + 1), spec.norm));
      }
    for (int64_t k = 0; k < c; ++k) {
      const LayerNormMoments m = moments(k / channels * channels, channels, 0, plane);
      for (int64_t p = 0; p < plane; ++p) {
        const auto level = static_cast<uint8_t>(in(k, p / s.w, p % s.w));
        groups.push_back(layer_norm_value(level, k, m, spec.norm));
      }
    }
    check_floats("layer_norm_f32", rows,
                 [&](float* out, Part part) { layer_norm_f32(spec.norm, in.view(), out, part); });
    check_floats("group_norm_f32", groups,
                 [&](float* out, Part part) { group_norm_f32(spec, in.view(), out, part); });
  }
}

TEST(norms_and_lines_of_floats) {
  for (const int64_t c : {1, 2, 6, 9, 32, 65}) {
    const int64_t h = uniform(1, 5), w = uniform(1, 40), plane = h * w;
    const auto x = Exact<float>::of(
        random_floats(c * plane, [] { return static_cast<float>(uniform(-3000, 3000)) * 0.01f; }));
    const auto gamma = Exact<float>::of(random_floats(c, random_scale));
    const auto beta = Exact<float>::of(random_floats(c, random_offset));
    GroupNormSpec spec;
    spec.groups = c % 3 == 0 ? 3 : 1;
    spec.norm.about_zero = uniform(0, 1) == 1;
    spec.norm.gamma = gamma.data();
    spec.norm.beta = beta.data();
    const auto at = [&](int64_t k, int64_t p) {
      return static_cast<double>(x[static_cast<size_t>(k * plane + p)]);
    };
    const auto moments = [&](int64_t first, int64_t n, int64_t begin, int64_t end, bool zero) {
      const auto count = static_cast<double>(n * (end - begin));
      const auto total = [&](double mean, bool squares) {
        double sum = 0.0;
        for (int64_t p = begin; p < end; ++p) {
          double along = 0.0;
          for (int64_t k = first; k < first + n; ++k)
            along += squares ? (at(k, p) - mean) * (at(k, p) - mean) : at(k, p);
          sum += along;
        }
        return sum;
      };
      const double mean = zero ? 0.0 : total(0.0, false) / count;
      return float_moments(mean, total(mean, true), n * (end - begin), spec.norm);
    };
    const auto value = [&](int64_t k, int64_t p, const FloatMoments& m) {
      const auto i = static_cast<size_t>(k);
      return std::fmaf(float_normal(static_cast<float>(at(k, p)), m), gamma[i], beta[i]);
    };
    std::vector<float> rows, groups, lines, turned;
    const int64_t channels = c / spec.groups;
    for (int64_t k = 0; k < c; ++k) {
      const FloatMoments m = moments(k / channels * channels, channels, 0, plane, false);
      for (int64_t p = 0; p < plane; ++p) {
        const auto i = static_cast<size_t>(k);
        rows.push_back(value(k, p, moments(0, c, p, p + 1, spec.norm.about_zero)));
        groups.push_back(value(k, p, m));
        lines.push_back(std::fmaf(static_cast<float>(at(k, p)), gamma[i], beta[i]));
      }
    }
    check_floats("layer_norm_floats", rows, [&](float* out, Part part) {
      layer_norm_floats(spec.norm, x.data(), c, plane, out, part);
    });
    check_floats("group_norm_floats", groups, [&](float* out, Part part) {
      group_norm_floats(spec, x.data(), c, plane, out, part);
    });
    check_floats("affine_f32", lines, [&](float* out, Part part) {
      affine_f32({gamma.data(), beta.data(), {}}, x.data(), c, plane, out, part);
    });
    // Channels to columns, rows to channels, flipped columns to rows.
    std::vector<int32_t> tables[3];
    for (int64_t y = 0; y < h; ++y)
      tables[0].push_back(static_cast<int32_t>(y * w));
    for (int64_t k = w; k-- > 0;)
      tables[1].push_back(static_cast<int32_t>(k));
    for (int64_t k = 0; k < c; ++k)
      tables[2].push_back(static_cast<int32_t>(k * plane));
    for (int64_t y = 0; y < h; ++y)
      for (int64_t column = w; column-- > 0;)
        for (int64_t k = 0; k < c; ++k)
          turned.push_back(x[static_cast<size_t>(k * plane + y * w + column)]);
    check_floats("rearrange_f32", turned, [&](float* out, Part part) {
      rearrange_f32({tables[0].data(), tables[1].data(), tables[2].data()}, x.data(), out, h, w, c,
                    part);
    });
  }
}

TEST(float_convolutions) {
  struct Case {
    int64_t c, h, w, outs, kernel_h, kernel_w, stride, pad, dilation, groups;
  };
  std::vector<Case> cases = {
      {3, 17, 19, 8, 3, 3, 2, 1, 1, 1},  {8, 9, 9, 12, 3, 2, 1, 1, 1, 4},
      {300, 1, 1, 70, 1, 1, 1, 0, 1, 1}, {64, 5, 4, 33, 1, 1, 1, 0, 1, 1},
      {16, 7, 7, 16, 3, 3, 1, 2, 2, 16}, {16, 3, 3, 40, 3, 3, 1, 0, 1, 1},
      {5, 3, 2, 9, 2, 2, 1, 0, 1, 1},    {1, 1, 1, 1, 1, 1, 1, 0, 1, 1},
      {257, 2, 3, 31, 1, 1, 1, 0, 1, 1}, {30, 13, 20, 7, 3, 3, 3, 4, 2, 1},
      {4, 12, 12, 32, 5, 5, 1, 2, 1, 2}, {2, 4, 40, 3, 1, 3, 1, 1, 1, 1},
      {512, 1, 1, 32, 1, 1, 1, 0, 1, 1}, {2, 1, 7, 64, 1, 1, 1, 0, 1, 1},
  };
  for (int k = 0; k < 20; ++k) {
    const int64_t groups = uniform(1, 3);
    cases.push_back({groups * uniform(1, 9), uniform(3, 12), uniform(3, 12), groups * uniform(1, 9),
                     uniform(1, 3), uniform(1, 3), uniform(1, 3), uniform(0, 3), 1, groups});
  }
  for (const Case& n : cases) {
    FloatConvSpec spec;
    spec.shape = {.batch = 1,
                  .in_channels = n.c,
                  .in_h = n.h,
                  .in_w = n.w,
                  .out_channels = n.outs,
                  .kernel_h = n.kernel_h,
                  .kernel_w = n.kernel_w,
                  .stride_h = n.stride,
                  .stride_w = n.stride,
                  .pad_top = n.pad,
                  .pad_left = n.pad,
                  .pad_bottom = n.pad,
                  .pad_right = n.pad,
                  .dilation_h = n.dilation,
                  .dilation_w = n.dilation,
                  .groups = n.groups};
    const auto number = [] { return static_cast<float>(uniform(-3000, 3000)) * 1.37e-3f; };
    const int64_t images = uniform(1, 3), in_size = n.c * n.h * n.w;
    const int64_t out_size = n.outs * spec.shape.out_h() * spec.shape.out_w();
    const auto x = Exact<float>::of(random_floats(images * in_size, number));
    const auto weights = Exact<float>::of(random_floats(n.outs * spec.shape.reduction(), number));
    const auto bias = Exact<float>::of(random_floats(n.outs, number));
    spec.weights = weights.data();
    spec.bias = bias.data();
    if (uniform(0, 1) == 1) {
      spec.lo = -1.5f;
      spec.hi = pick<float>({2.0f, INFINITY});
    }
    std::vector<float> expected(static_cast<size_t>(images * out_size));
    for (int64_t k = 0; k < images; ++k)
      reference::float_conv(spec, x.data() + k * in_size, expected.data() + k * out_size);
    const FloatConv conv(spec);
    const FloatConv own(spec, std::vector<float>(weights.data(), weights.data() + weights.size()));
    CHECK_EQ(static_cast<double>(own.bytes()) <= float_conv_bytes(spec.shape, true), true);
    const std::string what = "float_conv of " + std::to_string(n.c) + " channels, " +
                             std::to_string(n.outs) + " outputs";
    for (const FloatConv* each : {&conv, &own})
      check_floats(what, expected,
                   [&](float* out, Part part) { each->run(x.data(), out, images, part); });
  }
}

// Machines with VBMI never call the plain AVX-512 versions through the table.
#ifdef ADALAYER_HAVE_AVX512
TEST(avx512_without_vbmi) {
  if (!isa_supported(Isa::Avx512)) {
    CHECK(!cpu_features().avx512vbmi);
    return;
  }
  for (const int64_t n : {1, 10, 16, 20, 31, 32, 58, 64, 100, 116, 300}) {
    constexpr int64_t kPixels = 9;
    const Image in(2 * n, 1, kPixels);
    const Exact<uint8_t> out(static_cast<size_t>(2 * n * kPixels));
    const auto table = random_table();
    std::vector<int32_t> index;
    for (int64_t i = 0; i < n; ++i) {
      index.push_back(static_cast<int32_t>(i));
      index.push_back(static_cast<int32_t>(n + i));
    }
    const Pixels pixels{in.view().row(0), in.layout.pitch, out.data(), 2 * n, 2 * n, kPixels};
    const auto count = [&](const auto& expected) {
      int64_t wrong = 0;
      for (int64_t x = 0; x < kPixels; ++x)
        for (int64_t k = 0; k < 2 * n; ++k)
          wrong += out[static_cast<size_t>(x * 2 * n + k)] != expected(k, x);
      return wrong;
    };
    kAvx512Image.lookup(table.data(), pixels);
    CHECK_EQ(count([&](int64_t k, int64_t x) { return table[static_cast<size_t>(in(k, 0, x))]; }),
             0);
    kAvx512Image.gather({index.data(), true, 0, n, nullptr, nullptr, nullptr}, pixels);
    CHECK_EQ(count([&](int64_t k, int64_t x) { return in(index[static_cast<size_t>(k)], 0, x); }),
             0);
  }
}
#endif

int main(int argc, char** argv) { return check::run_all(argc, argv); }

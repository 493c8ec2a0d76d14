// Operations that only move elements, resize, or change their form, against plain loops.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "image/cases.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

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

/// Rows or columns that choose channels, too: what is read of a pixel ends where it does. Layouts
/// without padding have nothing behind the one that there is.
TEST(rearrange_from_some_channel_on) {
  for (int round = 0; round < 30; ++round)
    for (const size_t axis : {1, 2}) {
      const auto c = pick<int64_t>({12, 44, 63, 65, 127});
      const int64_t part = c / 8, first = c - 2 * part;
      if (round % 2 == 1) Exact<uint8_t>(1);  // the page that cannot be read is behind the next one
      const Image in(c, 1, 1);
      std::vector<int32_t> tables[3] = {{}, {0}, {0}};
      for (int64_t k = 0; k < part; ++k)  // every other one, the last ones first
        tables[0].push_back(static_cast<int32_t>(2 * (part - 1 - k)));
      tables[axis] = {static_cast<int32_t>(first)};
      const RearrangeSpec spec{tables[0].data(), tables[1].data(), tables[2].data()};
      check_operation(
          "rearrange of " + describe(in.layout), random_layout(part, 1, 1),
          [&](int64_t oc, int64_t, int64_t) { return in(first + 2 * (part - 1 - oc), 0, 0); },
          [&](ImageView out, Part share) { rearrange(spec, in.view(), out, share); });
    }
}

TEST(gather_channels) {
  for (const int64_t c : channel_counts()) {
    for (int kind = 0; kind < 4; ++kind) {
      if (kind == 0 && c % 2 != 0) continue;
      // Shuffle of two groups, of any groups, any selection, and what is nearly the first.
      std::vector<int32_t> order;
      if (kind < 2) {
        int64_t groups = kind == 0 ? 2 : uniform(1, 8);
        while (c % groups != 0)
          --groups;
        for (int64_t i = 0; i < c; ++i)
          order.push_back(static_cast<int32_t>(i % groups * (c / groups) + i / groups));
      } else if (kind == 2) {
        for (int64_t i = uniform(1, 300); i > 0; --i)
          order.push_back(uniform(0, static_cast<int>(c) - 1));
      } else {
        for (int32_t i = 0; i < c; ++i) {
          order.push_back(i);
          order.push_back(uniform(0, static_cast<int>(c) - 1));
        }
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

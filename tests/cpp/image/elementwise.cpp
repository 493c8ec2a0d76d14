// Operations on elements by themselves against plain loops over the formulas.
#include <cmath>
#include <string>
#include <vector>

#include "cpu/image_kernels.hpp"
#include "image/cases.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

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

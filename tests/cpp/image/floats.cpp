// Functions, pairs, softmax and convolutions of floats against the formulas and the reference.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/image/float_conv.hpp"
#include "image/cases.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

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
        combine_f32(CombinedFloats(pair, {n, 1, 1}, {n, 1, 1}, {n, 1, 1}), a.data(), b.data(), out,
                    part);
      });
    }
  }
}

TEST(pairs_of_floats_of_different_sizes) {
  for (int round = 0; round < 60; ++round) {
    int64_t size[3], a[3], b[3];
    for (int k = 0; k < 3; ++k) {
      size[k] = uniform(1, 9);
      a[k] = uniform(0, 2) == 0 ? 1 : size[k];
      b[k] = uniform(0, 2) == 0 && a[k] == size[k] ? 1 : size[k];
    }
    const auto values = [](const int64_t (&n)[3]) {
      return Exact<float>::of(random_floats(n[0] * n[1] * n[2], [] {
        return static_cast<float>(uniform(1, 3000)) * pick<float>({0.01f, -0.03f});
      }));
    };
    const auto x = values(a), y = values(b);
    const auto at = [](const int64_t (&n)[3], int64_t c, int64_t h, int64_t w) {
      return static_cast<size_t>(((n[0] == 1 ? 0 : c) * n[1] + (n[1] == 1 ? 0 : h)) * n[2] +
                                 (n[2] == 1 ? 0 : w));
    };
    const auto pair = static_cast<FloatPair>(round % kFloatPairs);
    std::vector<float> expected;
    for (int64_t c = 0; c < size[0]; ++c)
      for (int64_t h = 0; h < size[1]; ++h)
        for (int64_t w = 0; w < size[2]; ++w)
          expected.push_back(float_pair(x[at(a, c, h, w)], y[at(b, c, h, w)], pair));
    check_floats("pair of sizes", expected, [&](float* out, Part part) {
      combine_f32(CombinedFloats(pair, a, b, size), x.data(), y.data(), out, part);
    });
  }
}

TEST(reductions_of_floats) {
  for (int round = 0; round < 60; ++round) {
    ReduceSpec spec;
    spec.kind = static_cast<Reduction>(round % kReductions);
    const int axes = uniform(1, 7);
    for (int k = 0; k < 3; ++k)
      spec.along[k] = (axes >> k & 1) != 0;
    const int64_t c = uniform(1, 9), h = uniform(1, 5), w = pick<int64_t>({1, 7, 64, 65, 150});
    const auto x = Exact<float>::of(random_floats(
        c * h * w, [] { return static_cast<float>(uniform(-3000, 3000)) * 1.37e-3f; }));
    const int64_t rows = spec.along[1] ? 1 : h, columns = spec.along[2] ? 1 : w;
    std::vector<double> sums(static_cast<size_t>((spec.along[0] ? 1 : c) * rows * columns));
    for (int64_t i = 0; i < c * h * w; ++i) {
      const int64_t k = spec.along[0] ? 0 : i / (h * w), y = spec.along[1] ? 0 : i / w % h;
      sums[static_cast<size_t>((k * rows + y) * columns + (spec.along[2] ? 0 : i % w))] +=
          reduction_term(static_cast<double>(x[static_cast<size_t>(i)]), spec.kind);
    }
    const int64_t count = c * h * w / static_cast<int64_t>(sums.size());
    std::vector<float> expected;
    for (const double sum : sums)
      expected.push_back(reduced_floats(sum, count, spec.kind));
    check_floats("reduction", expected,
                 [&](float* out, Part part) { reduce_floats(spec, x.data(), c, h, w, out, part); });
  }
}

TEST(reductions_of_levels) {
  for (int round = 0; round < 60; ++round) {
    ReduceSpec spec;
    spec.kind = static_cast<Reduction>(round % kReductions);
    spec.zero_point = pick<int>({0, 3, 128, 255});
    spec.step = 0.0123;
    const int axes = uniform(1, 7);
    for (int k = 0; k < 3; ++k)
      spec.along[k] = (axes >> k & 1) != 0;
    // Long enough for more squares than 32 bits hold.
    const bool large = round % 20 == 1;
    const int64_t c = large ? 2 : pick<int64_t>({1, 3, 63, 64, 65, 130});
    const int64_t h = large ? 300 : uniform(1, 5), w = large ? 500 : uniform(1, 9);
    const ImageLayout layout = image_layout(c, h, w, {1, 2, 0, 1});
    std::vector<uint8_t> memory(static_cast<size_t>(layout.image_bytes + layout.slack));
    for (auto& q : memory)
      q = large ? 255 : static_cast<uint8_t>(rng());
    const ConstImageView in{&layout, memory.data()};
    const int64_t rows = spec.along[1] ? 1 : h, columns = spec.along[2] ? 1 : w;
    std::vector<int64_t> sums(static_cast<size_t>((spec.along[0] ? 1 : c) * rows * columns));
    for (int64_t k = 0; k < c; ++k)
      for (int64_t y = 0; y < h; ++y)
        for (int64_t x = 0; x < w; ++x) {
          const int64_t q = in.pixel(y, x)[k] - spec.zero_point;
          sums[static_cast<size_t>(
              ((spec.along[0] ? 0 : k) * rows + (spec.along[1] ? 0 : y)) * columns +
              (spec.along[2] ? 0 : x))] += spec.kind == Reduction::Norm ? q * q : q;
        }
    const int64_t count = c * h * w / static_cast<int64_t>(sums.size());
    std::vector<float> expected;
    for (const int64_t sum : sums)
      expected.push_back(reduced_levels(sum, count, spec));
    check_floats("reduction of levels", expected,
                 [&](float* out, Part part) { reduce(spec, in, out, part); });
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

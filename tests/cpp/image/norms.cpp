// Norms of levels and of floats against plain loops over the formulas.
#include <cmath>
#include <string>
#include <vector>

#include "image/cases.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

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

// Layer, RMS and group norm, of levels or floats, and to levels or floats.
#include <algorithm>

#include "cpu/image/ops.hpp"
#include "cpu/image/rows.hpp"

namespace adalayer::cpu {
namespace {

struct ForMoments {};
struct ForFloats {};

/// Moments of the channels [first, first + n) of all positions together.
LayerNormMoments moments_of_image(const LayerNormSpec& spec, ConstImageView in, int64_t first,
                                  int64_t n) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout& a = *in.layout;
  auto* sums = thread_scratch<int64_t, ForMoments>(2 * a.w);
  auto* squares = sums + a.w;
  int64_t s1 = 0, s2 = 0;
  for (int64_t y = 0; y < a.h; ++y) {
    kernels.moments(in.row(y) + first, a.pitch, n, a.w, sums, squares);
    for (int64_t x = 0; x < a.w; ++x) {
      s1 += sums[x];
      s2 += squares[x];
    }
  }
  return layer_norm_moments(s1, s2, n * a.h * a.w, spec);
}

/// The part's share of a norm's floats, in planes: moments(pixel) gives those of its channels
/// [first, first + n). Some pixels at a time, so that neighbours in a plane are written together.
template <class Moments>
void normalize_planes(const LayerNormSpec& spec, ConstImageView in, int64_t first, int64_t n,
                      float* out, Part part, const Moments& moments) {
  constexpr int64_t kPixels = 16;
  const ImageKernels& kernels = image_kernels();
  const ImageLayout& a = *in.layout;
  const int64_t plane = a.h * a.w, blocks = (plane + kPixels - 1) / kPixels;
  float* rows = thread_scratch<float, ForFloats>(kPixels * n);
  for (int64_t block = part.first(blocks); block < part.last(blocks); ++block) {
    const int64_t begin = block * kPixels, count = std::min(kPixels, plane - begin);
    for (int64_t k = 0; k < count; ++k) {
      const uint8_t* pixel = in.pixel((begin + k) / a.w, (begin + k) % a.w) + first;
      const LayerNormMoments m = moments(pixel);
      kernels.normalize_floats(spec, m.mean, m.factor, pixel, n, rows + k * n);
    }
    for (int64_t c = 0; c < n; ++c)
      for (int64_t k = 0; k < count; ++k)
        out[(first + c) * plane + begin + k] = rows[k * n + c];
  }
}

/// sums[p] = sum over channels of term(x, p), for `count` positions from `in` on.
template <class Term>
void add_up(const float* in, int64_t channels, int64_t plane, int64_t count, double* sums,
            const Term& term) {
  std::fill_n(sums, count, 0.0);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = 0; p < count; ++p)
      sums[p] += term(static_cast<double>(in[c * plane + p]), p);
}

constexpr int64_t kPositions = 64;  // of planes, handled together

}  // namespace

void layer_norm(const LayerNormSpec& spec, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  const int64_t n = b.channels;
  auto* sums = thread_scratch<int64_t, ForMoments>(2 * b.w);
  auto* squares = sums + b.w;
  auto* means = thread_scratch<double, ForMoments>(b.w);
  auto* factors = thread_scratch<float, ForMoments>(b.w);
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y) {
    kernels.moments(in.row(y), a.pitch, n, b.w, sums, squares);
    for (int64_t x = 0; x < b.w; ++x) {
      const LayerNormMoments m = layer_norm_moments(sums[x], squares[x], n, spec);
      means[x] = m.mean;
      factors[x] = m.factor;
    }
    kernels.normalize(spec, means, factors, {in.row(y), a.pitch, out.row(y), b.pitch, n, b.w});
    apply_table(kernels, spec.finish, out, y);
  }
}

void group_norm(const GroupNormSpec& spec, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  const int64_t n = b.channels / spec.groups;
  auto* means = thread_scratch<double, ForMoments>(b.w);
  auto* factors = thread_scratch<float, ForMoments>(b.w);
  for (int64_t g = 0; g < spec.groups; ++g) {
    // Every part adds up the whole group: that is a fraction of the rest.
    LayerNormSpec norm = spec.norm;
    const LayerNormMoments m = moments_of_image(norm, in, g * n, n);
    std::fill(means, means + b.w, m.mean);
    std::fill(factors, factors + b.w, m.factor);
    norm.gamma += g * n;
    norm.beta += g * n;
    for (int64_t y = part.first(b.h); y < part.last(b.h); ++y)
      kernels.normalize(norm, means, factors,
                        {in.row(y) + g * n, a.pitch, out.row(y) + g * n, b.pitch, n, b.w});
  }
}

void layer_norm_f32(const LayerNormSpec& spec, ConstImageView in, float* out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const int64_t n = in.layout->channels;
  normalize_planes(spec, in, 0, n, out, part, [&](const uint8_t* pixel) {
    int64_t s1 = 0, s2 = 0;
    kernels.moments(pixel, 0, n, 1, &s1, &s2);
    return layer_norm_moments(s1, s2, n, spec);
  });
}

void group_norm_f32(const GroupNormSpec& spec, ConstImageView in, float* out, Part part) {
  const int64_t n = in.layout->channels / spec.groups;
  for (int64_t g = 0; g < spec.groups; ++g) {
    const LayerNormMoments m = moments_of_image(spec.norm, in, g * n, n);
    LayerNormSpec norm = spec.norm;
    norm.gamma += g * n;
    norm.beta += g * n;
    normalize_planes(norm, in, g * n, n, out, part, [&](const uint8_t*) { return m; });
  }
}

void layer_norm_floats(const LayerNormSpec& spec, const float* in, int64_t channels, int64_t plane,
                       float* out, Part part) {
  const ImageKernels& kernels = image_kernels();
  double sums[kPositions], squares[kPositions];
  FloatMoments moments[kPositions];
  float normal[kPositions];
  const auto n = static_cast<double>(channels);
  const int64_t last = part.last(plane);
  for (int64_t begin = part.first(plane); begin < last; begin += kPositions) {
    const int64_t count = std::min(kPositions, last - begin);
    const float* x = in + begin;
    if (spec.about_zero)
      std::fill_n(sums, count, 0.0);
    else
      add_up(x, channels, plane, count, sums, [](double v, int64_t) { return v; });
    for (int64_t p = 0; p < count; ++p)
      sums[p] /= n;  // the means from here on
    add_up(x, channels, plane, count, squares,
           [&](double v, int64_t p) { return (v - sums[p]) * (v - sums[p]); });
    for (int64_t p = 0; p < count; ++p)
      moments[p] = float_moments(sums[p], squares[p], channels, spec);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < count; ++p)
        normal[p] = float_normal(x[c * plane + p], moments[p]);
      kernels.line_floats(normal, spec.gamma[c], spec.beta[c], count, out + c * plane + begin);
    }
  }
}

void group_norm_floats(const GroupNormSpec& spec, const float* in, int64_t channels, int64_t plane,
                       float* out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const int64_t n = channels / spec.groups;
  float normal[kPositions];
  for (int64_t g = part.first(spec.groups); g < part.last(spec.groups); ++g) {
    const float* x = in + g * n * plane;
    const auto total = [&](const auto& term) {
      double sums[kPositions], sum = 0.0;
      for (int64_t begin = 0; begin < plane; begin += kPositions) {
        const int64_t count = std::min(kPositions, plane - begin);
        add_up(x + begin, n, plane, count, sums, term);
        for (int64_t p = 0; p < count; ++p)
          sum += sums[p];
      }
      return sum;
    };
    const double mean = total([](double v, int64_t) { return v; }) / static_cast<double>(n * plane);
    const double squares = total([&](double v, int64_t) { return (v - mean) * (v - mean); });
    const FloatMoments m = float_moments(mean, squares, n * plane, spec.norm);
    for (int64_t c = g * n; c < (g + 1) * n; ++c)
      for (int64_t begin = 0; begin < plane; begin += kPositions) {
        const int64_t count = std::min(kPositions, plane - begin);
        for (int64_t p = 0; p < count; ++p)
          normal[p] = float_normal(in[c * plane + begin + p], m);
        kernels.line_floats(normal, spec.norm.gamma[c], spec.norm.beta[c], count,
                            out + c * plane + begin);
      }
  }
}

}  // namespace adalayer::cpu

// Operations that handle each level by itself, and layer norm.
#include "cpu/image/ops.hpp"

#include <cmath>

#include "cpu/image/rows.hpp"

namespace adalayer::cpu {
namespace {

/// How per-channel values repeat along a run. Several pixels make up a period where one is not a
/// whole number of vectors.
struct Period {
  bool rows;       // runs are rows, else single pixels
  int64_t pixels;  // per period
  int64_t pitch;
  int64_t length;  // pixels * pitch
};

Period make_period(ConstImageView in, ImageView out) {
  constexpr int64_t kVector = 64, kLongest = 2048;
  Period p{in.layout->pitch == out.layout->pitch, 1, out.layout->pitch, out.layout->pitch};
  if (p.rows) {
    int64_t pixels = 1;
    while (pixels * p.pitch % kVector != 0 && (pixels + 1) * p.pitch <= kLongest &&
           pixels < out.layout->w)
      ++pixels;
    if (pixels * p.pitch % kVector == 0 || pixels == out.layout->w) p.pixels = pixels;
  }
  p.length = p.pixels * p.pitch;
  return p;
}

struct ForSlope {};
struct ForOffset {};
struct ForBytes {};
struct ForMoments {};

/// value(c) for every channel, repeated over the period, with zeros between and behind.
template <class T, class Tag, class Value>
const T* spread(const Period& p, int64_t channels, const Value& value) {
  const int64_t length = (p.length + 63) / 64 * 64;
  T* values = thread_scratch<T, Tag>(length);
  for (int64_t i = 0; i < length; ++i)
    values[i] = T{};
  for (int64_t x = 0; x < p.pixels; ++x)
    for (int64_t c = 0; c < channels; ++c)
      values[x * p.pitch + c] = value(c);
  return values;
}

bool is_broadcast(ConstImageView a, ConstImageView b) {
  return b.layout->h == 1 && b.layout->w == 1 && (a.layout->h != 1 || a.layout->w != 1);
}

void lines(const LineArgs& args, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const int64_t h = out.layout->h;
  for (int64_t y = part.first(h); y < part.last(h); ++y) {
    each_run(in, out, y,
             [&](const uint8_t* from, uint8_t* to, int64_t n) { kernels.line(args, from, to, n); });
    apply_table(kernels, args.finish, out, y);
  }
}

/// fn(a, b, out, n) over runs of an operation on two images of one shape.
template <class Fn>
void each_pair(ConstImageView a, ConstImageView b, ImageView out, int64_t y, const Fn& fn) {
  const ImageLayout &la = *a.layout, &lb = *b.layout, &lo = *out.layout;
  const uint8_t *pa = a.row(y), *pb = b.row(y);
  uint8_t* po = out.row(y);
  if (la.pitch == lo.pitch && lb.pitch == lo.pitch) {
    fn(pa, pb, po, lo.w * lo.pitch);
    return;
  }
  for (int64_t x = 0; x < lo.w; ++x)
    fn(pa + x * la.pitch, pb + x * lb.pitch, po + x * lo.pitch, lo.channels);
}

double largest_real(float scale) { return 255.0 * std::fabs(static_cast<double>(scale)); }

/// Add or mul, whose results have at most the absolute value `largest`.
void pair(decltype(ImageKernels::add) kernel, const PairSpec& spec, double largest,
          ConstImageView a, ConstImageView b, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const bool bounded = is_bounded(largest, spec.finish);
  const int64_t h = out.layout->h;
  const bool broadcast = is_broadcast(a, b);
  const Period p = make_period(a, out);
  const uint8_t* repeated = nullptr;
  if (broadcast) {
    const uint8_t* levels = b.pixel(0, 0);
    repeated =
        spread<uint8_t, ForBytes>(p, out.layout->channels, [&](int64_t c) { return levels[c]; });
  }
  for (int64_t y = part.first(h); y < part.last(h); ++y) {
    if (broadcast)
      each_run(a, out, y, [&](const uint8_t* from, uint8_t* to, int64_t n) {
        kernel(spec, bounded, from, repeated, p.length, to, n);
      });
    else
      each_pair(a, b, out, y, [&](const uint8_t* pa, const uint8_t* pb, uint8_t* po, int64_t n) {
        kernel(spec, bounded, pa, pb, n, po, n);
      });
    apply_table(kernels, spec.finish, out, y);
  }
}

}  // namespace

void lookup(const uint8_t* table, ConstImageView in, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const int64_t h = out.layout->h;
  for (int64_t y = part.first(h); y < part.last(h); ++y)
    kernels.lookup(table, row_pixels(in, out, y));
}

void add(const PairSpec& spec, ConstImageView a, ConstImageView b, ImageView out, Part part) {
  const double largest = largest_real(spec.scale_a) + largest_real(spec.scale_b);
  pair(image_kernels().add, spec, largest, a, b, out, part);
}

void mul(const PairSpec& spec, ConstImageView a, ConstImageView b, ImageView out, Part part) {
  const double largest = largest_real(spec.scale_a) * largest_real(spec.scale_b);
  pair(image_kernels().mul, spec, largest, a, b, out, part);
}

void affine(const AffineSpec& spec, ConstImageView in, ImageView out, Part part) {
  const int64_t channels = out.layout->channels;
  bool bounded = true;
  for (int64_t c = 0; c < channels; ++c)
    bounded &= is_bounded(
        largest_real(spec.scale[c]) + std::fabs(static_cast<double>(spec.bias[c])), spec.finish);
  const Period p = make_period(in, out);
  const float* slope =
      spread<float, ForSlope>(p, channels, [&](int64_t c) { return spec.scale[c]; });
  const float* offset =
      spread<float, ForOffset>(p, channels, [&](int64_t c) { return spec.bias[c]; });
  lines({slope, offset, p.length, bounded, spec.finish}, in, out, part);
}

void copy_channels(ConstImageView in, const uint8_t* table, ImageView out, int64_t channel,
                   Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y) {
    const Pixels pixels{in.row(y), a.pitch, out.row(y) + channel, b.pitch, a.channels, b.w};
    if (table == nullptr)
      kernels.copy(pixels);
    else
      kernels.lookup(table, pixels);
  }
}

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

}  // namespace adalayer::cpu

// Operations that handle each level by itself.
#include "cpu/image/ops.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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
struct ForSlopes {};
struct ForOffsets {};

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
  const double x = largest_real(spec.scale_a), y = largest_real(spec.scale_b);
  // A factor beyond float32 is infinite, and 0 times that is NaN, which only a clamp brings to the
  // lowest level everywhere: conversions of it differ.
  constexpr double kMost = std::numeric_limits<float>::max();
  const double largest = x > kMost || y > kMost ? std::numeric_limits<double>::infinity() : x * y;
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

double affine_image_bound(const AffineImageSpec& spec, int64_t channels, int64_t elements) {
  const auto largest = [](const float* v, int64_t n) {
    float most = 0.0f;
    for (int64_t i = 0; i < n; ++i)
      most = std::max(most, std::fabs(v[i]));
    return most;
  };
  const float scale = largest(spec.scale, spec.scale_of_image ? elements : channels);
  const float bias = largest(spec.bias, spec.bias_of_image ? elements : channels);
  return largest_real(scale) + static_cast<double>(bias);
}

namespace {

/// One constant of affine_image, pixel after pixel at the pitch of the images.
class Field {
 public:
  Field(const float* values, bool of_image, const ImageLayout& l, int64_t pitch, int64_t pixels,
        float* memory)
      : values_(values), of_image_(of_image), layout_(l), pitch_(pitch), memory_(memory) {
    std::fill(memory, memory + scratch(pitch, pixels), 0.0f);
    for (int64_t x = 0; x < pixels && !of_image; ++x)
      std::copy_n(values, l.channels, memory + x * pitch);
  }

  /// Floats for so many pixels; kernels read whole blocks.
  static int64_t scratch(int64_t pitch, int64_t pixels) { return (pixels * pitch + 63) / 64 * 64; }

  /// The entries of `pixels` pixels of a row from column x on.
  const float* at(int64_t y, int64_t x, int64_t pixels) const {
    if (!of_image_) return memory_;
    const int64_t c = layout_.channels, first = (y * layout_.w + x) * c;
    const bool readable = first + scratch(pitch_, pixels) <= c * layout_.h * layout_.w;
    if ((pitch_ == c || pixels == 1) && readable) return values_ + first;
    for (int64_t k = 0; k < pixels; ++k)
      std::copy_n(values_ + first + k * c, c, memory_ + k * pitch_);
    return memory_;
  }

 private:
  const float* values_;
  bool of_image_;
  const ImageLayout& layout_;
  int64_t pitch_;
  float* memory_;
};

}  // namespace

void affine_image(const AffineImageSpec& spec, double largest, ConstImageView in, ImageView out,
                  Part part) {
  constexpr int64_t kLongest = 2048;  // bytes of a run: its constants stay in the first-level cache
  const ImageKernels& kernels = image_kernels();
  const ImageLayout &a = *in.layout, &b = *out.layout;
  const int64_t pitch = b.pitch;
  const int64_t most = a.pitch == pitch ? std::clamp<int64_t>(kLongest / pitch, 1, b.w) : 1;
  const int64_t length = Field::scratch(pitch, most);
  const Field slope(spec.scale, spec.scale_of_image, b, pitch, most,
                    thread_scratch<float, ForSlopes>(length));
  const Field offset(spec.bias, spec.bias_of_image, b, pitch, most,
                     thread_scratch<float, ForOffsets>(length));
  const bool bounded = is_bounded(largest, spec.finish);
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y) {
    for (int64_t x = 0; x < b.w; x += most) {
      const int64_t pixels = std::min(most, b.w - x);
      // (Of a last pixel the bytes behind the channels are nobody's.)
      const int64_t bytes = (pixels - 1) * pitch + b.channels;
      kernels.line({slope.at(y, x, pixels), offset.at(y, x, pixels), bytes, bounded, spec.finish},
                   in.pixel(y, x), out.pixel(y, x), bytes);
    }
    apply_table(kernels, spec.finish, out, y);
  }
}

void constant(const uint8_t* levels, ImageView out, Part part) {
  const ImageLayout& b = *out.layout;
  for (int64_t y = part.first(b.h); y < part.last(b.h); ++y)
    for (int64_t x = 0; x < b.w; ++x)
      std::memcpy(out.pixel(y, x), levels + (y * b.w + x) * b.channels,
                  static_cast<size_t>(b.channels));
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

}  // namespace adalayer::cpu

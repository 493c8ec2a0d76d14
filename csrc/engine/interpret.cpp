#include "engine/interpret.hpp"

#include <algorithm>
#include <cmath>
#include <map>

#include "core/status.hpp"
#include "engine/float_tail.hpp"
#include "engine/token_ids.hpp"
#include "formats/canonical.hpp"

namespace adalayer::engine {

namespace {

/// One image of a value.
struct Shape {
  int64_t c, h, w;
  explicit Shape(const Value& v) : c(v.c), h(v.h), w(v.w) {}
  int64_t at(int64_t ch, int64_t y, int64_t x) const { return (ch * h + y) * w + x; }
  int64_t size() const { return c * h * w; }
};

template <class F>
void for_each(const Shape& s, F&& f) {
  for (int64_t c = 0; c < s.c; ++c)
    for (int64_t y = 0; y < s.h; ++y)
      for (int64_t x = 0; x < s.w; ++x)
        f(c, y, x);
}

class Interpreter {
 public:
  Interpreter(const Program& program, std::span<const InputTensor> inputs, int64_t batch)
      : program_(program), tensors_(program.values.size()) {
    for (size_t v = 0; v < program.values.size(); ++v) {
      const auto count = static_cast<size_t>(batch * Shape(program.values[v]).size());
      if (program.values[v].kind == ValueKind::U8)
        tensors_[v].levels.resize(count);
      else if (program.values[v].kind == ValueKind::F32)
        tensors_[v].numbers.resize(count);
    }
    for (size_t k = 0; k < inputs.size(); ++k)
      read_input(program.inputs[k], inputs[k], batch);
    for (const Node& n : program.nodes) {
      weights_.clear();
      if (n.op == OpKind::Conv || n.op == OpKind::ConvTranspose || n.op == OpKind::Recurrence ||
          n.op == OpKind::Linear)
        weights_ = unpacked_weights(weights_of(program, n));
      if (n.op == OpKind::FloatConv) float_weights_ = unpacked_floats(program, n);
      for (int64_t image = 0; image < batch; ++image)
        run(n, image);
    }
  }

  std::vector<Tensor> take() { return std::move(tensors_); }

 private:
  void read_input(int32_t value, const InputTensor& in, int64_t batch) {
    const Shape s(program_.values[value]);
    if (program_.values[value].kind == ValueKind::I32) {  // of one channel: any layout is the same
      tensors_[value].ids.assign(in.ids(), in.ids() + batch * s.size());
      return;
    }
    float* out = tensors_[value].numbers.data();
    for (int64_t n = 0; n < batch; ++n)
      for_each(s, [&](int64_t c, int64_t y, int64_t x) {
        const int64_t from = in.layout == Layout::NCHW ? s.at(c, y, x) : (y * s.w + x) * s.c + c;
        out[n * s.size() + s.at(c, y, x)] = in.floats()[n * s.size() + from];
      });
  }

  const Value& value(int32_t v) const { return program_.values[v]; }
  uint8_t* levels(int32_t v, int64_t image) {
    return tensors_[v].levels.data() + image * Shape(value(v)).size();
  }
  float* numbers(int32_t v, int64_t image) {
    return tensors_[v].numbers.data() + image * Shape(value(v)).size();
  }

  void run(const Node& n, int64_t image);
  void quantize(const Node& n, int64_t image);
  void dequantize(const Node& n, int64_t image);
  void lookup(const Node& n, int64_t image);
  void affine(const Node& n, int64_t image);
  void gather(const Node& n, int64_t image);
  void function(const Node& n, int64_t image);
  void combine_floats(const Node& n, int64_t image);
  void reduce(const Node& n, int64_t image);
  void float_conv(const Node& n, int64_t image);
  void choose(const Node& n, int64_t image);
  void convolve(const Node& n, int64_t image);
  int32_t conv_sum(const Node& n, const ConvAttributes& a, const uint8_t* in, int64_t o, int64_t oy,
                   int64_t ox) const;
  int32_t transposed_sum(const Node& n, const ConvAttributes& a, const uint8_t* in, int64_t o,
                         int64_t oy, int64_t ox) const;
  void combine(const Node& n, int64_t image);
  void affine_image(const Node& n, int64_t image);
  void constant(const Node& n, int64_t image);
  void join(const Node& n, int64_t image);
  void group_norm(const Node& n, int64_t image);
  void max_pool(const Node& n, int64_t image);
  void average_floats(const Node& n, int64_t image);
  void avg_pool(const Node& n, int64_t image);
  void adaptive_avg_pool(const Node& n, int64_t image);
  void slice(const Node& n, int64_t image);
  void rearrange(const Node& n, int64_t image);
  void pad(const Node& n, int64_t image);
  void resize(const Node& n, int64_t image);
  void layer_norm(const Node& n, int64_t image);
  void normalise_floats(const Node& n, int64_t image, int64_t first_channel, int64_t channels,
                        int64_t first_position, int64_t positions, const LayerNormSpec& spec);
  void normalise(const Node& n, int64_t image, int64_t at, int64_t channel,
                 const LayerNormMoments& m, const LayerNormSpec& spec);
  void softmax(const Node& n, int64_t image);
  void attention(const Node& n, int64_t image);
  void embedding(const Node& n, int64_t image);
  void recurrence(const Node& n, int64_t image);
  void linear(const Node& n, int64_t image);

  const Program& program_;
  std::vector<Tensor> tensors_;
  std::vector<int8_t> weights_;       // of the node that runs
  std::vector<float> float_weights_;  // likewise; empty where the program holds them
};

int32_t Interpreter::conv_sum(const Node& n, const ConvAttributes& a, const uint8_t* in, int64_t o,
                              int64_t oy, int64_t ox) const {
  const Value& x = value(n.inputs[0]);
  const Shape s(x);
  const int64_t group_in = s.c / a.groups, group_out = value(n.output).c / a.groups;
  const int8_t* w = weights_.data() + o * group_in * a.kernel_h * a.kernel_w;
  int32_t sum = 0;
  const int64_t taps = a.kernel_h * a.kernel_w, plane = s.h * s.w;
  for (int64_t ky = 0; ky < a.kernel_h; ++ky)
    for (int64_t kx = 0; kx < a.kernel_w; ++kx) {
      const int64_t iy = oy * a.stride_h - a.pad_top + ky * a.dilation_h;
      const int64_t ix = ox * a.stride_w - a.pad_left + kx * a.dilation_w;
      if (iy < 0 || iy >= s.h || ix < 0 || ix >= s.w) continue;  // holds the zero point
      const uint8_t* level = in + s.at(o / group_out * group_in, iy, ix);
      const int8_t* tap = w + ky * a.kernel_w + kx;
      for (int64_t c = 0; c < group_in; ++c)
        sum += tap[c * taps] * (int32_t{level[c * plane]} - x.zero_point);
    }
  return sum;
}

int32_t Interpreter::transposed_sum(const Node& n, const ConvAttributes& a, const uint8_t* in,
                                    int64_t o, int64_t oy, int64_t ox) const {
  const Value& x = value(n.inputs[0]);
  const Shape s(x);
  const int64_t group_in = s.c / a.groups, group_out = value(n.output).c / a.groups;
  const int8_t* w = weights_.data() + o * group_in * a.kernel_h * a.kernel_w;
  int32_t sum = 0;
  const int64_t taps = a.kernel_h * a.kernel_w, plane = s.h * s.w;
  for (int64_t ky = 0; ky < a.kernel_h; ++ky)
    for (int64_t kx = 0; kx < a.kernel_w; ++kx) {
      // iy * stride - pad + ky * dilation = oy, where there is such an iy.
      const int64_t sy = oy + a.pad_top - ky * a.dilation_h;
      const int64_t sx = ox + a.pad_left - kx * a.dilation_w;
      if (sy < 0 || sx < 0 || sy % a.stride_h != 0 || sx % a.stride_w != 0) continue;
      const int64_t iy = sy / a.stride_h, ix = sx / a.stride_w;
      if (iy >= s.h || ix >= s.w) continue;
      const uint8_t* level = in + s.at(o / group_out * group_in, iy, ix);
      const int8_t* tap = w + ky * a.kernel_w + kx;
      for (int64_t c = 0; c < group_in; ++c)
        sum += tap[c * taps] * (int32_t{level[c * plane]} - x.zero_point);
    }
  return sum;
}

void Interpreter::convolve(const Node& n, int64_t image) {
  const ConvAttributes a = conv_attributes(n);
  const Shape out(value(n.output));
  const bool to_float = value(n.output).kind == ValueKind::F32;
  const uint8_t* in = levels(n.inputs[0], image);
  const float* scale = program_.constants[a.scale].f32().data();
  const float* bias = program_.constants[a.bias].f32().data();
  const U8Finish finish = node_finish(program_, n);
  const uint8_t* residual = n.inputs.size() == 2 ? levels(n.inputs[1], image) : nullptr;
  for_each(out, [&](int64_t o, int64_t oy, int64_t ox) {
    const int64_t i = out.at(o, oy, ox);
    const int32_t sum =
        n.op == OpKind::Conv ? conv_sum(n, a, in, o, oy, ox) : transposed_sum(n, a, in, o, oy, ox);
    float y = conv_value(sum, scale[o], bias[o]);
    if (residual != nullptr) {
      const Value& r = value(n.inputs[1]);
      y += dequantize_value(residual[i], r.scale, r.zero_point);
    }
    if (to_float)
      numbers(n.output, image)[i] = min_x86(max_x86(y, a.f32_lo), a.f32_hi);
    else
      levels(n.output, image)[i] = finish_u8(y, finish);
  });
}

/// Add and Mul.
void Interpreter::combine(const Node& n, int64_t image) {
  const Shape out(value(n.output)), second(value(n.inputs[1]));
  const uint8_t* a = levels(n.inputs[0], image);
  const uint8_t* b = levels(n.inputs[1], image);
  uint8_t* q = levels(n.output, image);
  // One value per channel, or one per position; the same for a 1 x 1 image.
  const bool per_channel = second.h == 1 && second.w == 1;
  const PairSpec spec = pair_spec(program_, n);
  for_each(out, [&](int64_t c, int64_t y, int64_t x) {
    const int64_t i = out.at(c, y, x);
    const uint8_t other = b[per_channel ? c : i];
    q[i] = n.op == OpKind::Add ? add_u8(a[i], other, spec) : mul_u8(a[i], other, spec);
  });
}

void Interpreter::max_pool(const Node& n, int64_t image) {
  const PoolSpec p = pool_spec(program_, n);
  const Shape in(value(n.inputs[0])), out(value(n.output));
  if (value(n.output).kind == ValueKind::F32)
    return maximum_f32(p, numbers(n.inputs[0], image), in.h, in.w, numbers(n.output, image), out.h,
                       out.w, 0, in.c);
  const uint8_t* a = levels(n.inputs[0], image);
  uint8_t* q = levels(n.output, image);
  for_each(out, [&](int64_t c, int64_t oy, int64_t ox) {
    uint8_t most = 0;  // no level is lower
    for (int64_t ky = 0; ky < p.kernel_h; ++ky)
      for (int64_t kx = 0; kx < p.kernel_w; ++kx) {
        const int64_t y = oy * p.stride_h - p.pad_top + ky * p.dilation_h;
        const int64_t x = ox * p.stride_w - p.pad_left + kx * p.dilation_w;
        if (y >= 0 && y < in.h && x >= 0 && x < in.w) most = std::max(most, a[in.at(c, y, x)]);
      }
    q[out.at(c, oy, ox)] = most;
  });
}

/// AvgPool and AdaptiveAvgPool over floats.
void Interpreter::average_floats(const Node& n, int64_t image) {
  const Shape in(value(n.inputs[0])), out(value(n.output));
  average_f32(pool_spec(program_, n), n.op == OpKind::AdaptiveAvgPool, numbers(n.inputs[0], image),
              in.h, in.w, numbers(n.output, image), out.h, out.w, 0, in.c);
}

void Interpreter::avg_pool(const Node& n, int64_t image) {
  const PoolSpec p = pool_spec(program_, n);
  const Shape in(value(n.inputs[0])), out(value(n.output));
  const uint8_t* a = levels(n.inputs[0], image);
  uint8_t* q = levels(n.output, image);
  for_each(out, [&](int64_t c, int64_t oy, int64_t ox) {
    int64_t sum = 0, valid = 0, padded = 0;
    for (int64_t ky = 0; ky < p.kernel_h; ++ky)
      for (int64_t kx = 0; kx < p.kernel_w; ++kx) {
        const int64_t y = oy * p.stride_h - p.pad_top + ky;
        const int64_t x = ox * p.stride_w - p.pad_left + kx;
        if (y < in.h + p.pad_bottom && x < in.w + p.pad_right) ++padded;
        if (y < 0 || y >= in.h || x < 0 || x >= in.w) continue;
        ++valid;
        sum += a[in.at(c, y, x)];
      }
    const float y = average_value(sum, valid, p.count_padding ? padded : valid, p);
    q[out.at(c, oy, ox)] = finish_u8(y, p.finish);
  });
}

void Interpreter::adaptive_avg_pool(const Node& n, int64_t image) {
  const PoolSpec p = pool_spec(program_, n);
  const Shape in(value(n.inputs[0])), out(value(n.output));
  const uint8_t* a = levels(n.inputs[0], image);
  uint8_t* q = levels(n.output, image);
  for_each(out, [&](int64_t c, int64_t oy, int64_t ox) {
    int64_t sum = 0, valid = 0;
    for (int64_t y = adaptive_begin(oy, in.h, out.h); y < adaptive_end(oy, in.h, out.h); ++y)
      for (int64_t x = adaptive_begin(ox, in.w, out.w); x < adaptive_end(ox, in.w, out.w); ++x) {
        ++valid;
        sum += a[in.at(c, y, x)];
      }
    q[out.at(c, oy, ox)] = finish_u8(average_value(sum, valid, valid, p), p.finish);
  });
}

void Interpreter::slice(const Node& n, int64_t image) {
  const SliceAttributes s = slice_attributes(n);
  const Shape in(value(n.inputs[0])), out(value(n.output));
  const uint8_t* a = levels(n.inputs[0], image);
  uint8_t* q = levels(n.output, image);
  for_each(out, [&](int64_t c, int64_t y, int64_t x) {
    int64_t from[] = {c, y, x};
    from[s.axis] = s.begin + from[s.axis] * s.step;
    q[out.at(c, y, x)] = a[in.at(from[0], from[1], from[2])];
  });
}

void Interpreter::rearrange(const Node& n, int64_t image) {
  const RearrangeSpec s = rearrange_spec(program_, n);
  const Shape out(value(n.output));
  const auto move = [&](const auto* from, auto* to) {
    for_each(out, [&](int64_t c, int64_t y, int64_t x) {
      to[out.at(c, y, x)] = from[int64_t{s.channel[c]} + s.row[y] + s.column[x]];
    });
  };
  if (value(n.output).kind == ValueKind::F32)
    move(numbers(n.inputs[0], image), numbers(n.output, image));
  else
    move(levels(n.inputs[0], image), levels(n.output, image));
}

void Interpreter::pad(const Node& n, int64_t image) {
  const PadAttributes p = pad_attributes(n);
  const Shape in(value(n.inputs[0])), out(value(n.output));
  const uint8_t* a = levels(n.inputs[0], image);
  uint8_t* q = levels(n.output, image);
  for_each(out, [&](int64_t c, int64_t oy, int64_t ox) {
    const int64_t y = oy - p.top, x = ox - p.left;
    const bool inside = y >= 0 && y < in.h && x >= 0 && x < in.w;
    q[out.at(c, oy, ox)] = inside ? a[in.at(c, y, x)] : p.level;
  });
}

void Interpreter::resize(const Node& n, int64_t image) {
  const ResizeSpec r = resize_spec(program_, n);
  const Shape in(value(n.inputs[0])), out(value(n.output));
  // The four neighbours of an output position, and their blend.
  const auto neighbour = [&](const auto* a, int64_t c, int64_t y, int64_t x, bool high_y,
                             bool high_x) {
    return a[in.at(c, high_y ? r.high_h[y] : r.low_h[y], high_x ? r.high_w[x] : r.low_w[x])];
  };
  const auto blended = [&](const auto* a, int64_t c, int64_t y, int64_t x) {
    const auto at = [&](bool high_y, bool high_x) {
      return static_cast<float>(neighbour(a, c, y, x, high_y, high_x));
    };
    return blend(at(false, false), at(false, true), at(true, false), at(true, true), r.part_w[x],
                 r.part_h[y]);
  };
  const bool is_float = value(n.output).kind == ValueKind::F32;
  for_each(out, [&](int64_t c, int64_t y, int64_t x) {
    const int64_t i = out.at(c, y, x);
    if (is_float) {
      const float* a = numbers(n.inputs[0], image);
      numbers(n.output, image)[i] =
          r.bilinear ? blended(a, c, y, x) : neighbour(a, c, y, x, false, false);
    } else {
      const uint8_t* a = levels(n.inputs[0], image);
      levels(n.output, image)[i] =
          r.bilinear ? finish_u8(std::fmaf(blended(a, c, y, x), r.scale, r.offset), r.finish)
                     : neighbour(a, c, y, x, false, false);
    }
  });
}

void Interpreter::layer_norm(const Node& n, int64_t image) {
  const LayerNormSpec spec = layer_norm_spec(program_, n);
  const Shape s(value(n.output));
  if (value(n.inputs[0]).kind == ValueKind::F32) {
    for (int64_t p = 0; p < s.h * s.w; ++p)
      normalise_floats(n, image, 0, s.c, p, 1, spec);
    return;
  }
  const uint8_t* a = levels(n.inputs[0], image);
  for (int64_t y = 0; y < s.h; ++y)
    for (int64_t x = 0; x < s.w; ++x) {
      int64_t s1 = 0, s2 = 0;
      for (int64_t c = 0; c < s.c; ++c) {
        const int64_t level = a[s.at(c, y, x)];
        s1 += level;
        s2 += level * level;
      }
      const LayerNormMoments m = layer_norm_moments(s1, s2, s.c, spec);
      for (int64_t c = 0; c < s.c; ++c)
        normalise(n, image, s.at(c, y, x), c, m, spec);
    }
}

/// One element of a norm's result, on levels or floats.
void Interpreter::normalise(const Node& n, int64_t image, int64_t at, int64_t channel,
                            const LayerNormMoments& m, const LayerNormSpec& spec) {
  const uint8_t level = levels(n.inputs[0], image)[at];
  if (value(n.output).kind == ValueKind::F32)
    numbers(n.output, image)[at] = layer_norm_value(level, channel, m, spec);
  else
    levels(n.output, image)[at] = layer_norm_u8(level, channel, m, spec);
}

/// A norm of floats over `channels` channels and `positions` positions together.
void Interpreter::normalise_floats(const Node& n, int64_t image, int64_t first_channel,
                                   int64_t channels, int64_t first_position, int64_t positions,
                                   const LayerNormSpec& spec) {
  const Shape s(value(n.output));
  const float* x = numbers(n.inputs[0], image);
  const auto at = [&](int64_t c, int64_t p) {
    return (first_channel + c) * s.h * s.w + first_position + p;
  };
  const auto total = [&](auto&& term) {
    double sum = 0.0;
    for (int64_t p = 0; p < positions; ++p) {
      double along = 0.0;
      for (int64_t c = 0; c < channels; ++c)
        along += term(static_cast<double>(x[at(c, p)]));
      sum += along;
    }
    return sum;
  };
  const int64_t count = channels * positions;
  const double mean =
      spec.about_zero ? 0.0 : total([](double v) { return v; }) / static_cast<double>(count);
  const double squares = total([&](double v) { return (v - mean) * (v - mean); });
  const FloatMoments m = float_moments(mean, squares, count, spec);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = 0; p < positions; ++p)
      numbers(n.output, image)[at(c, p)] =
          std::fmaf(float_normal(x[at(c, p)], m), spec.gamma[first_channel + c],
                    spec.beta[first_channel + c]);
}

void Interpreter::affine_image(const Node& n, int64_t image) {
  const AffineImageSpec spec = affine_image_spec(program_, n);
  const Shape s(value(n.output));
  const uint8_t* a = levels(n.inputs[0], image);
  uint8_t* q = levels(n.output, image);
  for_each(s, [&](int64_t c, int64_t y, int64_t x) {
    q[s.at(c, y, x)] = affine_image_u8(a[s.at(c, y, x)], (y * s.w + x) * s.c + c, c, spec);
  });
}

void Interpreter::constant(const Node& n, int64_t image) {
  const Constant& held = held_values(program_, n);
  const uint8_t* a = held.bytes.data();
  const Shape s(value(n.output));
  if (value(n.output).kind == ValueKind::F32) {
    std::copy_n(held.f32().data(), s.size(), numbers(n.output, image));
    return;
  }
  uint8_t* q = levels(n.output, image);
  for_each(s,
           [&](int64_t c, int64_t y, int64_t x) { q[s.at(c, y, x)] = a[(y * s.w + x) * s.c + c]; });
}

/// Concat and Join.
void Interpreter::join(const Node& n, int64_t image) {
  const Shape out(value(n.output));
  const bool floats = value(n.output).kind == ValueKind::F32;
  const auto axis = static_cast<size_t>(joined_axis(n));
  int64_t begin[3] = {};
  for (size_t k = 0; k < n.inputs.size(); ++k) {
    const Shape s(value(n.inputs[k]));
    const uint8_t* table = table_bytes(program_, n.constants[k]);
    for_each(s, [&](int64_t c, int64_t y, int64_t x) {
      const int64_t from = s.at(c, y, x), to = out.at(begin[0] + c, begin[1] + y, begin[2] + x);
      if (floats) {
        numbers(n.output, image)[to] = numbers(n.inputs[k], image)[from];
      } else {
        const uint8_t level = levels(n.inputs[k], image)[from];
        levels(n.output, image)[to] = table == nullptr ? level : table[level];
      }
    });
    const int64_t sizes[] = {s.c, s.h, s.w};
    begin[axis] += sizes[axis];
  }
}

void Interpreter::group_norm(const Node& n, int64_t image) {
  const GroupNormSpec spec = group_norm_spec(program_, n);
  const Shape s(value(n.output));
  const int64_t channels = s.c / spec.groups, count = channels * s.h * s.w;
  if (value(n.inputs[0]).kind == ValueKind::F32) {
    for (int64_t g = 0; g < spec.groups; ++g)
      normalise_floats(n, image, g * channels, channels, 0, s.h * s.w, spec.norm);
    return;
  }
  for (int64_t g = 0; g < spec.groups; ++g) {
    const uint8_t* a = levels(n.inputs[0], image) + g * count;
    int64_t s1 = 0, s2 = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t level = a[i];
      s1 += level;
      s2 += level * level;
    }
    const LayerNormMoments m = layer_norm_moments(s1, s2, count, spec.norm);
    for (int64_t i = 0; i < count; ++i)
      normalise(n, image, g * count + i, g * channels + i / (s.h * s.w), m, spec.norm);
  }
}

void Interpreter::embedding(const Node& n, int64_t image) {
  const EmbeddingSpec spec = embedding_spec(program_, n);
  const Shape s(value(n.output));
  const int32_t* ids = tensors_[n.inputs[0]].ids.data() + image * s.h * s.w;
  for_each(s, [&](int64_t c, int64_t y, int64_t x) {
    levels(n.output, image)[s.at(c, y, x)] = spec.table[ids[y * s.w + x] * spec.channels + c];
  });
}

void Interpreter::softmax(const Node& n, int64_t image) {
  const Shape s(value(n.output));
  const float* a = numbers(n.inputs[0], image);
  float* out = numbers(n.output, image);
  for (int64_t y = 0; y < s.h; ++y)
    for (int64_t x = 0; x < s.w; ++x) {
      float most = a[s.at(0, y, x)];
      for (int64_t c = 1; c < s.c; ++c)
        most = max_x86(a[s.at(c, y, x)], most);
      double sum = 0.0;
      for (int64_t c = 0; c < s.c; ++c) {
        out[s.at(c, y, x)] = softmax_exp(a[s.at(c, y, x)] - most);
        sum += static_cast<double>(out[s.at(c, y, x)]);
      }
      const auto share = static_cast<float>(1.0 / sum);
      for (int64_t c = 0; c < s.c; ++c)
        out[s.at(c, y, x)] *= share;
    }
}

void Interpreter::attention(const Node& n, int64_t image) {
  const AttentionShape shape = attention_shape(program_, n);
  AttentionSpec spec = attention_spec(program_, n);
  if (n.inputs.size() == 4) spec.keys = numbers(n.inputs[3], image);
  const Shape out(value(n.output));
  std::vector<float> reals(static_cast<size_t>(out.size()));
  reference::attention(shape, spec, levels(n.inputs[0], image), levels(n.inputs[1], image),
                       levels(n.inputs[2], image), reals.data());
  if (value(n.output).kind == ValueKind::F32) {
    std::copy(reals.begin(), reals.end(), numbers(n.output, image));
    return;
  }
  for (int64_t i = 0; i < out.size(); ++i)
    levels(n.output, image)[i] = finish_u8(reals[i], spec.finish);
}

void Interpreter::quantize(const Node& n, int64_t image) {
  const float* x = numbers(n.inputs[0], image);
  const ActivationGrid grid = value_grid(value(n.output));
  uint8_t* q = levels(n.output, image);
  for (int64_t i = 0; i < Shape(value(n.output)).size(); ++i)
    q[i] = quantize_value(x[i], grid);
}

void Interpreter::dequantize(const Node& n, int64_t image) {
  const Value& x = value(n.inputs[0]);
  const uint8_t* q = levels(n.inputs[0], image);
  for (int64_t i = 0; i < Shape(x).size(); ++i)
    numbers(n.output, image)[i] = dequantize_value(q[i], x.scale, x.zero_point);
}

void Interpreter::lookup(const Node& n, int64_t image) {
  const uint8_t* table = lookup_table(program_, n);
  const uint8_t* a = levels(n.inputs[0], image);
  for (int64_t i = 0; i < Shape(value(n.output)).size(); ++i)
    levels(n.output, image)[i] = table[a[i]];
}

void Interpreter::affine(const Node& n, int64_t image) {
  const AffineSpec spec = affine_spec(program_, n);
  const Shape s(value(n.output));
  const bool floats = value(n.output).kind == ValueKind::F32;
  for_each(s, [&](int64_t c, int64_t y, int64_t x) {
    const int64_t i = s.at(c, y, x);
    if (floats)
      numbers(n.output, image)[i] =
          std::fmaf(numbers(n.inputs[0], image)[i], spec.scale[c], spec.bias[c]);
    else
      levels(n.output, image)[i] = affine_u8(levels(n.inputs[0], image)[i], c, spec);
  });
}

void Interpreter::gather(const Node& n, int64_t image) {
  const auto index = gather_index(program_, n);
  const Shape s(value(n.output));
  const uint8_t* a = levels(n.inputs[0], image);
  const int64_t plane = s.h * s.w;
  for (int64_t c = 0; c < s.c; ++c)
    std::copy_n(a + index[c] * plane, plane, levels(n.output, image) + c * plane);
}

void Interpreter::function(const Node& n, int64_t image) {
  const FloatFunctionSpec spec = function_spec(n);
  const float* x = numbers(n.inputs[0], image);
  for (int64_t i = 0; i < Shape(value(n.output)).size(); ++i)
    numbers(n.output, image)[i] = float_function(x[i], spec);
}

void Interpreter::combine_floats(const Node& n, int64_t image) {
  const FloatPair pair = combine_pair(n);
  const Shape out(value(n.output)),
      sizes[] = {Shape(value(n.inputs[0])), Shape(value(n.inputs[1]))};
  const auto operand = [&](size_t k, int64_t c, int64_t y, int64_t x) {
    const Shape& s = sizes[k];
    return numbers(n.inputs[k], image)[s.at(s.c == 1 ? 0 : c, s.h == 1 ? 0 : y, s.w == 1 ? 0 : x)];
  };
  for_each(out, [&](int64_t c, int64_t y, int64_t x) {
    numbers(n.output, image)[out.at(c, y, x)] =
        float_pair(operand(0, c, y, x), operand(1, c, y, x), pair);
  });
}

void Interpreter::reduce(const Node& n, int64_t image) {
  const ReduceSpec spec = reduce_spec(program_, n);
  const Shape in(value(n.inputs[0])), out(value(n.output));
  const bool of_floats = value(n.inputs[0]).kind == ValueKind::F32;
  const int64_t count = in.size() / out.size();
  std::vector<double> sums(static_cast<size_t>(out.size()));
  std::vector<int64_t> exact(sums.size());
  for_each(in, [&](int64_t c, int64_t y, int64_t x) {
    const auto at = static_cast<size_t>(
        out.at(spec.along[0] ? 0 : c, spec.along[1] ? 0 : y, spec.along[2] ? 0 : x));
    if (of_floats) {
      const float v = numbers(n.inputs[0], image)[in.at(c, y, x)];
      sums[at] += reduction_term(static_cast<double>(v), spec.kind);
    } else {
      const int64_t q = levels(n.inputs[0], image)[in.at(c, y, x)] - spec.zero_point;
      exact[at] += spec.kind == Reduction::Norm ? q * q : q;
    }
  });
  for (size_t i = 0; i < sums.size(); ++i)
    numbers(n.output, image)[i] = of_floats ? reduced_floats(sums[i], count, spec.kind)
                                            : reduced_levels(exact[i], count, spec);
}

void Interpreter::float_conv(const Node& n, int64_t image) {
  FloatConvSpec spec = float_conv_spec(program_, n);
  if (spec.weights == nullptr) spec.weights = float_weights_.data();
  reference::float_conv(spec, numbers(n.inputs[0], image), numbers(n.output, image));
}

void Interpreter::choose(const Node& n, int64_t image) {
  const auto [any, zero, other] = choose_attributes(n);
  const int64_t size = Shape(value(n.output)).size();
  const int32_t* x = tensors_[n.inputs[0]].ids.data() + image * size;
  for (int64_t i = 0; i < size; ++i)
    numbers(n.output, image)[i] = x[i] == 0 ? zero : other;
}

void Interpreter::recurrence(const Node& n, int64_t image) {
  const RecurrenceSpec spec = recurrence_spec(program_, n);
  const auto begin = [&](size_t k) {
    return n.inputs.size() > k ? numbers(n.inputs[k], image) : nullptr;
  };
  const int64_t size = Shape(value(n.output)).size();
  std::vector<float> reals(static_cast<size_t>(size));
  reference::recurrence(spec, weights_.data(), numbers(n.inputs[0], image), begin(1), begin(2),
                        reals.data());
  if (value(n.output).kind == ValueKind::F32) {
    std::copy(reals.begin(), reals.end(), numbers(n.output, image));
    return;
  }
  for (int64_t i = 0; i < size; ++i)
    levels(n.output, image)[i] = finish_u8(reals[i], spec.state);
}

void Interpreter::linear(const Node& n, int64_t image) {
  const LinearSpec spec = linear_spec(program_, n);
  const Shape s(value(n.output));
  const int64_t plane = s.h * s.w;
  std::vector<uint8_t> row(static_cast<size_t>(spec.inputs));
  std::vector<float> reals(static_cast<size_t>(s.c));
  for (int64_t p = 0; p < plane; ++p) {
    for (int64_t c = 0; c < spec.inputs; ++c)
      row[c] = levels(n.inputs[0], image)[c * plane + p];
    reference::linear(spec, weights_.data(), row.data(), reals.data());
    for (int64_t o = 0; o < s.c; ++o)
      if (value(n.output).kind == ValueKind::U8)
        levels(n.output, image)[o * plane + p] = finish_u8(reals[o], spec.finish);
      else
        numbers(n.output, image)[o * plane + p] = min_x86(max_x86(reals[o], spec.lo), spec.hi);
  }
}

void Interpreter::run(const Node& n, int64_t image) {
  const bool floats = value(n.output).kind == ValueKind::F32;
  switch (n.op) {
    case OpKind::Quantize:
      return quantize(n, image);
    case OpKind::Dequantize:
      return dequantize(n, image);
    case OpKind::Conv:
    case OpKind::ConvTranspose:
      return convolve(n, image);
    case OpKind::Lookup:
      return lookup(n, image);
    case OpKind::Add:
    case OpKind::Mul:
      return combine(n, image);
    case OpKind::Affine:
      return affine(n, image);
    case OpKind::MaxPool:
      return max_pool(n, image);
    case OpKind::AvgPool:
      return floats ? average_floats(n, image) : avg_pool(n, image);
    case OpKind::AdaptiveAvgPool:
      return floats ? average_floats(n, image) : adaptive_avg_pool(n, image);
    case OpKind::Slice:
      return slice(n, image);
    case OpKind::Gather:
      return gather(n, image);
    case OpKind::Pad:
      return pad(n, image);
    case OpKind::Resize:
      return resize(n, image);
    case OpKind::LayerNorm:
    case OpKind::RmsNorm:
      return layer_norm(n, image);
    case OpKind::Reshape:  // both sides are in NCHW order
      std::copy_n(levels(n.inputs[0], image), Shape(value(n.output)).size(),
                  levels(n.output, image));
      return;
    case OpKind::Softmax:
      return softmax(n, image);
    case OpKind::Rearrange:
      return rearrange(n, image);
    case OpKind::Attention:
      return attention(n, image);
    case OpKind::Function:
      return function(n, image);
    case OpKind::Combine:
      return combine_floats(n, image);
    case OpKind::AffineImage:
      return affine_image(n, image);
    case OpKind::Constant:
      return constant(n, image);
    case OpKind::Concat:
    case OpKind::Join:
      return join(n, image);
    case OpKind::Reduce:
      return reduce(n, image);
    case OpKind::GroupNorm:
      return group_norm(n, image);
    case OpKind::Embedding:
      return embedding(n, image);
    case OpKind::FloatConv:
      return float_conv(n, image);
    case OpKind::Choose:
      return choose(n, image);
    case OpKind::Recurrence:
      return recurrence(n, image);
    case OpKind::Linear:
      return linear(n, image);
  }
}

}  // namespace

std::vector<Tensor> interpret_values(const Program& program, std::span<const InputTensor> inputs,
                                     int64_t batch) {
  validate(program);
  if (inputs.size() != program.inputs.size())
    fail<InvalidArgument>("expected ", program.inputs.size(), " inputs, got ", inputs.size());
  if (batch < 0 || batch > kMaxAxis)
    fail<InvalidArgument>("batch must be 0 to ", kMaxAxis, ", got ", batch);
  check_ids(program, table_rows(program), inputs, batch);
  return Interpreter(program, inputs, batch).take();
}

std::vector<std::vector<float>> interpret(const Program& program,
                                          std::span<const InputTensor> inputs, int64_t batch) {
  std::vector<Tensor> tensors = interpret_values(program, inputs, batch);
  std::vector<std::vector<float>> outputs;
  for (const int32_t v : program.outputs)
    outputs.push_back(std::move(tensors[v].numbers));
  return outputs;
}

}  // namespace adalayer::engine

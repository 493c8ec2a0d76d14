// Convolutions, pooling and resizing.
#include <algorithm>
#include <cmath>

#include "engine/node_check.hpp"
#include "formats/canonical.hpp"
#include "reference/reference.hpp"

namespace adalayer::engine {

void NodeCheck::groups(int64_t groups) const {
  if (in().c % groups != 0 || out().c % groups != 0)
    bad("channels must be divisible by groups ", groups, ", got ", in().c, " in and ", out().c,
        " out");
}

void NodeCheck::output_of_convolution() const {
  const ConvShape s = conv_shape(program_, node_);
  const int64_t extent_h = s.dilation_h * (s.kernel_h - 1) + 1;
  const int64_t extent_w = s.dilation_w * (s.kernel_w - 1) + 1;
  const int64_t padded_h = in().h + s.pad_top + s.pad_bottom;
  const int64_t padded_w = in().w + s.pad_left + s.pad_right;
  bounded(in().c, padded_h, padded_w);
  if (padded_h < extent_h || padded_w < extent_w)
    bad("the padded input, ", padded_h, " x ", padded_w, ", is smaller than the dilated kernel, ",
        extent_h, " x ", extent_w);
  shape("output", out(), out().c, (padded_h - extent_h) / s.stride_h + 1,
        (padded_w - extent_w) / s.stride_w + 1);
}

void NodeCheck::packed_weights(int64_t o, int64_t i, int64_t kernel_h, int64_t kernel_w) const {
  const formats::CanonicalHeader header = [&] {
    try {
      return formats::read_header(weights_of(program_, node_).bytes);
    } catch (const CorruptData& e) {
      bad(e.what());
    }
  }();
  if (header.out_channels != o || header.group_in != i || header.kernel_h != kernel_h ||
      header.kernel_w != kernel_w)
    bad("expected weights of ", o, " x ", i, " x ", kernel_h, " x ", kernel_w, ", got ",
        header.out_channels, " x ", header.group_in, " x ", header.kernel_h, " x ",
        header.kernel_w);
  try {
    check_accumulator(header.count() / o, weight_bits(weights_of(program_, node_)));
  } catch (const InvalidArgument& e) {
    bad(e.what());
  }
}

void NodeCheck::canonical_weights() const {
  const ConvShape s = conv_shape(program_, node_);
  packed_weights(out().c, in().c / s.groups, s.kernel_h, s.kernel_w);
}

/// What both kinds on levels have.
void NodeCheck::convolution() const {
  const ConvAttributes a = conv_attributes(node_);
  groups(a.groups);
  if (node_.op == OpKind::Conv) output_of_convolution();
  canonical_weights();
  floats("scale", out().c);
  floats("bias", out().c);
  if (!(a.f32_lo <= a.f32_hi))
    bad("clamp_lo must not exceed clamp_hi, got ", a.f32_lo, " and ", a.f32_hi);
  if (node_.inputs.size() == 2) shape("residual", in(1), out().c, out().h, out().w);
}

void NodeCheck::transposed_convolution() const {
  const Value &x = in(), &y = out();
  const ConvAttributes a = conv_attributes(node_);
  const int64_t extent_h = a.dilation_h * (a.kernel_h - 1) + 1;
  const int64_t extent_w = a.dilation_w * (a.kernel_w - 1) + 1;
  if (std::min(a.stride_h, y.h) * std::min(a.stride_w, y.w) > kMaxInterleaved)
    bad("expected at most ", kMaxInterleaved, " outputs between neighbouring inputs, got strides ",
        a.stride_h, " and ", a.stride_w);
  const int64_t full_h = (x.h - 1) * a.stride_h + extent_h;
  const int64_t full_w = (x.w - 1) * a.stride_w + extent_w;
  bounded(std::max(x.c, y.c), full_h, full_w);
  const auto fits = [&](const char* axis, int64_t got, int64_t least, int64_t spread) {
    if (got < least || got >= least + spread)
      bad("expected an output ", axis, " of ", least, " to ", least + spread - 1, ", got ", got);
  };
  fits("height", y.h, full_h - a.pad_top - a.pad_bottom, std::max(a.stride_h, a.dilation_h));
  fits("width", y.w, full_w - a.pad_left - a.pad_right, std::max(a.stride_w, a.dilation_w));
  convolution();
}

void NodeCheck::float_convolution() const {
  const ConvShape s = conv_shape(program_, node_);
  groups(s.groups);
  output_of_convolution();
  const int64_t positions = out().h * out().w;
  if (positions > kMaxElements / out().c)
    bad("expected at most ", kMaxElements, " outputs, got ", out().c, " x ", positions);
  const Constant& weights = weights_of(program_, node_);
  const bool packed = node_.constants[constant_of(OpKind::FloatConv, "scale")] != -1;
  const ConstantKind wanted = packed ? ConstantKind::Weights : ConstantKind::F32;
  if (weights.kind != wanted)
    bad("weights: expected a constant of kind ", kind_name(wanted), packed ? " beside" : " without",
        " a scale, got ", kind_name(weights.kind));
  if (packed) {
    canonical_weights();
    floats("scale", out().c);
  } else {
    // (Of sizes that fit the padded input, each at most kMaxElements.)
    const int64_t taps = s.kernel_h * s.kernel_w, group_in = in().c / s.groups;
    const auto size = static_cast<int64_t>(weights.f32().size());
    if (size % out().c != 0 || size / out().c % group_in != 0 || size / out().c / group_in != taps)
      bad("weights: expected ", out().c, " x ", group_in, " x ", taps, " floats, got ", size);
    floats("weights", size);
  }
  floats("bias", out().c);
  const FloatConvSpec spec = float_conv_spec(program_, node_);
  if (!(spec.lo <= spec.hi))
    bad("clamp_lo must not exceed clamp_hi, got ", spec.lo, " and ", spec.hi);
}

void NodeCheck::window_axis(const char* axis, int64_t size, int64_t outputs, int64_t kernel,
                            int64_t stride, int64_t pad, int64_t dilation) const {
  const auto empty = [&](int64_t window) {
    bad("window ", window, " of the output's ", axis, " contains no position of the image (", axis,
        ' ', size, ", kernel ", kernel, ", stride ", stride, ", padding ", pad, ", dilation ",
        dilation, ")");
  };
  // Windows that begin in the padding: their first position inside, if they have one.
  for (int64_t k = 0; k < outputs && k * stride < pad; ++k) {
    const int64_t skipped = (pad - k * stride + dilation - 1) / dilation;
    if (skipped >= kernel || k * stride - pad + skipped * dilation >= size) empty(k);
  }
  // The others begin inside or behind the image, the last one farthest out.
  if ((outputs - 1) * stride - pad >= size) empty(outputs - 1);
}

void NodeCheck::max_pool() const {
  const PoolSpec s = pool_spec(program_, node_);
  shape("output", out(), in().c, out().h, out().w);
  // A last window may reach beyond the image by what a bottom padding would hold.
  bounded(in().c, in().h + s.pad_top + s.dilation_h * (s.kernel_h - 1),
          in().w + s.pad_left + s.dilation_w * (s.kernel_w - 1));
  window_axis("height", in().h, out().h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h);
  window_axis("width", in().w, out().w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w);
}

void NodeCheck::average_bound(int64_t positions) const {
  if (positions > (int64_t{1} << 31) / 256)
    bad("a sum over ", positions, " levels could overflow int32");
  const float ratio = pool_spec(program_, node_).ratio;
  if (!std::isfinite(ratio)) bad("the ratio must be finite, got ", ratio);
}

void NodeCheck::avg_pool() const {
  const PoolSpec s = pool_spec(program_, node_);
  const int64_t padded_h = in().h + s.pad_top + s.pad_bottom;
  const int64_t padded_w = in().w + s.pad_left + s.pad_right;
  bounded(in().c, padded_h, padded_w);
  // Rounded down, or up with ceil_mode.
  const auto fits = [&](const char* axis, int64_t got, int64_t padded, int64_t kernel,
                        int64_t stride) {
    const int64_t span = padded - kernel;
    if (span < 0) bad("the padded ", axis, ' ', padded, " is smaller than the kernel ", kernel);
    if (got < span / stride + 1 || got > (span + stride - 1) / stride + 1)
      bad("expected an output ", axis, " of ", span / stride + 1, " to ",
          (span + stride - 1) / stride + 1, ", got ", got);
  };
  shape("output", out(), in().c, out().h, out().w);
  fits("height", out().h, padded_h, s.kernel_h, s.stride_h);
  fits("width", out().w, padded_w, s.kernel_w, s.stride_w);
  window_axis("height", in().h, out().h, s.kernel_h, s.stride_h, s.pad_top, 1);
  window_axis("width", in().w, out().w, s.kernel_w, s.stride_w, s.pad_left, 1);
  average_bound(std::min(s.kernel_h, in().h) * std::min(s.kernel_w, in().w));
}

void NodeCheck::adaptive_avg_pool() const {
  shape("output", out(), in().c, out().h, out().w);
  average_bound(in().h * in().w);
}

void NodeCheck::resize_axis(const char* axis, std::string_view low, std::string_view high,
                            std::string_view part, int64_t size, int64_t outputs) const {
  for (const std::string_view name : {low, high}) {
    const std::span<const int32_t> positions = constant(name).i32();
    if (static_cast<int64_t>(positions.size()) != outputs)
      bad(axis, ": expected ", outputs, " positions, got ", positions.size());
    for (const int32_t i : positions)
      if (i < 0 || i >= size) bad(axis, ": expected positions 0 to ", size - 1, ", got ", i);
  }
  floats(part, outputs);
  for (const float v : constant(part).f32())
    if (v < 0.0f || v > 1.0f) bad(axis, ": parts must be 0 to 1, got ", v);
}

void NodeCheck::resize() const {
  if (in().kind == ValueKind::U8 && !resize_spec(program_, node_).bilinear) same_grid();
  for (const float v : node_.floats)
    if (!std::isfinite(v)) bad("scale and offset must be finite, got ", v);
  shape("output", out(), in().c, out().h, out().w);
  resize_axis("rows", "low_h", "high_h", "part_h", in().h, out().h);
  resize_axis("columns", "low_w", "high_w", "part_w", in().w, out().w);
}

}  // namespace adalayer::engine

#include "engine/program.hpp"

#include <initializer_list>

#include "core/status.hpp"
#include "formats/canonical.hpp"

namespace adalayer::engine {

namespace {

// One view may be of several operations, which then have the parameter in the same place.
consteval size_t same_int(std::string_view name, std::initializer_list<OpKind> ops) {
  const size_t place = int_of(*ops.begin(), name);
  for (const OpKind op : ops)
    if (int_of(op, name) != place) throw "operations differ";
  return place;
}

consteval size_t geometry(std::string_view name) {
  return same_int(name, {OpKind::Conv, OpKind::ConvTranspose, OpKind::FloatConv});
}

consteval size_t window(std::string_view name) {
  return same_int(name, {OpKind::MaxPool, OpKind::AvgPool});
}

int32_t small(int64_t v) { return static_cast<int32_t>(v); }

const Value& first_input(const Program& p, const Node& n) { return p.values[n.inputs[0]]; }

const float* floats(const Program& p, int32_t constant) {
  return p.constants[constant].f32().data();
}

const int32_t* indices(const Program& p, int32_t constant) {
  return p.constants[constant].i32().data();
}

}  // namespace

ConvAttributes conv_attributes(const Node& n) {
  constexpr OpKind op = OpKind::Conv;
  static_assert(operation(OpKind::ConvTranspose).ints.data() == operation(op).ints.data() &&
                operation(OpKind::ConvTranspose).floats.data() == operation(op).floats.data() &&
                operation(OpKind::ConvTranspose).constants.data() ==
                    operation(op).constants.data());
  ConvAttributes a{};
  a.kernel_h = n.ints[int_of(op, "kernel_h")];
  a.kernel_w = n.ints[int_of(op, "kernel_w")];
  a.stride_h = n.ints[int_of(op, "stride_h")];
  a.stride_w = n.ints[int_of(op, "stride_w")];
  a.pad_top = n.ints[int_of(op, "pad_top")];
  a.pad_left = n.ints[int_of(op, "pad_left")];
  a.pad_bottom = n.ints[int_of(op, "pad_bottom")];
  a.pad_right = n.ints[int_of(op, "pad_right")];
  a.dilation_h = n.ints[int_of(op, "dilation_h")];
  a.dilation_w = n.ints[int_of(op, "dilation_w")];
  a.groups = n.ints[int_of(op, "groups")];
  a.lo = small(n.ints[int_of(op, "lo")]);
  a.hi = small(n.ints[int_of(op, "hi")]);
  a.zero_point = small(n.ints[int_of(op, "zero_point")]);
  a.f32_lo = n.floats[float_of(op, "clamp_lo")];
  a.f32_hi = n.floats[float_of(op, "clamp_hi")];
  a.weights = n.constants[constant_of(op, "weights")];
  a.scale = n.constants[constant_of(op, "scale")];
  a.bias = n.constants[constant_of(op, "bias")];
  a.table = n.constants[constant_of(op, "table")];
  return a;
}

ConvShape conv_shape(const Program& p, const Node& n) {
  const Value& x = first_input(p, n);
  ConvShape s;
  s.batch = 1;
  s.in_channels = x.c;
  s.in_h = x.h;
  s.in_w = x.w;
  s.out_channels = p.values[n.output].c;
  s.kernel_h = n.ints[geometry("kernel_h")];
  s.kernel_w = n.ints[geometry("kernel_w")];
  s.stride_h = n.ints[geometry("stride_h")];
  s.stride_w = n.ints[geometry("stride_w")];
  s.pad_top = n.ints[geometry("pad_top")];
  s.pad_left = n.ints[geometry("pad_left")];
  s.pad_bottom = n.ints[geometry("pad_bottom")];
  s.pad_right = n.ints[geometry("pad_right")];
  s.dilation_h = n.ints[geometry("dilation_h")];
  s.dilation_w = n.ints[geometry("dilation_w")];
  s.groups = n.ints[geometry("groups")];
  return s;
}

FloatConvSpec float_conv_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::FloatConv;
  FloatConvSpec s;
  s.shape = conv_shape(p, n);
  const Constant& weights = p.constants[n.constants[constant_of(op, "weights")]];
  if (weights.kind == ConstantKind::F32) s.weights = weights.f32().data();
  s.bias = floats(p, n.constants[constant_of(op, "bias")]);
  s.lo = n.floats[float_of(op, "clamp_lo")];
  s.hi = n.floats[float_of(op, "clamp_hi")];
  return s;
}

std::vector<float> unpacked_floats(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::FloatConv;
  const Constant& weights = p.constants[n.constants[constant_of(op, "weights")]];
  if (weights.kind == ConstantKind::F32) return {};
  const std::vector<int8_t> whole = unpacked_weights(weights);
  const float* scale = floats(p, n.constants[constant_of(op, "scale")]);
  const size_t terms = whole.size() / static_cast<size_t>(p.values[n.output].c);
  std::vector<float> found(whole.size());
  for (size_t i = 0; i < whole.size(); ++i)
    found[i] = static_cast<float>(whole[i]) * scale[i / terms];
  return found;
}

SliceAttributes slice_attributes(const Node& n) {
  constexpr OpKind op = OpKind::Slice;
  return {static_cast<int>(n.ints[int_of(op, "axis")]), n.ints[int_of(op, "begin")],
          n.ints[int_of(op, "step")]};
}

PadAttributes pad_attributes(const Node& n) {
  constexpr OpKind op = OpKind::Pad;
  return {n.ints[int_of(op, "top")], n.ints[int_of(op, "left")], n.ints[int_of(op, "bottom")],
          n.ints[int_of(op, "right")], static_cast<uint8_t>(n.ints[int_of(op, "level")])};
}

int joined_axis(const Node& n) {
  return n.op == OpKind::Concat ? 0 : static_cast<int>(n.ints[int_of(OpKind::Join, "axis")]);
}

const Constant& weights_of(const Program& p, const Node& n) {
  constexpr size_t place = constant_of(OpKind::Conv, "weights");
  static_assert(constant_of(OpKind::ConvTranspose, "weights") == place &&
                constant_of(OpKind::FloatConv, "weights") == place &&
                constant_of(OpKind::Recurrence, "weights") == place &&
                constant_of(OpKind::Linear, "weights") == place);
  return p.constants[n.constants[place]];
}

int weight_bits(const Constant& weights) {
  const int stored = formats::read_header(weights.bytes).bits;
  return weights.planes.all() ? stored : weights.planes.bits;
}

std::vector<int8_t> unpacked_weights(const Constant& weights) {
  return formats::unpack_canonical(weights.bytes, weights.planes);
}

const Constant& held_values(const Program& p, const Node& n) {
  return p.constants[n.constants[constant_of(OpKind::Constant, "values")]];
}

const uint8_t* lookup_table(const Program& p, const Node& n) {
  return table_bytes(p, n.constants[constant_of(OpKind::Lookup, "table")]);
}

std::span<const int32_t> gather_index(const Program& p, const Node& n) {
  return p.constants[n.constants[constant_of(OpKind::Gather, "index")]].i32();
}

const uint8_t* table_bytes(const Program& p, int32_t constant) {
  return constant < 0 ? nullptr : p.constants[constant].bytes.data();
}

ActivationGrid value_grid(const Value& v) { return {1.0f / v.scale, v.zero_point, v.qmax}; }

U8Finish node_finish(const Program& p, const Node& n) {
  const Operation& o = operation(n.op);
  const int at = o.finish(), table = o.table();
  if (at < 0) fail<InvalidArgument>(o.name, " has no finish");
  const int64_t zero_point = n.ints[at + 2];
  U8Finish f;
  f.inv_scale = n.floats[0];
  f.lo = static_cast<float>(n.ints[at] - zero_point);
  f.hi = static_cast<float>(n.ints[at + 1] - zero_point);
  f.zero_point = small(zero_point);
  f.table = table_bytes(p, table < 0 ? -1 : n.constants[table]);
  return f;
}

RearrangeSpec rearrange_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::Rearrange;
  return {indices(p, n.constants[constant_of(op, "channel")]),
          indices(p, n.constants[constant_of(op, "row")]),
          indices(p, n.constants[constant_of(op, "column")])};
}

PairSpec pair_spec(const Program& p, const Node& n) {
  static_assert(float_of(OpKind::Mul, "scale_b") == float_of(OpKind::Add, "scale_b"));
  return {p.values[n.inputs[0]].zero_point, p.values[n.inputs[1]].zero_point,
          n.floats[float_of(OpKind::Add, "scale_a")], n.floats[float_of(OpKind::Add, "scale_b")],
          node_finish(p, n)};
}

AffineSpec affine_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::Affine;
  return {floats(p, n.constants[constant_of(op, "scale")]),
          floats(p, n.constants[constant_of(op, "bias")]), node_finish(p, n)};
}

AffineImageSpec affine_image_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::AffineImage;
  const auto channels = static_cast<size_t>(first_input(p, n).c);
  const auto scale = p.constants[n.constants[constant_of(op, "scale")]].f32();
  const auto bias = p.constants[n.constants[constant_of(op, "bias")]].f32();
  return {scale.data(), bias.data(), scale.size() != channels, bias.size() != channels,
          node_finish(p, n)};
}

PoolSpec pool_spec(const Program& p, const Node& n) {
  static_assert(float_of(OpKind::AvgPool, "ratio") == float_of(OpKind::AdaptiveAvgPool, "ratio"));
  PoolSpec s;
  if (n.op != OpKind::MaxPool) {
    s.zero_in = first_input(p, n).zero_point;
    s.ratio = n.floats[float_of(OpKind::AvgPool, "ratio")];
    s.finish = node_finish(p, n);
  }
  if (n.op == OpKind::AdaptiveAvgPool) return s;
  s.kernel_h = n.ints[window("kernel_h")];
  s.kernel_w = n.ints[window("kernel_w")];
  s.stride_h = n.ints[window("stride_h")];
  s.stride_w = n.ints[window("stride_w")];
  s.pad_top = n.ints[window("pad_top")];
  s.pad_left = n.ints[window("pad_left")];
  if (n.op == OpKind::MaxPool) {
    s.dilation_h = n.ints[int_of(OpKind::MaxPool, "dilation_h")];
    s.dilation_w = n.ints[int_of(OpKind::MaxPool, "dilation_w")];
  } else {
    s.pad_bottom = n.ints[int_of(OpKind::AvgPool, "pad_bottom")];
    s.pad_right = n.ints[int_of(OpKind::AvgPool, "pad_right")];
    s.count_padding = n.ints[int_of(OpKind::AvgPool, "count_padding")] != 0;
  }
  return s;
}

ResizeSpec resize_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::Resize;
  ResizeSpec s;
  s.bilinear = n.ints[int_of(op, "bilinear")] != 0;
  s.low_h = indices(p, n.constants[constant_of(op, "low_h")]);
  s.high_h = indices(p, n.constants[constant_of(op, "high_h")]);
  s.part_h = floats(p, n.constants[constant_of(op, "part_h")]);
  s.low_w = indices(p, n.constants[constant_of(op, "low_w")]);
  s.high_w = indices(p, n.constants[constant_of(op, "high_w")]);
  s.part_w = floats(p, n.constants[constant_of(op, "part_w")]);
  s.scale = n.floats[float_of(op, "scale")];
  s.offset = n.floats[float_of(op, "offset")];
  s.finish = node_finish(p, n);
  return s;
}

FloatFunctionSpec function_spec(const Node& n) {
  constexpr OpKind op = OpKind::Function;
  return {static_cast<FloatFunction>(n.ints[int_of(op, "function")]), n.floats[float_of(op, "a")],
          n.floats[float_of(op, "b")]};
}

FloatPair combine_pair(const Node& n) {
  return static_cast<FloatPair>(n.ints[int_of(OpKind::Combine, "pair")]);
}

ReduceSpec reduce_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::Reduce;
  const Value& in = first_input(p, n);
  ReduceSpec s;
  s.kind = static_cast<Reduction>(n.ints[int_of(op, "kind")]);
  s.along[0] = n.ints[int_of(op, "along_c")] != 0;
  s.along[1] = n.ints[int_of(op, "along_h")] != 0;
  s.along[2] = n.ints[int_of(op, "along_w")] != 0;
  if (in.kind == ValueKind::U8) {
    s.zero_point = in.zero_point;
    s.step = static_cast<double>(in.scale);
  }
  return s;
}

ChooseAttributes choose_attributes(const Node& n) {
  constexpr OpKind op = OpKind::Choose;
  return {n.ints[int_of(op, "any")] != 0, n.floats[float_of(op, "zero")],
          n.floats[float_of(op, "other")]};
}

EmbeddingSpec embedding_spec(const Program& p, const Node& n) {
  const auto& table = p.constants[n.constants[constant_of(OpKind::Embedding, "table")]].bytes;
  const int64_t channels = p.values[n.output].c;
  return {table.data(), static_cast<int64_t>(table.size()) / channels, channels};
}

LayerNormSpec layer_norm_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::LayerNorm;
  static_assert(operation(OpKind::RmsNorm).floats.data() == operation(op).floats.data() &&
                operation(OpKind::GroupNorm).floats.data() == operation(op).floats.data() &&
                operation(OpKind::RmsNorm).constants.data() == operation(op).constants.data() &&
                operation(OpKind::GroupNorm).constants.data() == operation(op).constants.data());
  LayerNormSpec s;
  s.about_zero = n.op == OpKind::RmsNorm;
  s.zero_point = first_input(p, n).zero_point;
  s.step = static_cast<double>(first_input(p, n).scale);
  s.eps = static_cast<double>(n.floats[float_of(op, "eps")]);
  s.gamma = floats(p, n.constants[constant_of(op, "gamma")]);
  s.beta = floats(p, n.constants[constant_of(op, "beta")]);
  s.finish = node_finish(p, n);
  return s;
}

GroupNormSpec group_norm_spec(const Program& p, const Node& n) {
  return {n.ints[int_of(OpKind::GroupNorm, "groups")], layer_norm_spec(p, n)};
}

AttentionShape attention_shape(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::Attention;
  const Value &q = p.values[n.inputs[0]], &k = p.values[n.inputs[1]], &v = p.values[n.inputs[2]];
  AttentionShape s;
  s.sequences = n.ints[int_of(op, "rows")] != 0 ? q.h : 1;
  s.queries = q.h * q.w / s.sequences;
  s.keys = k.h * k.w / s.sequences;
  s.heads = n.ints[int_of(op, "heads")];
  s.key_heads = n.ints[int_of(op, "key_heads")];
  s.depth = q.c / s.heads;
  s.width = v.c / s.key_heads;
  return s;
}

AttentionSpec attention_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::Attention;
  const AttentionShape shape = attention_shape(p, n);
  const int64_t matrix = shape.queries * shape.keys;
  AttentionSpec s;
  s.zero_q = p.values[n.inputs[0]].zero_point;
  s.zero_k = p.values[n.inputs[1]].zero_point;
  s.zero_v = p.values[n.inputs[2]].zero_point;
  s.scale = n.floats[float_of(op, "scale")];
  s.value_scale = p.values[n.inputs[2]].scale;
  s.causal = n.ints[int_of(op, "causal")] != 0;
  const int32_t mask = n.constants[constant_of(op, "mask")];
  if (mask >= 0) {
    s.mask = floats(p, mask);
    const bool rows = n.ints[int_of(op, "mask_rows")] != 0;
    const bool heads = n.ints[int_of(op, "mask_heads")] != 0;
    s.mask_head = heads ? matrix : 0;
    s.mask_sequence = rows ? (heads ? shape.heads : 1) * matrix : 0;
  }
  s.finish = node_finish(p, n);
  return s;
}

RecurrenceSpec recurrence_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::Recurrence;
  const Value& out = p.values[n.output];
  RecurrenceSpec s;
  s.kind = static_cast<RecurrentKind>(n.ints[int_of(op, "kind")]);
  s.reverse = n.ints[int_of(op, "reverse")] != 0;
  s.cells = n.ints[int_of(op, "cells")] != 0;
  s.hidden = s.cells ? out.c / 2 : out.c;
  s.steps = out.h * out.w;
  s.scale = floats(p, n.constants[constant_of(op, "scale")]);
  s.bias = floats(p, n.constants[constant_of(op, "bias")]);
  s.state = node_finish(p, n);
  return s;
}

LinearSpec linear_spec(const Program& p, const Node& n) {
  constexpr OpKind op = OpKind::Linear;
  const Value& in = first_input(p, n);
  LinearSpec s;
  s.inputs = in.c;
  s.outputs = p.values[n.output].c;
  s.group = std::min(n.ints[int_of(op, "group_size")], s.inputs);
  s.scale = floats(p, n.constants[constant_of(op, "scale")]);
  s.bias = floats(p, n.constants[constant_of(op, "bias")]);
  s.qmax = in.qmax;
  s.zero_point = in.zero_point;
  s.lo = n.floats[float_of(op, "clamp_lo")];
  s.hi = n.floats[float_of(op, "clamp_hi")];
  s.finish = node_finish(p, n);
  return s;
}

}  // namespace adalayer::engine

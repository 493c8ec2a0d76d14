#include "engine/program.hpp"

#include "core/status.hpp"
#include "formats/canonical.hpp"

namespace adalayer::engine {

namespace {

constexpr const char* kNames[kOpKinds] = {
    "quantize", "dequantize", "conv",      "conv_transpose", "lookup",     "add",
    "mul",      "affine",     "concat",    "max_pool",       "avg_pool",   "adaptive_avg_pool",
    "slice",    "gather",     "pad",       "resize",         "layer_norm", "reshape",
    "softmax",  "rearrange",  "function",  "combine",        "attention",  "affine_image",
    "constant", "join",       "embedding", "rms_norm",       "group_norm", "float_conv",
    "choose"};

int32_t small(int64_t v) { return static_cast<int32_t>(v); }

const Value& first_input(const Program& p, const Node& n) { return p.values[n.inputs[0]]; }

const float* floats(const Program& p, int32_t constant) {
  return p.constants[constant].f32().data();
}

const int32_t* indices(const Program& p, int32_t constant) {
  return p.constants[constant].i32().data();
}

/// Three ints from `at` on, and a table or -1.
U8Finish finish_from(const Program& p, const Node& n, size_t at, int32_t table) {
  const int64_t zero_point = n.ints[at + 2];
  U8Finish f;
  f.inv_scale = n.floats[0];
  f.lo = static_cast<float>(n.ints[at] - zero_point);
  f.hi = static_cast<float>(n.ints[at + 1] - zero_point);
  f.zero_point = small(zero_point);
  f.table = table_bytes(p, table);
  return f;
}

}  // namespace

const char* op_name(OpKind op) {
  const auto k = static_cast<size_t>(op);
  return is_operation(static_cast<uint32_t>(k)) ? kNames[k] : "unknown";
}

bool is_operation(uint32_t number) { return number < kOpKinds; }

OpKind op_from_name(std::string_view name) {
  for (int k = 0; k < kOpKinds; ++k)
    if (name == kNames[k]) return static_cast<OpKind>(k);
  fail<InvalidArgument>("unknown operation \"", name, "\"");
}

ConvAttributes conv_attributes(const Node& n) {
  ConvAttributes a{};
  a.kernel_h = n.ints[0];
  a.kernel_w = n.ints[1];
  a.stride_h = n.ints[2];
  a.stride_w = n.ints[3];
  a.pad_top = n.ints[4];
  a.pad_left = n.ints[5];
  a.pad_bottom = n.ints[6];
  a.pad_right = n.ints[7];
  a.dilation_h = n.ints[8];
  a.dilation_w = n.ints[9];
  a.groups = n.ints[10];
  a.lo = small(n.ints[11]);
  a.hi = small(n.ints[12]);
  a.zero_point = small(n.ints[13]);
  a.f32_lo = n.floats[1];
  a.f32_hi = n.floats[2];
  a.weights = n.constants[0];
  a.scale = n.constants[1];
  a.bias = n.constants[2];
  a.table = n.constants[3];
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
  s.kernel_h = n.ints[0];
  s.kernel_w = n.ints[1];
  s.stride_h = n.ints[2];
  s.stride_w = n.ints[3];
  s.pad_top = n.ints[4];
  s.pad_left = n.ints[5];
  s.pad_bottom = n.ints[6];
  s.pad_right = n.ints[7];
  s.dilation_h = n.ints[8];
  s.dilation_w = n.ints[9];
  s.groups = n.ints[10];
  return s;
}

FloatConvSpec float_conv_spec(const Program& p, const Node& n) {
  FloatConvSpec s;
  s.shape = conv_shape(p, n);
  const Constant& weights = p.constants[n.constants[0]];
  if (weights.kind == ConstantKind::F32) s.weights = weights.f32().data();
  s.bias = floats(p, n.constants[2]);
  s.lo = n.floats[0];
  s.hi = n.floats[1];
  return s;
}

std::vector<float> unpacked_floats(const Program& p, const Node& n) {
  const Constant& weights = p.constants[n.constants[0]];
  if (weights.kind == ConstantKind::F32) return {};
  const std::vector<int8_t> whole = formats::unpack_canonical(weights.bytes);
  const float* scale = floats(p, n.constants[1]);
  const size_t terms = whole.size() / static_cast<size_t>(p.values[n.output].c);
  std::vector<float> found(whole.size());
  for (size_t i = 0; i < whole.size(); ++i)
    found[i] = static_cast<float>(whole[i]) * scale[i / terms];
  return found;
}

SliceAttributes slice_attributes(const Node& n) {
  return {static_cast<int>(n.ints[0]), n.ints[1], n.ints[2]};
}

PadAttributes pad_attributes(const Node& n) {
  return {n.ints[0], n.ints[1], n.ints[2], n.ints[3], static_cast<uint8_t>(n.ints[4])};
}

const uint8_t* table_bytes(const Program& p, int32_t constant) {
  return constant < 0 ? nullptr : p.constants[constant].bytes.data();
}

ActivationGrid value_grid(const Value& v) { return {1.0f / v.scale, v.zero_point, v.qmax}; }

U8Finish node_finish(const Program& p, const Node& n) {
  switch (n.op) {
    case OpKind::Conv:
    case OpKind::ConvTranspose:
      return finish_from(p, n, 11, n.constants[3]);
    case OpKind::Add:
      return finish_from(p, n, 0, n.constants[0]);
    case OpKind::Mul:
      return finish_from(p, n, 0, n.constants[0]);
    case OpKind::Affine:
      return finish_from(p, n, 0, n.constants[2]);
    case OpKind::AvgPool:
      return finish_from(p, n, 9, n.constants[0]);
    case OpKind::AdaptiveAvgPool:
      return finish_from(p, n, 0, n.constants[0]);
    case OpKind::Resize:
      return finish_from(p, n, 1, -1);
    case OpKind::LayerNorm:
    case OpKind::RmsNorm:
      return finish_from(p, n, 0, -1);
    case OpKind::Attention:
      return finish_from(p, n, 6, -1);
    case OpKind::AffineImage:
      return finish_from(p, n, 0, n.constants[2]);
    case OpKind::GroupNorm:
      return finish_from(p, n, 1, -1);
    default:
      fail<InvalidArgument>(op_name(n.op), " has no finish");
  }
}

RearrangeSpec rearrange_spec(const Program& p, const Node& n) {
  return {indices(p, n.constants[0]), indices(p, n.constants[1]), indices(p, n.constants[2])};
}

PairSpec pair_spec(const Program& p, const Node& n) {
  return {p.values[n.inputs[0]].zero_point, p.values[n.inputs[1]].zero_point, n.floats[1],
          n.floats[2], node_finish(p, n)};
}

AffineSpec affine_spec(const Program& p, const Node& n) {
  return {floats(p, n.constants[0]), floats(p, n.constants[1]), node_finish(p, n)};
}

AffineImageSpec affine_image_spec(const Program& p, const Node& n) {
  const auto channels = static_cast<size_t>(first_input(p, n).c);
  const auto scale = p.constants[n.constants[0]].f32(), bias = p.constants[n.constants[1]].f32();
  return {scale.data(), bias.data(), scale.size() != channels, bias.size() != channels,
          node_finish(p, n)};
}

PoolSpec pool_spec(const Program& p, const Node& n) {
  PoolSpec s;
  if (n.op != OpKind::MaxPool) {
    s.zero_in = first_input(p, n).zero_point;
    s.ratio = n.floats[1];
    s.finish = node_finish(p, n);
  }
  if (n.op == OpKind::AdaptiveAvgPool) return s;
  s.kernel_h = n.ints[0];
  s.kernel_w = n.ints[1];
  s.stride_h = n.ints[2];
  s.stride_w = n.ints[3];
  s.pad_top = n.ints[4];
  s.pad_left = n.ints[5];
  if (n.op == OpKind::MaxPool) {
    s.dilation_h = n.ints[6];
    s.dilation_w = n.ints[7];
  } else {
    s.pad_bottom = n.ints[6];
    s.pad_right = n.ints[7];
    s.count_padding = n.ints[8] != 0;
  }
  return s;
}

ResizeSpec resize_spec(const Program& p, const Node& n) {
  ResizeSpec s;
  s.bilinear = n.ints[0] != 0;
  s.low_h = indices(p, n.constants[0]);
  s.high_h = indices(p, n.constants[1]);
  s.part_h = floats(p, n.constants[2]);
  s.low_w = indices(p, n.constants[3]);
  s.high_w = indices(p, n.constants[4]);
  s.part_w = floats(p, n.constants[5]);
  s.scale = n.floats[1];
  s.offset = n.floats[2];
  s.finish = node_finish(p, n);
  return s;
}

FloatFunctionSpec function_spec(const Node& n) {
  return {static_cast<FloatFunction>(n.ints[0]), n.floats[0], n.floats[1]};
}

EmbeddingSpec embedding_spec(const Program& p, const Node& n) {
  const auto& table = p.constants[n.constants[0]].bytes;
  const int64_t channels = p.values[n.output].c;
  return {table.data(), static_cast<int64_t>(table.size()) / channels, channels};
}

LayerNormSpec layer_norm_spec(const Program& p, const Node& n) {
  LayerNormSpec s;
  s.about_zero = n.op == OpKind::RmsNorm;
  s.zero_point = first_input(p, n).zero_point;
  s.step = static_cast<double>(first_input(p, n).scale);
  s.eps = static_cast<double>(n.floats[1]);
  s.gamma = floats(p, n.constants[0]);
  s.beta = floats(p, n.constants[1]);
  s.finish = node_finish(p, n);
  return s;
}

GroupNormSpec group_norm_spec(const Program& p, const Node& n) {
  return {n.ints[0], layer_norm_spec(p, n)};
}

AttentionShape attention_shape(const Program& p, const Node& n) {
  const Value &q = p.values[n.inputs[0]], &k = p.values[n.inputs[1]], &v = p.values[n.inputs[2]];
  AttentionShape s;
  s.sequences = n.ints[2] != 0 ? q.h : 1;
  s.queries = q.h * q.w / s.sequences;
  s.keys = k.h * k.w / s.sequences;
  s.heads = n.ints[0];
  s.key_heads = n.ints[1];
  s.depth = q.c / s.heads;
  s.width = v.c / s.key_heads;
  return s;
}

AttentionSpec attention_spec(const Program& p, const Node& n) {
  const AttentionShape shape = attention_shape(p, n);
  const int64_t matrix = shape.queries * shape.keys;
  AttentionSpec s;
  s.zero_q = p.values[n.inputs[0]].zero_point;
  s.zero_k = p.values[n.inputs[1]].zero_point;
  s.zero_v = p.values[n.inputs[2]].zero_point;
  s.scale = n.floats[1];
  s.value_scale = p.values[n.inputs[2]].scale;
  s.causal = n.ints[3] != 0;
  if (n.constants[0] >= 0) {
    s.mask = floats(p, n.constants[0]);
    const bool rows = n.ints[4] != 0, heads = n.ints[5] != 0;
    s.mask_head = heads ? matrix : 0;
    s.mask_sequence = rows ? (heads ? shape.heads : 1) * matrix : 0;
  }
  s.finish = node_finish(p, n);
  return s;
}

}  // namespace adalayer::engine

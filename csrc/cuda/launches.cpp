#include "cuda/launches.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace adalayer::cuda {

using engine::OpKind;
using engine::ValueKind;

namespace {

template <class P>
void fill_window(P& q, const PoolSpec& s) {
  q.kernel_h = static_cast<int32_t>(s.kernel_h);
  q.kernel_w = static_cast<int32_t>(s.kernel_w);
  q.stride_h = static_cast<int32_t>(s.stride_h);
  q.stride_w = static_cast<int32_t>(s.stride_w);
  q.pad_top = static_cast<int32_t>(s.pad_top);
  q.pad_left = static_cast<int32_t>(s.pad_left);
  q.pad_bottom = static_cast<int32_t>(s.pad_bottom);
  q.pad_right = static_cast<int32_t>(s.pad_right);
  q.count_padding = s.count_padding;
}

}  // namespace

LaunchPlan Launcher::run() {
  std::vector<engine::Lifetime> lifetimes = d_.lifetimes;
  for (engine::Lifetime& l : lifetimes)
    l.bytes *= batch_;
  const engine::ArenaPlan arena = engine::plan_arena(lifetimes);
  offsets_ = arena.offsets;
  plan_.arena_bytes = arena.bytes;
  for (size_t k = 0; k < p_.nodes.size(); ++k) {
    node_ = static_cast<int32_t>(k);
    add(p_.nodes[k], d_.nodes[k]);
  }
  return std::move(plan_);
}

void Launcher::add(const Node& n, const NodeData& d) {
  switch (n.op) {
    case OpKind::Quantize:
      return quantize(n);
    case OpKind::Dequantize:
      return dequantize(n);
    case OpKind::Conv:
    case OpKind::ConvTranspose:
      return convolve(n, d);
    case OpKind::Lookup:
      return lookup(n, d);
    case OpKind::Add:
    case OpKind::Mul:
      return pair(n, d);
    case OpKind::Affine:
      return affine(n, d);
    case OpKind::Concat:
    case OpKind::Join:
      return join(n, d);
    case OpKind::MaxPool:
    case OpKind::AvgPool:
    case OpKind::AdaptiveAvgPool:
      return pool(n, d);
    case OpKind::Slice:
    case OpKind::Gather:
    case OpKind::Pad:
    case OpKind::Rearrange:
    case OpKind::Reshape:
      return move(n, d);
    case OpKind::Resize:
      return resize(n, d);
    case OpKind::LayerNorm:
    case OpKind::RmsNorm:
      return row_norm(n, d);
    case OpKind::Attention:
      return attention(n, d);
    case OpKind::Function:
      return function(n);
    case OpKind::Combine:
      return combine(n);
    case OpKind::Embedding:  // refused with their whole numbers
    case OpKind::Choose:
    case OpKind::FloatConv:  // check_node()
    case OpKind::Recurrence:
    case OpKind::Reduce:
    case OpKind::Linear:
      break;
    case OpKind::Softmax:
      return softmax(n);
    case OpKind::AffineImage:
      return affine_image(n, d);
    case OpKind::Constant:
      return held_values(n, d);
    case OpKind::GroupNorm:
      return group_norm(n, d);
  }
  fail<InvalidArgument>("node '", n.name, "': the CUDA engine has no operation ",
                        engine::op_name(n.op));
}

void Launcher::quantize(const Node& n) {
  QuantizeParams q{};
  q.in = at<float>(n.inputs[0]);
  q.out = at<uint8_t>(n.output);
  q.batch = batch_;
  q.size = image_size(value(n.output));
  const ActivationGrid g = engine::value_grid(value(n.output));
  q.grid = {g.inv_scale, g.zero_point, g.qmax};
  Launch& l = items(Kernel::Quantize, q, words(n.output));
  bind(l, offsetof(QuantizeParams, in), n.inputs[0]);
  if (d_.input_port[n.inputs[0]] >= 0) l.nhwc_input = d_.input_port[n.inputs[0]];
}

void Launcher::dequantize(const Node& n) {
  const Value& x = value(n.inputs[0]);
  DequantizeParams q{};
  q.in = at<uint8_t>(n.inputs[0]);
  q.out = at<float>(n.output);
  q.batch = batch_;
  q.size = image_size(x);
  q.scale = x.scale;
  q.zero_point = x.zero_point;
  Launch& l = items(Kernel::Dequantize, q, batch_ * x.c * x.h * x.w);
  bind(l, offsetof(DequantizeParams, out), n.output);
}

void Launcher::lookup(const Node& n, const NodeData& d) {
  const LookupParams q{at<uint8_t>(n.inputs[0]), at<uint8_t>(n.output),
                       constant<uint8_t>(n, d, "table"), words(n.output)};
  items(Kernel::Lookup, q, q.words);
}

void Launcher::pair(const Node& n, const NodeData& d) {
  const PairSpec s = engine::pair_spec(p_, n);
  const Value &y = value(n.output), &b = value(n.inputs[1]);
  PairParams q{};
  q.a = at<uint8_t>(n.inputs[0]);
  q.b = at<uint8_t>(n.inputs[1]);
  q.out = at<uint8_t>(n.output);
  q.words = words(n.output);
  q.image_words = static_cast<int32_t>(device_bytes(y) / 4);
  q.pitch_words = image_size(y).pitch / 4;
  q.per_channel = b.h == 1 && b.w == 1;
  q.product = n.op == OpKind::Mul;
  q.zero_a = s.zero_a;
  q.zero_b = s.zero_b;
  q.scale_a = s.scale_a;
  q.scale_b = s.scale_b;
  q.finish = finish(n, d);
  items(Kernel::Pair, q, q.words);
}

void Launcher::affine(const Node& n, const NodeData& d) {
  AffineParams q{};
  q.in = at<uint8_t>(n.inputs[0]);
  q.out = at<uint8_t>(n.output);
  q.words = words(n.output);
  q.pitch_words = image_size(value(n.output)).pitch / 4;
  q.scale = constant<float>(n, d, "scale");
  q.bias = constant<float>(n, d, "bias");
  q.finish = finish(n, d);
  items(Kernel::Affine, q, q.words);
}

void Launcher::affine_image(const Node& n, const NodeData& d) {
  const AffineImageSpec s = engine::affine_image_spec(p_, n);
  AffineImageParams q{};
  q.in = at<uint8_t>(n.inputs[0]);
  q.out = at<uint8_t>(n.output);
  q.batch = batch_;
  q.size = image_size(value(n.output));
  q.scale = constant<float>(n, d, "scale");
  q.bias = constant<float>(n, d, "bias");
  q.scale_of_image = s.scale_of_image;
  q.bias_of_image = s.bias_of_image;
  q.finish = finish(n, d);
  items(Kernel::AffineImage, q, words(n.output));
}

void Launcher::join(const Node& n, const NodeData& d) {
  const int axis = engine::joined_axis(n);
  int32_t begin = 0;
  for (size_t k = 0; k < n.inputs.size(); ++k) {
    MoveParams q{};
    q.kind = MoveParams::kConcat;
    q.in = at<uint8_t>(n.inputs[k]);
    q.out = at<uint8_t>(n.output);
    q.table = constant<uint8_t>(d.constants[k]);
    q.batch = batch_;
    q.from = image_size(value(n.inputs[k]));
    q.to = image_size(value(n.output));
    (axis == 0 ? q.first_channel : axis == 1 ? q.top : q.left) = begin;
    begin += axis == 0 ? q.from.c : axis == 1 ? q.from.h : q.from.w;
    items(Kernel::Move, q, words(n.inputs[k]));
  }
}

void Launcher::pool(const Node& n, const NodeData& d) {
  const PoolSpec s = engine::pool_spec(p_, n);
  const Value &x = value(n.inputs[0]), &y = value(n.output);
  const bool adaptive = n.op == OpKind::AdaptiveAvgPool;
  if (y.kind == ValueKind::F32) {
    FloatAverageParams q{};
    q.in = at<float>(n.inputs[0]);
    q.out = at<float>(n.output);
    q.adaptive = adaptive;
    q.planes = static_cast<int32_t>(batch_ * y.c);
    q.in_h = static_cast<int32_t>(x.h);
    q.in_w = static_cast<int32_t>(x.w);
    q.out_h = static_cast<int32_t>(y.h);
    q.out_w = static_cast<int32_t>(y.w);
    fill_window(q, s);
    Launch& l = items(Kernel::AverageFloats, q, int64_t{q.planes} * y.h * y.w);
    bind(l, offsetof(FloatAverageParams, in), n.inputs[0]);
    bind(l, offsetof(FloatAverageParams, out), n.output);
    return;
  }
  PoolParams q{};
  q.in = at<uint8_t>(n.inputs[0]);
  q.out = at<uint8_t>(n.output);
  q.batch = batch_;
  q.from = image_size(x);
  q.to = image_size(y);
  fill_window(q, s);
  q.dilation_h = static_cast<int32_t>(s.dilation_h);
  q.dilation_w = static_cast<int32_t>(s.dilation_w);
  if (n.op == OpKind::MaxPool) {
    q.kind = PoolParams::kMax;
    items(Kernel::Pool, q, words(n.output));
    return;
  }
  q.kind = adaptive ? PoolParams::kAdaptive : PoolParams::kAverage;
  q.zero_in = s.zero_in;
  q.ratio = s.ratio;
  q.finish = finish(n, d);
  const int64_t window =
      adaptive ? ceil_div(x.h, y.h) * ceil_div(x.w, y.w) : s.kernel_h * s.kernel_w;
  if (window < 32) {
    items(Kernel::Pool, q, words(n.output));
    return;
  }
  Launch& l = items(Kernel::PoolLarge, q, 1);
  l.grid[0] = static_cast<uint32_t>(batch_ * y.h * y.w * ceil_div(q.to.pitch / 4, 32));
}

void Launcher::move(const Node& n, const NodeData& d) {
  MoveParams q{};
  q.in = at<uint8_t>(n.inputs[0]);
  q.out = at<uint8_t>(n.output);
  q.batch = batch_;
  q.from = image_size(value(n.inputs[0]));
  q.to = image_size(value(n.output));
  if (n.op == OpKind::Slice) {
    const engine::SliceAttributes s = engine::slice_attributes(n);
    q.kind = MoveParams::kSlice;
    q.axis = s.axis;
    q.begin = static_cast<int32_t>(s.begin);
    q.step = static_cast<int32_t>(s.step);
  } else if (n.op == OpKind::Gather) {
    q.kind = MoveParams::kGather;
    q.index = constant<int32_t>(n, d, "index");
  } else if (n.op == OpKind::Pad) {
    const engine::PadAttributes s = engine::pad_attributes(n);
    q.kind = MoveParams::kPad;
    q.top = static_cast<int32_t>(s.top);
    q.left = static_cast<int32_t>(s.left);
    q.level = s.level;
  } else if (n.op == OpKind::Resize) {
    q.kind = MoveParams::kResize;
    q.index = constant<int32_t>(n, d, "low_h");
    q.index_w = constant<int32_t>(n, d, "low_w");
  } else if (n.op == OpKind::Rearrange) {
    q.kind = MoveParams::kRearrange;
    q.index = constant<int32_t>(n, d, "channel");
    q.index_h = constant<int32_t>(n, d, "row");
    q.index_w = constant<int32_t>(n, d, "column");
  } else {
    q.kind = q.to.h == 1 && q.to.w == 1 ? MoveParams::kFlatten : MoveParams::kUnflatten;
  }
  items(Kernel::Move, q, words(n.output));
}

void Launcher::resize(const Node& n, const NodeData& d) {
  const ResizeSpec s = engine::resize_spec(p_, n);
  const Value &x = value(n.inputs[0]), &y = value(n.output);
  if (y.kind == ValueKind::U8 && !s.bilinear) return move(n, d);
  const auto tables = [&](auto& q) {
    q.low_h = constant<int32_t>(n, d, "low_h");
    q.high_h = constant<int32_t>(n, d, "high_h");
    q.part_h = constant<float>(n, d, "part_h");
    q.low_w = constant<int32_t>(n, d, "low_w");
    q.high_w = constant<int32_t>(n, d, "high_w");
    q.part_w = constant<float>(n, d, "part_w");
  };
  if (y.kind == ValueKind::F32) {
    FloatResizeParams q{};
    q.in = at<float>(n.inputs[0]);
    q.out = at<float>(n.output);
    q.bilinear = s.bilinear;
    q.planes = static_cast<int32_t>(batch_ * y.c);
    q.in_h = static_cast<int32_t>(x.h);
    q.in_w = static_cast<int32_t>(x.w);
    q.out_h = static_cast<int32_t>(y.h);
    q.out_w = static_cast<int32_t>(y.w);
    tables(q);
    Launch& l = items(Kernel::ResizeFloats, q, int64_t{q.planes} * y.h * y.w);
    bind(l, offsetof(FloatResizeParams, in), n.inputs[0]);
    bind(l, offsetof(FloatResizeParams, out), n.output);
    return;
  }
  BilinearParams q{};
  q.in = at<uint8_t>(n.inputs[0]);
  q.out = at<uint8_t>(n.output);
  q.batch = batch_;
  q.from = image_size(x);
  q.to = image_size(y);
  tables(q);
  q.scale = s.scale;
  q.offset = s.offset;
  q.finish = finish(n, d);
  items(Kernel::Bilinear, q, words(n.output));
}

void Launcher::row_norm(const Node& n, const NodeData& d) {
  const LayerNormSpec s = engine::layer_norm_spec(p_, n);
  LayerNormParams q{};
  q.in = at<uint8_t>(n.inputs[0]);
  q.out = at<uint8_t>(n.output);
  q.pixels = static_cast<int32_t>(batch_ * value(n.output).h * value(n.output).w);
  q.channels = static_cast<int32_t>(value(n.output).c);
  q.pitch = image_size(value(n.output)).pitch;
  q.about_zero = s.about_zero;
  q.zero_point = s.zero_point;
  q.step = s.step;
  q.eps = s.eps;
  q.gamma = constant<float>(n, d, "gamma");
  q.beta = constant<float>(n, d, "beta");
  q.finish = finish(n, d);
  items(Kernel::LayerNorm, q, int64_t{q.pixels} * 32);
}

void Launcher::group_norm(const Node& n, const NodeData& d) {
  const GroupNormSpec s = engine::group_norm_spec(p_, n);
  GroupNormParams q{};
  q.in = at<uint8_t>(n.inputs[0]);
  q.out = at<uint8_t>(n.output);
  q.size = image_size(value(n.output));
  q.groups = static_cast<int32_t>(s.groups);
  q.step = s.norm.step;
  q.eps = s.norm.eps;
  q.gamma = constant<float>(n, d, "gamma");
  q.beta = constant<float>(n, d, "beta");
  q.finish = finish(n, d);
  Launch& l = items(Kernel::GroupNorm, q, 1);
  l.grid[0] = static_cast<uint32_t>(batch_ * s.groups);
}

void Launcher::attention(const Node& n, const NodeData& d) {
  const AttentionShape shape = engine::attention_shape(p_, n);
  const AttentionSpec s = engine::attention_spec(p_, n);
  const auto pitch = [&](int32_t v) { return image_size(value(v)).pitch; };
  AttentionParams q{};
  q.q = at<uint8_t>(n.inputs[0]);
  q.k = at<uint8_t>(n.inputs[1]);
  q.v = at<uint8_t>(n.inputs[2]);
  q.out = at<uint8_t>(n.output);
  q.sequences = static_cast<int32_t>(shape.sequences);
  q.queries = static_cast<int32_t>(shape.queries);
  q.keys = static_cast<int32_t>(shape.keys);
  q.heads = static_cast<int32_t>(shape.heads);
  q.key_heads = static_cast<int32_t>(shape.key_heads);
  q.depth = static_cast<int32_t>(shape.depth);
  q.width = static_cast<int32_t>(shape.width);
  q.q_pitch = pitch(n.inputs[0]);
  q.k_pitch = pitch(n.inputs[1]);
  q.v_pitch = pitch(n.inputs[2]);
  q.out_pitch = pitch(n.output);
  q.zero_q = s.zero_q;
  q.zero_k = s.zero_k;
  q.zero_v = s.zero_v;
  q.scale = s.scale;
  q.value_scale = s.value_scale;
  q.causal = s.causal ? 1 : 0;
  q.mask = constant<float>(n, d, "mask");
  q.mask_sequence = s.mask_sequence;
  q.mask_head = s.mask_head;
  q.finish = finish(n, d);
  const int64_t rows = int64_t{batch_} * q.sequences * q.heads * q.queries;
  Launch& l = items(Kernel::Attention, q, rows * kAttentionThreads);
  l.kernel.shared_bytes += (q.keys + 3) / 4 * 4;
}

void Launcher::function(const Node& n) {
  const FloatFunctionSpec s = engine::function_spec(n);
  FloatFunctionParams q{
      at<float>(n.inputs[0]), at<float>(n.output), elements(n.output), s.function, s.a, s.b};
  Launch& l = items(Kernel::FunctionFloats, q, q.count);
  bind(l, offsetof(FloatFunctionParams, in), n.inputs[0]);
  bind(l, offsetof(FloatFunctionParams, out), n.output);
}

void Launcher::combine(const Node& n) {
  FloatPairParams q{at<float>(n.inputs[0]), at<float>(n.inputs[1]), at<float>(n.output),
                    elements(n.output), engine::combine_pair(n)};
  Launch& l = items(Kernel::CombineFloats, q, q.count);
  bind(l, offsetof(FloatPairParams, a), n.inputs[0]);
  bind(l, offsetof(FloatPairParams, b), n.inputs[1]);
  bind(l, offsetof(FloatPairParams, out), n.output);
}

void Launcher::softmax(const Node& n) {
  SoftmaxParams q{at<float>(n.inputs[0]), at<float>(n.output),
                  static_cast<int32_t>(value(n.output).c),
                  static_cast<int32_t>(value(n.output).h * value(n.output).w)};
  Launch& l = items(Kernel::Softmax, q, 1);
  l.grid[0] = static_cast<uint32_t>(batch_ * q.plane);
  bind(l, offsetof(SoftmaxParams, in), n.inputs[0]);
  bind(l, offsetof(SoftmaxParams, out), n.output);
}

void Launcher::held_values(const Node& n, const NodeData& d) {
  MoveParams q{};
  q.kind = MoveParams::kConstant;
  q.in = constant<uint8_t>(n, d, "values");
  q.out = at<uint8_t>(n.output);
  q.batch = batch_;
  q.to = image_size(value(n.output));
  items(Kernel::Move, q, words(n.output));
}

LaunchPlan make_plan(const Model& model, int64_t batch, const Bases& bases,
                     const std::vector<Choice>& chosen) {
  if (batch < 1 || batch > model.most_images())
    fail<InvalidArgument>("a plan is for 1 to ", model.most_images(), " images, got ", batch);
  return Launcher(model, batch, bases, chosen).run();
}

}  // namespace adalayer::cuda

#include "engine/steps.hpp"

#include <algorithm>
#include <iterator>
#include <span>

#include "core/status.hpp"
#include "cpu/image/attention.hpp"
#include "cpu/image/ops.hpp"
#include "engine/float_tail.hpp"

namespace adalayer::engine {
namespace {

using cpu::Part;
using RunImage = std::function<void(const Frame&, int64_t, Part)>;

// An element-wise part smaller than this is done before another thread has picked it up.
constexpr int64_t kBytesPerPart = 32 << 10;
// Threads share the images of a recurrent layer, and never one image: steps wait for each other.
constexpr int64_t kMostImages = 64;
constexpr int64_t kProductsPerPart = 1 << 18;

/// y = op(x) over u8 images.
template <class Fn>
RunImage unary(const Node& node, Fn fn) {
  const int32_t x = node.inputs[0], y = node.output;
  return [=](const Frame& f, int64_t n, Part part) { fn(f.image(x, n), f.image(y, n), part); };
}
template <class Fn>
RunImage binary(const Node& node, Fn fn) {
  const int32_t a = node.inputs[0], b = node.inputs[1], y = node.output;
  return [=](const Frame& f, int64_t n, Part part) {
    fn(f.image(a, n), f.image(b, n), f.image(y, n), part);
  };
}

RunImage quantize(const Program& program, const Node& node,
                  const std::vector<ValueLayout>& layouts) {
  const int32_t x = node.inputs[0], y = node.output;
  const ActivationGrid grid = value_grid(program.values[y]);
  if (const cpu::OwnInput* own = layouts[y].own_input.get()) {
    return [=](const Frame& f, int64_t n, Part part) {
      const ActivationIn in{f.floats(x, n), DType::F32, f.order[x], grid};
      own->pack(in, f.image(y, n).data, part);
    };
  }
  return [=](const Frame& f, int64_t n, Part part) {
    cpu::quantize_image(f.floats(x, n), f.order[x], grid, f.image(y, n), part);
  };
}

RunImage affine_image(const Program& program, const Node& node) {
  const AffineImageSpec spec = affine_image_spec(program, node);
  const Value& y = program.values[node.output];
  const double largest = cpu::affine_image_bound(spec, y.c, y.c * y.h * y.w);
  return unary(node,
               [=](auto i, auto o, Part part) { cpu::affine_image(spec, largest, i, o, part); });
}

RunImage constant(const Program& program, const Node& node) {
  const engine::Constant& held = held_values(program, node);
  const uint8_t* levels = held.bytes.data();
  const int32_t y = node.output;
  if (program.values[y].kind == ValueKind::F32) {
    const std::span<const float> floats = held.f32();
    return [=](const Frame& f, int64_t n, Part part) {
      const auto first = part.first(std::ssize(floats)), last = part.last(std::ssize(floats));
      std::copy(floats.begin() + first, floats.begin() + last, f.floats(y, n) + first);
    };
  }
  return [=](const Frame& f, int64_t n, Part part) { cpu::constant(levels, f.image(y, n), part); };
}

/// Concat and Join of floats.
RunImage join_floats(const Program& program, const Node& node) {
  struct Piece {
    int32_t value;
    int64_t begin, length;
  };
  const int axis = joined_axis(node);
  const Value& y = program.values[node.output];
  const int64_t rows = axis == 0 ? 1 : axis == 1 ? y.c : y.c * y.h;
  const int64_t pitch = y.c * y.h * y.w / rows;
  std::vector<Piece> pieces;
  int64_t begin = 0;
  for (const int32_t v : node.inputs) {
    const Value& x = program.values[v];
    pieces.push_back({v, begin, x.c * x.h * x.w / rows});
    begin += pieces.back().length;
  }
  const int32_t to = node.output;
  return [=](const Frame& f, int64_t n, Part part) {
    for (const Piece& p : pieces)
      cpu::copy_piece_f32(f.floats(p.value, n), rows, p.length, f.floats(to, n), pitch, p.begin,
                          part);
  };
}

/// Concat and Join: the pieces one after the other along an axis, but for those that are there.
RunImage join(const Program& program, const Node& node, const std::vector<ValueLayout>& layouts) {
  if (program.values[node.output].kind == ValueKind::F32) return join_floats(program, node);
  struct Piece {
    int32_t value;
    int64_t begin;
    const uint8_t* table;
  };
  const int axis = joined_axis(node);
  std::vector<Piece> pieces;
  int64_t begin = 0;
  for (size_t k = 0; k < node.inputs.size(); ++k) {
    const Value& x = program.values[node.inputs[k]];
    if (!layouts[node.inputs[k]].in_place())
      pieces.push_back({node.inputs[k], begin, table_bytes(program, node.constants[k])});
    begin += axis == 0 ? x.c : axis == 1 ? x.h : x.w;
  }
  const int32_t y = node.output;
  return [=](const Frame& f, int64_t n, Part part) {
    for (const Piece& p : pieces) {
      const cpu::ConstImageView from = f.image(p.value, n);
      if (axis == 0)
        cpu::copy_channels(from, p.table, f.image(y, n), p.begin, part);
      else
        cpu::copy_piece(from, p.table, f.image(y, n), axis, p.begin, part);
    }
  };
}

RunImage resize(const Program& program, const Node& node) {
  const ResizeSpec spec = resize_spec(program, node);
  const int32_t x = node.inputs[0], y = node.output;
  const Value in = program.values[x], out = program.values[y];
  if (out.kind == ValueKind::U8)
    return unary(node, [=](auto i, auto o, Part part) { cpu::resize(spec, i, o, part); });
  return [=](const Frame& f, int64_t n, Part part) {
    cpu::resize_f32(spec, f.floats(x, n), in.c, in.h, in.w, f.floats(y, n), out.h, out.w, part);
  };
}

RunImage attention(const Program& program, const Node& node) {
  const AttentionShape shape = attention_shape(program, node);
  const AttentionSpec shared = attention_spec(program, node);
  const int32_t q = node.inputs[0], k = node.inputs[1], v = node.inputs[2], y = node.output;
  const int32_t keys = node.inputs.size() > 3 ? node.inputs[3] : -1;
  const bool to_float = program.values[y].kind == ValueKind::F32;
  const int64_t positions = program.values[y].h * program.values[y].w;
  return [=](const Frame& f, int64_t n, Part part) {
    AttentionSpec spec = shared;
    if (keys >= 0) spec.keys = f.floats(keys, n);
    if (to_float)
      cpu::attention_f32(shape, spec, f.image(q, n), f.image(k, n), f.image(v, n),
                         {f.floats(y, n), 1, positions}, part);
    else
      cpu::attention(shape, spec, f.image(q, n), f.image(k, n), f.image(v, n), f.image(y, n), part);
  };
}

/// A norm of levels to levels, of levels to floats, or of floats.
template <class Levels, class ToFloats, class Floats>
RunImage norm(const Program& program, const Node& node, Levels levels, ToFloats to_floats,
              Floats floats) {
  const int32_t x = node.inputs[0], y = node.output;
  const Value in = program.values[x];
  if (program.values[y].kind == ValueKind::U8) return unary(node, levels);
  if (in.kind == ValueKind::U8)
    return [=](const Frame& f, int64_t n, Part part) {
      to_floats(f.image(x, n), f.floats(y, n), part);
    };
  return [=](const Frame& f, int64_t n, Part part) {
    floats(f.floats(x, n), in.c, in.h * in.w, f.floats(y, n), part);
  };
}

RunImage affine(const Program& program, const Node& node) {
  const AffineSpec spec = affine_spec(program, node);
  const int32_t x = node.inputs[0], y = node.output;
  const Value in = program.values[x];
  if (in.kind == ValueKind::U8)
    return unary(node, [=](auto i, auto o, Part part) { cpu::affine(spec, i, o, part); });
  return [=](const Frame& f, int64_t n, Part part) {
    cpu::affine_f32(spec, f.floats(x, n), in.c, in.h * in.w, f.floats(y, n), part);
  };
}

RunImage rearrange(const Program& program, const Node& node) {
  const RearrangeSpec spec = rearrange_spec(program, node);
  const int32_t x = node.inputs[0], y = node.output;
  const Value out = program.values[y];
  if (out.kind == ValueKind::U8)
    return unary(node, [=](auto i, auto o, Part part) { cpu::rearrange(spec, i, o, part); });
  return [=](const Frame& f, int64_t n, Part part) {
    cpu::rearrange_f32(spec, f.floats(x, n), f.floats(y, n), out.c, out.h, out.w, part);
  };
}

RunImage choose(const Node& node, const Value& out) {
  const int32_t x = node.inputs[0], y = node.output;
  const int64_t count = out.h * out.w;
  const auto [any, zero, other] = choose_attributes(node);
  return [=](const Frame& f, int64_t n, Part part) {
    for (int64_t i = part.first(count); i < part.last(count); ++i)
      f.floats(y, n)[i] = f.ids(x, n)[i] == 0 ? zero : other;
  };
}

/// Pooling of floats.
RunImage float_pool(const Program& program, const Node& node) {
  const bool adaptive = node.op == OpKind::AdaptiveAvgPool, maximum = node.op == OpKind::MaxPool;
  const PoolSpec spec = pool_spec(program, node);
  const int32_t x = node.inputs[0], y = node.output;
  const Value in = program.values[x], out = program.values[y];
  return [=](const Frame& f, int64_t n, Part part) {
    if (maximum)
      maximum_f32(spec, f.floats(x, n), in.h, in.w, f.floats(y, n), out.h, out.w, part.first(in.c),
                  part.last(in.c));
    else
      average_f32(spec, adaptive, f.floats(x, n), in.h, in.w, f.floats(y, n), out.h, out.w,
                  part.first(in.c), part.last(in.c));
  };
}

RunImage dequantize(const Program& program, const Node& node) {
  const int32_t x = node.inputs[0], y = node.output;
  const Value in = program.values[x];
  return [=](const Frame& f, int64_t n, Part part) {
    cpu::dequantize_image(f.image(x, n), in.scale, in.zero_point, f.floats(y, n), part);
  };
}

/// Add and Mul.
RunImage pair(const Program& program, const Node& node) {
  const PairSpec spec = pair_spec(program, node);
  if (node.op == OpKind::Add)
    return binary(node, [=](auto a, auto b, auto o, Part part) { cpu::add(spec, a, b, o, part); });
  return binary(node, [=](auto a, auto b, auto o, Part part) { cpu::mul(spec, a, b, o, part); });
}

RunImage pool(const Program& program, const Node& node) {
  if (program.values[node.inputs[0]].kind == ValueKind::F32) return float_pool(program, node);
  const PoolSpec spec = pool_spec(program, node);
  if (node.op == OpKind::MaxPool)
    return unary(node, [=](auto i, auto o, Part part) { cpu::max_pool(spec, i, o, part); });
  if (node.op == OpKind::AvgPool)
    return unary(node, [=](auto i, auto o, Part part) { cpu::avg_pool(spec, i, o, part); });
  return unary(node, [=](auto i, auto o, Part part) { cpu::adaptive_avg_pool(spec, i, o, part); });
}

/// What moves levels and does not compute: Lookup, Slice, Gather, Pad, Reshape.
RunImage move(const Program& program, const Node& node) {
  switch (node.op) {
    case OpKind::Lookup: {
      const uint8_t* table = lookup_table(program, node);
      return unary(node, [=](auto i, auto o, Part part) { cpu::lookup(table, i, o, part); });
    }
    case OpKind::Slice: {
      const SliceAttributes a = slice_attributes(node);
      return unary(node, [=](auto i, auto o, Part part) {
        cpu::slice(a.axis, a.begin, a.step, i, o, part);
      });
    }
    case OpKind::Gather: {
      const int32_t* index = gather_index(program, node).data();
      return unary(node,
                   [=](auto i, auto o, Part part) { cpu::gather_channels(index, i, o, part); });
    }
    case OpKind::Pad: {
      const PadAttributes a = pad_attributes(node);
      return unary(
          node, [=](auto i, auto o, Part part) { cpu::pad(a.top, a.left, a.level, i, o, part); });
    }
    default:
      return unary(node, [](auto i, auto o, Part part) { cpu::reshape(i, o, part); });
  }
}

/// LayerNorm and RmsNorm.
RunImage row_norm(const Program& program, const Node& node) {
  const LayerNormSpec spec = layer_norm_spec(program, node);
  return norm(
      program, node, [=](auto i, auto o, Part part) { cpu::layer_norm(spec, i, o, part); },
      [=](auto i, float* o, Part part) { cpu::layer_norm_f32(spec, i, o, part); },
      [=](const float* i, int64_t c, int64_t plane, float* o, Part part) {
        cpu::layer_norm_floats(spec, i, c, plane, o, part);
      });
}

RunImage group_norm(const Program& program, const Node& node) {
  const GroupNormSpec spec = group_norm_spec(program, node);
  return norm(
      program, node, [=](auto i, auto o, Part part) { cpu::group_norm(spec, i, o, part); },
      [=](auto i, float* o, Part part) { cpu::group_norm_f32(spec, i, o, part); },
      [=](const float* i, int64_t c, int64_t plane, float* o, Part part) {
        cpu::group_norm_floats(spec, i, c, plane, o, part);
      });
}

/// Function, Combine, Softmax: floats to floats.
RunImage of_floats(const Program& program, const Node& node) {
  const int32_t x = node.inputs[0], y = node.output;
  const Value in = program.values[x];
  const int64_t count = in.c * in.h * in.w;
  if (node.op == OpKind::Softmax)
    return [=](const Frame& f, int64_t n, Part part) {
      cpu::softmax_f32(f.floats(x, n), in.c, in.h * in.w, f.floats(y, n), part);
    };
  if (node.op == OpKind::Function) {
    const FloatFunctionSpec spec = function_spec(node);
    return [=](const Frame& f, int64_t n, Part part) {
      cpu::function_f32(spec, f.floats(x, n), count, f.floats(y, n), part);
    };
  }
  const int32_t other = node.inputs[1];
  const Value &b = program.values[other], &out = program.values[y];
  const cpu::CombinedFloats spec(combine_pair(node), {in.c, in.h, in.w}, {b.c, b.h, b.w},
                                 {out.c, out.h, out.w});
  return [=](const Frame& f, int64_t n, Part part) {
    cpu::combine_f32(spec, f.floats(x, n), f.floats(other, n), f.floats(y, n), part);
  };
}

RunImage reduce(const Program& program, const Node& node) {
  const ReduceSpec spec = reduce_spec(program, node);
  const int32_t x = node.inputs[0], y = node.output;
  const Value in = program.values[x];
  return [=](const Frame& f, int64_t n, Part part) {
    if (in.kind == ValueKind::U8)
      cpu::reduce(spec, f.image(x, n), f.floats(y, n), part);
    else
      cpu::reduce_floats(spec, f.floats(x, n), in.c, in.h, in.w, f.floats(y, n), part);
  };
}

RunImage embedding(const Program& program, const Node& node) {
  const EmbeddingSpec spec = embedding_spec(program, node);
  const int32_t x = node.inputs[0], y = node.output;
  return [=](const Frame& f, int64_t n, Part part) {
    cpu::embedding(spec, f.ids(x, n), f.image(y, n), part);
  };
}

RunImage run_image(const Program& program, const Node& node,
                   const std::vector<ValueLayout>& layouts) {
  switch (node.op) {
    case OpKind::Quantize:
      return quantize(program, node, layouts);
    case OpKind::Dequantize:
      return dequantize(program, node);
    case OpKind::Add:
    case OpKind::Mul:
      return pair(program, node);
    case OpKind::Affine:
      return affine(program, node);
    case OpKind::AffineImage:
      return affine_image(program, node);
    case OpKind::Concat:
    case OpKind::Join:
      return join(program, node, layouts);
    case OpKind::MaxPool:
    case OpKind::AvgPool:
    case OpKind::AdaptiveAvgPool:
      return pool(program, node);
    case OpKind::Lookup:
    case OpKind::Slice:
    case OpKind::Gather:
    case OpKind::Pad:
    case OpKind::Reshape:
      return move(program, node);
    case OpKind::Rearrange:
      return rearrange(program, node);
    case OpKind::Resize:
      return resize(program, node);
    case OpKind::LayerNorm:
    case OpKind::RmsNorm:
      return row_norm(program, node);
    case OpKind::GroupNorm:
      return group_norm(program, node);
    case OpKind::Attention:
      return attention(program, node);
    case OpKind::Function:
    case OpKind::Combine:
    case OpKind::Softmax:
      return of_floats(program, node);
    case OpKind::Reduce:
      return reduce(program, node);
    case OpKind::Embedding:
      return embedding(program, node);
    case OpKind::Choose:
      return choose(node, program.values[node.output]);
    case OpKind::Constant:
      return constant(program, node);
    case OpKind::FloatConv:
    case OpKind::Conv:
    case OpKind::ConvTranspose:
    case OpKind::Recurrence:
    case OpKind::Linear:
      break;
  }
  throw InvalidArgument("node '" + node.name + "': no such operation");
}

const cpu::ImageLayout* layout_of(const Program& program, const std::vector<ValueLayout>& layouts,
                                  int32_t v) {
  return program.values[v].kind == ValueKind::U8 ? &layouts[v].layout : nullptr;
}

/// Layouts around a convolution.
struct Around {
  const cpu::ImageLayout& in;
  const cpu::ImageLayout *out, *residual;
  bool own_input;
};
Around around(const Program& program, const Node& node, const std::vector<ValueLayout>& layouts) {
  const ValueLayout& in = layouts[node.inputs[0]];
  return {in.layout, layout_of(program, layouts, node.output),
          node.inputs.size() > 1 ? layout_of(program, layouts, node.inputs[1]) : nullptr,
          in.own_input != nullptr};
}

/// The steps that have no weights.
Step plain_step(const Program& program, const Node& node, const std::vector<ValueLayout>& layouts) {
  Step step;
  step.node = &node;
  step.run_image = run_image(program, node, layouts);
  int64_t bytes = 0;
  const auto add = [&](int32_t v) {
    bytes += program.values[v].c * program.values[v].h * program.values[v].w;
  };
  add(node.output);
  if (!node.inputs.empty()) add(node.inputs[0]);
  step.max_parts = std::max<int64_t>(1, bytes / kBytesPerPart);
  if (node.op == OpKind::Attention)
    step.max_parts = cpu::attention_parts(attention_shape(program, node));
  return step;
}

/// Whether a node is a convolution of levels.
bool has_packed_weights(const Node& node) {
  return node.op == OpKind::Conv || node.op == OpKind::ConvTranspose;
}

Step conv_step(const Program& program, const Node& node, const std::vector<ValueLayout>& layouts,
               cpu::Room room) {
  const Around at = around(program, node, layouts);
  Step step;
  step.node = &node;
  step.conv =
      std::make_unique<ConvStep>(program, node, at.in, at.out, at.residual, at.own_input, room);
  step.max_parts = step.conv->max_parts();
  return step;
}

Step float_step(const Program& program, const Node& node, const cpu::FloatConv* like) {
  const FloatConvSpec spec = float_conv_spec(program, node);
  Step step;
  step.node = &node;
  step.floats = like != nullptr && like->fits(spec)
                    ? std::make_unique<cpu::FloatConv>(*like, spec)
                    : std::make_unique<cpu::FloatConv>(spec, unpacked_floats(program, node));
  step.max_parts = step.floats->max_parts();
  return step;
}

Step recurrent_step(const Program& program, const Node& node, const cpu::Recurrence* like) {
  const RecurrenceSpec spec = recurrence_spec(program, node);
  const Constant& stored = weights_of(program, node);
  Step step;
  step.node = &node;
  step.recurrence = like != nullptr ? std::make_unique<cpu::Recurrence>(*like, spec)
                                    : std::make_unique<cpu::Recurrence>(
                                          spec, unpacked_weights(stored), weight_bits(stored));
  step.max_parts = kMostImages;
  return step;
}

Step linear_step(const Program& program, const Node& node, const cpu::Linear* like) {
  const Constant& stored = weights_of(program, node);
  const LinearSpec spec = linear_spec(program, node);
  Step step;
  step.node = &node;
  step.linear = like != nullptr ? std::make_unique<cpu::Linear>(*like, spec, false)
                                : std::make_unique<cpu::Linear>(spec, unpacked_weights(stored),
                                                                weight_bits(stored));
  const Value& out = program.values[node.output];
  step.max_parts =
      std::max<int64_t>(1, spec.inputs * spec.outputs * out.h * out.w / kProductsPerPart);
  return step;
}

/// A step that has weights of its own, but is no convolution of levels; `like` is the same one for
/// another image size, or null.
Step other_step(const Program& program, const Node& node, const std::vector<ValueLayout>& layouts,
                const Step* like) {
  if (node.op == OpKind::FloatConv)
    return float_step(program, node, like == nullptr ? nullptr : like->floats.get());
  if (node.op == OpKind::Recurrence)
    return recurrent_step(program, node, like == nullptr ? nullptr : like->recurrence.get());
  if (node.op == OpKind::Linear)
    return linear_step(program, node, like == nullptr ? nullptr : like->linear.get());
  return plain_step(program, node, layouts);
}

}  // namespace

std::vector<Step> build_steps(const Program& program, const std::vector<ValueLayout>& layouts,
                              cpu::Room room) {
  std::vector<Step> steps;
  for (const Node& node : program.nodes)
    steps.push_back(has_packed_weights(node) ? conv_step(program, node, layouts, room)
                                             : other_step(program, node, layouts, nullptr));
  return steps;
}

SharedSteps build_steps(const Program& program, const std::vector<ValueLayout>& layouts,
                        const std::vector<Step>& like) {
  SharedSteps found;
  for (size_t k = 0; k < program.nodes.size(); ++k) {
    const Node& node = program.nodes[k];
    if (!has_packed_weights(node)) {
      found.steps.push_back(other_step(program, node, layouts, &like[k]));
      continue;
    }
    const Around at = around(program, node, layouts);
    Step step;
    step.node = &node;
    step.conv =
        ConvStep::at_size(*like[k].conv, program, node, at.in, at.out, at.residual, at.own_input);
    if (step.conv != nullptr) {
      step.max_parts = step.conv->max_parts();
    } else {
      step = conv_step(program, node, layouts, cpu::Room::Least);
      step.conv->choose({});
      found.own.push_back(k);
    }
    found.steps.push_back(std::move(step));
  }
  return found;
}

}  // namespace adalayer::engine

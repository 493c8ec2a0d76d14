#include "cuda/plan.hpp"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <utility>

#include "core/status.hpp"
#include "cuda/conv_plan.hpp"
#include "cuda/packing.hpp"
#include "engine/memory.hpp"

namespace adalayer::cuda {

using engine::Node;
using engine::OpKind;
using engine::Program;
using engine::Value;
using engine::ValueKind;

namespace {

// Sums of shared tiles: more than this would not stay in the second-level cache.
constexpr int64_t kMostScratch = 32 << 20;
constexpr int64_t kCounterBytes = 1 << 16;  // at the beginning of the scratch memory
constexpr int64_t kMostTensor = (int64_t{1} << 31) - 1;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t device_bytes(const Value& v) {
  return v.kind == ValueKind::F32 ? v.c * v.h * v.w * 4 : device_pitch(v.c) * v.h * v.w;
}

ImageSize image_size(const Value& v) {
  return {static_cast<int32_t>(v.c), static_cast<int32_t>(v.h), static_cast<int32_t>(v.w),
          static_cast<int32_t>(device_pitch(v.c))};
}

/// What nodes need besides the weights of convolutions: offsets into the image, -1 for nothing.
struct NodeData {
  ConvPlan conv;
  std::vector<int64_t> constants;  // in the order of the node's constants
};

}  // namespace

struct Model::Prepared {
  std::vector<NodeData> nodes;
  std::vector<engine::Lifetime> lifetimes;   // of one image
  std::vector<int> input_port, output_port;  // [values]
};

// ---- what does not depend on the batch ---------------------------------------------------------

namespace {

ConvSource conv_source(const Program& p, const Node& n) {
  ConvSource s;
  const Value &x = p.values[n.inputs[0]], &y = p.values[n.output];
  s.in_c = static_cast<int32_t>(x.c);
  s.in_h = static_cast<int32_t>(x.h);
  s.in_w = static_cast<int32_t>(x.w);
  s.out_c = static_cast<int32_t>(y.c);
  s.out_h = static_cast<int32_t>(y.h);
  s.out_w = static_cast<int32_t>(y.w);
  s.input_zero_point = x.zero_point;
  s.a = engine::conv_attributes(n);
  s.transposed = n.op == OpKind::ConvTranspose;
  s.packed = &p.constants[s.a.weights].bytes;
  s.scale = p.constants[s.a.scale].f32().data();
  s.bias = p.constants[s.a.bias].f32().data();
  return s;
}

NodeData prepare_node(const Program& p, const Node& n, ImageBuilder& image) {
  NodeData data;
  if (n.op == OpKind::Conv || n.op == OpKind::ConvTranspose) {
    try {
      data.conv = plan_conv(conv_source(p, n), image);
    } catch (const CorruptData& error) {
      fail<CorruptData>("node '", n.name, "': ", error.what());
    }
  }
  for (const int32_t c : n.constants) {
    int64_t at = -1;
    if (c >= 0 && p.constants[c].kind != engine::ConstantKind::Weights) {
      std::vector<uint8_t> bytes = p.constants[c].bytes;
      // Arrays over channels are read four channels at a time.
      if (p.constants[c].kind == engine::ConstantKind::F32)
        bytes.resize(static_cast<size_t>(4 * device_pitch(static_cast<int64_t>(bytes.size()) / 4)));
      at = image.add(bytes);
    }
    data.constants.push_back(at);
  }
  return data;
}

/// Throws for an operation that runs on the CPU alone.
void check_node(const Program& p, const Node& n) {
  constexpr OpKind kOfLevels[] = {OpKind::Affine,    OpKind::Rearrange, OpKind::Constant,
                                  OpKind::Attention, OpKind::LayerNorm, OpKind::RmsNorm,
                                  OpKind::GroupNorm, OpKind::MaxPool};
  const bool floats =
      p.values[n.output].kind == ValueKind::F32 &&
      std::find(std::begin(kOfLevels), std::end(kOfLevels), n.op) != std::end(kOfLevels);
  if (floats || n.op == OpKind::FloatConv)
    fail<InvalidArgument>("node '", n.name, "': ", engine::op_name(n.op),
                          " with a float result runs on the CPU alone");
}

}  // namespace

Model::Model(Program program, const Machine& machine)
    : program_(std::move(program)), machine_(machine), prepared_(std::make_unique<Prepared>()) {
  engine::validate(program_);
  const Program& p = program_;
  // An id that is no row is an error of the call, which a launch could not return.
  for (const int32_t v : p.inputs)
    if (p.values[v].kind == ValueKind::I32)
      fail<InvalidArgument>("input '", p.values[v].name,
                            "' is token ids, which programs read on the CPU alone");
  for (const Node& n : p.nodes)
    check_node(p, n);
  Prepared& d = *prepared_;
  ImageBuilder image;
  for (const Node& n : p.nodes) {
    d.nodes.push_back(prepare_node(p, n, image));
    weight_bytes_ += d.nodes.back().conv.weight_bytes;
  }
  image_ = image.take();

  const size_t count = p.values.size();
  d.input_port.assign(count, -1);
  d.output_port.assign(count, -1);
  // (No value is a port twice: validate() sees to it.)
  for (size_t k = 0; k < p.inputs.size(); ++k)
    d.input_port[p.inputs[k]] = static_cast<int>(k);
  for (size_t k = 0; k < p.outputs.size(); ++k)
    d.output_port[p.outputs[k]] = static_cast<int>(k);
  d.lifetimes.resize(count);
  int64_t most = 1;
  for (size_t v = 0; v < count; ++v) {
    const Value& value = p.values[v];
    most = std::max(most, device_bytes(value));
    // Positions are counted in 32 bits, too.
    most = std::max(most, value.h * value.w * 16);
    const bool port = d.input_port[v] >= 0 || d.output_port[v] >= 0;
    d.lifetimes[v] = {port ? 0 : device_bytes(value), -1, -1};
  }
  for (size_t k = 0; k < p.nodes.size(); ++k) {
    const auto at = static_cast<int32_t>(k);
    d.lifetimes[p.nodes[k].output].first = at;
    d.lifetimes[p.nodes[k].output].last = std::max(d.lifetimes[p.nodes[k].output].last, at);
    for (const int32_t v : p.nodes[k].inputs)
      d.lifetimes[v].last = at;
  }
  most_images_ = std::max<int64_t>(1, kMostTensor / most);
  if (most > kMostTensor)
    fail<InvalidArgument>("a tensor of one image takes ", most,
                          " bytes on the device; the CUDA kernels address ", kMostTensor);
}

Model::~Model() = default;

// ---- choices
// ---------------------------------------------------------------------------------------

std::vector<Choice> choices(const Product& p, const Machine& m) {
  struct Rated {
    Choice choice;
    double cost;
  };
  std::vector<Rated> rated;
  for (int number = 0; number < kTiles * kForms; ++number) {
    const int tile = number / kForms;
    const auto form = static_cast<Form>(number % kForms);
    // Steps of a block of threads, and the share of a dense step's products in one of them.
    int64_t depth_steps = p.steps;
    double share = 1.0;
    if (form == Form::Blocks) {
      if (p.block_steps == 0) continue;
      depth_steps = std::max<int64_t>(1, p.longest_block);
      share = static_cast<double>(p.stored_cells) / static_cast<double>(8 * p.block_steps);
    } else if (form == Form::Structured) {
      if (!p.structured) continue;
      share = 0.55;
    }
    const KernelInfo info = conv_kernel(p.bits, tile, p.piece, form);
    if (info.function == nullptr || info.shared_bytes > m.shared_bytes) continue;
    const TileSize& t = kTileSizes[tile];
    if (t.group && !m.group_products) continue;
    const int64_t tiles =
        ceil_div(p.channels, t.channels) * ceil_div(p.positions, t.positions) * p.groups;
    const int blocks = std::max(1, std::min(t.blocks, m.shared_bytes / info.shared_bytes));
    for (const int splits : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}) {
      if (splits > 1 && (splits > depth_steps || tiles * splits > 4 * int64_t{m.multiprocessors} ||
                         tiles * 4 > kCounterBytes))
        break;
      // Rough clocks: a step's products share the multiprocessor's tensor cores with the blocks
      // beside it; alone, a step cannot be faster than its data arrive.
      const int64_t launched = tiles * splits;
      const auto beside =
          static_cast<double>(std::min<int64_t>(blocks, ceil_div(launched, m.multiprocessors)));
      const double products = share * static_cast<double>(t.channels) * t.positions * kStepDepth /
                              (t.group ? 4096.0 : 2048.0);
      const double step = std::max(250.0, beside * products);
      const auto waves =
          static_cast<double>(ceil_div(launched, int64_t{m.multiprocessors} * blocks));
      const auto steps = static_cast<double>(ceil_div(depth_steps, splits));
      const double shared = splits > 1 ? 1500.0 + 0.02 * t.channels * t.positions : 0.0;
      rated.push_back({{tile, splits, form}, waves * (2500.0 + steps * step + shared)});
    }
  }
  std::stable_sort(rated.begin(), rated.end(),
                   [](const Rated& a, const Rated& b) { return a.cost < b.cost; });
  std::vector<Choice> found;
  for (const Rated& r : rated)
    found.push_back(r.choice);
  return found;
}

// ---- launches
// ----------------------------------------------------------------------------------------

namespace {

class Planner {
 public:
  Planner(const Model& model, int64_t batch, const Bases& bases, const std::vector<Choice>& chosen)
      : model_(model),
        p_(model.program()),
        d_(model.prepared()),
        batch_(static_cast<int32_t>(batch)),
        bases_(bases),
        chosen_(chosen) {}

  Plan run() {
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

 private:
  const Value& value(int32_t v) const { return p_.values[v]; }

  /// Memory of a value; null for one of the program's ports.
  template <class T>
  T* at(int32_t v) const {
    if (d_.input_port[v] >= 0 || d_.output_port[v] >= 0) return nullptr;
    return reinterpret_cast<T*>(bases_.arena + offsets_[v]);
  }
  template <class T>
  const T* constant(int64_t offset) const {
    return offset < 0 ? nullptr : reinterpret_cast<const T*>(bases_.image + offset);
  }

  template <class T>
  const T* constant(const Node& n, const NodeData& d, std::string_view name) const {
    return constant<T>(d.constants[engine::operation(n.op).constant_place(name)]);
  }

  Finish finish(const Node& n, const NodeData& d) const {
    const U8Finish f = engine::node_finish(p_, n);
    const int table = engine::operation(n.op).table();
    return {f.lo, f.hi, f.inv_scale, f.zero_point,
            table < 0 ? nullptr : constant<uint8_t>(d.constants[table])};
  }

  Launch launch(const KernelInfo& kernel, const std::string& what) {
    Launch l;
    l.kernel = kernel;
    l.node = node_;
    l.name = what;
    return l;
  }

  /// Remembers that the pointer at `offset` of the parameters belongs to value v.
  void bind(Launch& l, size_t offset, int32_t v) const {
    if (d_.output_port[v] >= 0)
      l.ports.push_back({offset, true, d_.output_port[v]});
    else if (d_.input_port[v] >= 0)
      l.ports.push_back({offset, false, d_.input_port[v]});
  }

  /// The same for the float result of a convolution, whose ConvOutput lies at `offset`.
  void bind_result(Launch& l, size_t offset, int32_t v) const {
    bind(l, offset + offsetof(ConvOutput, numbers), v);
    if (d_.output_port[v] >= 0) l.output_at = static_cast<int64_t>(offset);
  }

  /// A launch of one thread per item.
  template <class P>
  Launch& items(Kernel kernel, const P& params, int64_t count) {
    const KernelInfo info = kernel_info(kernel);
    Launch l = launch(info, engine::op_name(p_.nodes[node_].op));
    const int64_t blocks = ceil_div(count, info.threads);
    if (blocks > std::numeric_limits<int32_t>::max())
      fail<InvalidArgument>("node '", p_.nodes[node_].name, "': ", count,
                            " elements are more than one launch can have");
    l.grid[0] = static_cast<uint32_t>(blocks);
    l.set_params(params);
    plan_.launches.push_back(std::move(l));
    return plan_.launches.back();
  }

  int64_t words(int32_t v) const { return batch_ * device_bytes(value(v)) / 4; }
  int64_t elements(int32_t v) const { return batch_ * value(v).c * value(v).h * value(v).w; }

  void add(const Node& n, const NodeData& d) {
    switch (n.op) {
      case OpKind::Quantize:
        return quantize(n);
      case OpKind::Dequantize:
        return dequantize(n);
      case OpKind::Conv:
      case OpKind::ConvTranspose:
        return convolve(n, d);
      case OpKind::Lookup: {
        const LookupParams q{at<uint8_t>(n.inputs[0]), at<uint8_t>(n.output),
                             constant<uint8_t>(n, d, "table"), words(n.output)};
        items(Kernel::Lookup, q, q.words);
        return;
      }
      case OpKind::Add:
      case OpKind::Mul:
        return pair(n, d);
      case OpKind::Affine: {
        AffineParams q{};
        q.in = at<uint8_t>(n.inputs[0]);
        q.out = at<uint8_t>(n.output);
        q.words = words(n.output);
        q.pitch_words = image_size(value(n.output)).pitch / 4;
        q.scale = constant<float>(n, d, "scale");
        q.bias = constant<float>(n, d, "bias");
        q.finish = finish(n, d);
        items(Kernel::Affine, q, q.words);
        return;
      }
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
      case OpKind::RmsNorm: {
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
        return;
      }
      case OpKind::Attention:
        return attention(n, d);
      case OpKind::Function: {
        const FloatFunctionSpec s = engine::function_spec(n);
        FloatFunctionParams q{
            at<float>(n.inputs[0]), at<float>(n.output), elements(n.output), s.function, s.a, s.b};
        Launch& l = items(Kernel::FunctionFloats, q, q.count);
        bind(l, offsetof(FloatFunctionParams, in), n.inputs[0]);
        bind(l, offsetof(FloatFunctionParams, out), n.output);
        return;
      }
      case OpKind::Combine: {
        FloatPairParams q{at<float>(n.inputs[0]), at<float>(n.inputs[1]), at<float>(n.output),
                          elements(n.output), engine::combine_pair(n)};
        Launch& l = items(Kernel::CombineFloats, q, q.count);
        bind(l, offsetof(FloatPairParams, a), n.inputs[0]);
        bind(l, offsetof(FloatPairParams, b), n.inputs[1]);
        bind(l, offsetof(FloatPairParams, out), n.output);
        return;
      }
      case OpKind::Embedding:  // refused with their whole numbers
      case OpKind::Choose:
      case OpKind::FloatConv:  // check_node()
        break;
      case OpKind::Softmax: {
        SoftmaxParams q{at<float>(n.inputs[0]), at<float>(n.output),
                        static_cast<int32_t>(value(n.output).c),
                        static_cast<int32_t>(value(n.output).h * value(n.output).w)};
        Launch& l = items(Kernel::Softmax, q, 1);
        l.grid[0] = static_cast<uint32_t>(batch_ * q.plane);
        bind(l, offsetof(SoftmaxParams, in), n.inputs[0]);
        bind(l, offsetof(SoftmaxParams, out), n.output);
        return;
      }
      case OpKind::AffineImage:
        return affine_image(n, d);
      case OpKind::Constant: {
        MoveParams q{};
        q.kind = MoveParams::kConstant;
        q.in = constant<uint8_t>(n, d, "values");
        q.out = at<uint8_t>(n.output);
        q.batch = batch_;
        q.to = image_size(value(n.output));
        items(Kernel::Move, q, words(n.output));
        return;
      }
      case OpKind::GroupNorm:
        return group_norm(n, d);
    }
    fail<InvalidArgument>("node '", n.name, "': the CUDA engine has no operation ",
                          engine::op_name(n.op));
  }

  void attention(const Node& n, const NodeData& d) {
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

  void quantize(const Node& n) {
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

  void dequantize(const Node& n) {
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

  ConvOutput conv_output(const Node& n, const NodeData& d, int64_t channels) const {
    const engine::ConvAttributes a = engine::conv_attributes(n);
    const Value& y = value(n.output);
    ConvOutput o{};
    o.channels = constant<ChannelConstants>(channels);
    if (n.inputs.size() == 2) {
      const Value& r = value(n.inputs[1]);
      o.residual = at<uint8_t>(n.inputs[1]);
      o.residual_scale = r.scale;
      o.residual_zero = r.zero_point;
    }
    if (y.kind == ValueKind::U8) {
      o.levels = at<uint8_t>(n.output);
      o.finish = finish(n, d);
    } else {
      o.numbers = at<float>(n.output);
      o.lo = a.f32_lo;
      o.hi = a.f32_hi;
    }
    o.channels_count = static_cast<int32_t>(y.c);
    o.pitch = image_size(y).pitch;
    o.out_h = static_cast<int32_t>(y.h);
    o.out_w = static_cast<int32_t>(y.w);
    o.step_y = o.step_x = 1;
    o.linear = 1;
    return o;
  }

  void convolve(const Node& n, const NodeData& d) {
    const engine::ConvAttributes a = engine::conv_attributes(n);
    const bool to_float = value(n.output).kind == ValueKind::F32;
    if (d.conv.kind == ConvKind::Products) {
      for (const ProductPlan& product : d.conv.products)
        multiply(n, product, conv_output(n, d, product.channels));
      return;
    }
    const auto fill = [&](auto& q) {
      q.in = at<uint8_t>(n.inputs[0]);
      q.batch = batch_;
      q.size = image_size(value(n.inputs[0]));
      q.kernel_h = static_cast<int32_t>(a.kernel_h);
      q.kernel_w = static_cast<int32_t>(a.kernel_w);
      q.stride_h = static_cast<int32_t>(a.stride_h);
      q.stride_w = static_cast<int32_t>(a.stride_w);
      q.dilation_h = static_cast<int32_t>(a.dilation_h);
      q.dilation_w = static_cast<int32_t>(a.dilation_w);
      q.pad_top = static_cast<int32_t>(a.pad_top);
      q.pad_left = static_cast<int32_t>(a.pad_left);
      q.zero_point = value(n.inputs[0]).zero_point;
      q.out = conv_output(n, d, d.conv.channels);
    };
    const Value& y = value(n.output);
    if (d.conv.kind == ConvKind::Depthwise) {
      DepthwiseParams q{};
      fill(q);
      q.weights = constant<uint32_t>(d.conv.weights);
      q.positions_h = static_cast<int32_t>(y.h);
      q.positions_w = static_cast<int32_t>(y.w);
      const int64_t columns = ceil_div(y.w, kDepthwiseColumns);
      Launch& l = items(Kernel::Depthwise, q, batch_ * y.h * columns * (q.size.pitch / 4));
      if (to_float) bind_result(l, offsetof(DepthwiseParams, out), n.output);
      l.name = d.conv.name();
      return;
    }
    DirectParams q{};
    fill(q);
    q.weights = constant<int8_t>(d.conv.weights);
    q.group_in = static_cast<int32_t>(value(n.inputs[0]).c / a.groups);
    q.group_out = static_cast<int32_t>(y.c / a.groups);
    q.transposed = n.op == OpKind::ConvTranspose;
    Launch& l = items(Kernel::Direct, q, batch_ * y.c * y.h * y.w);
    if (to_float) bind_result(l, offsetof(DirectParams, out), n.output);
    l.name = d.conv.name();
  }

  void multiply(const Node& n, const ProductPlan& c, const ConvOutput& out) {
    ConvParams q{};
    q.in = at<uint8_t>(n.inputs[0]);
    q.weights = constant<uint8_t>(c.weights);
    q.pieces = constant<int32_t>(c.pieces);
    q.zero_page = constant<uint8_t>(c.zero_page);
    q.group_weight_bytes = c.group_weight_bytes;
    q.group_in_bytes = c.group_in_bytes;
    q.group_out = c.group_out;
    q.cells = c.cells;
    q.plane = c.plane_h * c.plane_w;
    q.positions = batch_ * q.plane;
    q.width = c.plane_w;
    q.in_h = c.in_h;
    q.in_w = c.in_w;
    q.in_row_bytes = c.in_row_bytes;
    q.in_pixel_bytes = c.in_pixel_bytes;
    q.in_image_bytes = static_cast<int32_t>(device_bytes(value(n.inputs[0])));
    q.stride_y = c.stride_y;
    q.stride_x = c.stride_x;
    q.taps_y = static_cast<int32_t>(c.tap_y.size());
    q.taps_x = static_cast<int32_t>(c.tap_x.size());
    std::copy(c.tap_y.begin(), c.tap_y.end(), q.tap_y);
    std::copy(c.tap_x.begin(), c.tap_x.end(), q.tap_x);
    q.steps = c.steps;
    q.depth = c.depth;
    q.shift = c.shift;
    q.vector_store = c.vector_store;
    q.out = out;
    q.out.step_y = c.step_y;
    q.out.step_x = c.step_x;
    q.out.phase_y = c.phase_y;
    q.out.phase_x = c.phase_x;
    q.out.linear = c.step_y == 1 && c.step_x == 1;

    Product product{node_, c.bits, c.piece, c.group_out, q.positions, c.groups, c.steps, c.depth};
    product.longest_block = c.blocks.longest;
    product.block_steps = c.blocks.there ? std::max<int64_t>(1, c.blocks.steps) : 0;
    product.stored_cells = c.blocks.stored_cells;
    product.structured = c.structured >= 0;
    const size_t number = plan_.products.size();
    plan_.products.push_back(product);
    Choice choice;
    if (number < chosen_.size()) {
      choice = chosen_[number];
    } else {
      const std::vector<Choice> all = choices(product, model_.machine());
      if (all.empty())
        fail<InvalidArgument>("node '", n.name, "': no kernel fits ", model_.machine().shared_bytes,
                              " bytes of shared memory");
      choice = all.front();
    }
    const KernelInfo info = conv_kernel(c.bits, choice.tile, c.piece, choice.form);
    const bool there = choice.form == Form::Dense ||
                       (choice.form == Form::Blocks ? c.blocks.there : product.structured);
    if (info.function == nullptr || !there)
      fail<InvalidArgument>("node '", n.name, "': there is no kernel of tile ", choice.tile,
                            " and form ", static_cast<int>(choice.form), " for ", c.bits,
                            " bits and pieces of ", c.piece, " bytes");
    if (choice.form == Form::Blocks) {
      q.weights = constant<uint8_t>(c.blocks.weights);
      q.pieces = constant<int32_t>(c.blocks.pieces);
      q.block_steps = constant<int32_t>(c.blocks.first_steps);
      q.step_cells = constant<uint32_t>(c.blocks.step_cells);
    } else if (choice.form == Form::Structured) {
      q.weights = constant<uint8_t>(c.structured);
      q.group_weight_bytes = c.structured_group_bytes;
    }
    const TileSize& t = kTileSizes[choice.tile];
    q.tiles_m = static_cast<int32_t>(ceil_div(c.group_out, t.channels));
    const int64_t tiles = q.tiles_m * ceil_div(q.positions, t.positions);
    const int64_t tile_bytes = int64_t{4} * t.channels * t.positions;
    const int64_t most_splits = choice.form == Form::Blocks ? c.blocks.longest : c.steps;
    q.splits = std::clamp(choice.splits, 1, static_cast<int>(std::max<int64_t>(1, most_splits)));
    if (tiles * c.groups * 4 > kCounterBytes ||
        kCounterBytes + tiles * c.groups * tile_bytes > kMostScratch)
      q.splits = 1;
    if (q.splits > 1) {
      plan_.scratch_bytes =
          std::max(plan_.scratch_bytes, kCounterBytes + tiles * c.groups * tile_bytes);
      q.arrived = reinterpret_cast<int32_t*>(bases_.scratch);
      q.partial = reinterpret_cast<int32_t*>(bases_.scratch + kCounterBytes);
    }
    std::string kernel = t.name;
    if (choice.form == Form::Blocks) kernel.append(" blocks");
    if (choice.form == Form::Structured) kernel.append(" 2:4");
    if (q.splits > 1) kernel.append("/").append(std::to_string(q.splits));
    Launch l = launch(info, kernel);
    l.choice = static_cast<int32_t>(number);
    l.grid[0] = static_cast<uint32_t>(tiles);
    l.grid[1] = static_cast<uint32_t>(q.splits);
    l.grid[2] = static_cast<uint32_t>(c.groups);
    l.set_params(q);
    if (value(n.output).kind == ValueKind::F32) bind_result(l, offsetof(ConvParams, out), n.output);
    plan_.launches.push_back(std::move(l));
  }

  void pair(const Node& n, const NodeData& d) {
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

  /// Concat and Join: the pieces one after the other along an axis.
  void join(const Node& n, const NodeData& d) {
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

  void affine_image(const Node& n, const NodeData& d) {
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

  void group_norm(const Node& n, const NodeData& d) {
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

  void move(const Node& n, const NodeData& d) {
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

  void pool(const Node& n, const NodeData& d) {
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

  template <class P>
  static void fill_window(P& q, const PoolSpec& s) {
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

  void resize(const Node& n, const NodeData& d) {
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

  const Model& model_;
  const Program& p_;
  const Model::Prepared& d_;
  const int32_t batch_;
  const Bases bases_;
  const std::vector<Choice>& chosen_;
  std::vector<int64_t> offsets_;
  int32_t node_ = -1;
  Plan plan_;
};

}  // namespace

Plan make_plan(const Model& model, int64_t batch, const Bases& bases,
               const std::vector<Choice>& chosen) {
  if (batch < 1 || batch > model.most_images())
    fail<InvalidArgument>("a plan is for 1 to ", model.most_images(), " images, got ", batch);
  return Planner(model, batch, bases, chosen).run();
}

}  // namespace adalayer::cuda

// A program's constants as the kernels read them, and when its values live: what does not depend on
// the batch.
#include <algorithm>
#include <cstddef>
#include <iterator>
#include <utility>

#include "core/status.hpp"
#include "cuda/conv_plan.hpp"
#include "cuda/plan.hpp"
#include "cuda/prepared.hpp"

namespace adalayer::cuda {

using engine::Node;
using engine::OpKind;
using engine::Program;
using engine::Value;
using engine::ValueKind;

namespace {

constexpr int64_t kMostTensor = (int64_t{1} << 31) - 1;

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
  s.packed = &static_cast<const std::vector<uint8_t>&>(p.constants[s.a.weights].bytes);
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
                                  OpKind::GroupNorm, OpKind::MaxPool,   OpKind::Concat,
                                  OpKind::Join,      OpKind::Reduce};
  const bool floats =
      p.values[n.output].kind == ValueKind::F32 &&
      std::find(std::begin(kOfLevels), std::end(kOfLevels), n.op) != std::end(kOfLevels);
  if (n.op == OpKind::Recurrence)
    fail<InvalidArgument>("node '", n.name, "': recurrent layers run on the CPU alone");
  if (n.op == OpKind::Combine) {
    const auto& a = p.values[n.inputs[0]];
    const auto& b = p.values[n.inputs[1]];
    if (a.c != b.c || a.h != b.h || a.w != b.w)
      fail<InvalidArgument>("node '", n.name,
                            "': floats of different sizes are combined on the CPU alone");
  }
  if (n.op == OpKind::Linear)
    fail<InvalidArgument>("node '", n.name,
                          "': linear layers with weight groups run on the CPU alone");
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

}  // namespace adalayer::cuda

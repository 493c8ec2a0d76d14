#include "engine/limits.hpp"

#include <algorithm>

#include "core/status.hpp"
#include "cpu/conv/linear.hpp"
#include "cpu/conv/recurrence.hpp"
#include "cpu/image/attention.hpp"
#include "cpu/image/float_conv.hpp"
#include "engine/conv_step.hpp"
#include "formats/canonical.hpp"

namespace adalayer::engine {
namespace {

double convolution_bytes(const Program& program, const Node& node,
                         const std::vector<ValueLayout>& layouts, cpu::Room room) {
  const Constant& weights = weights_of(program, node);
  const formats::CanonicalHeader header = formats::read_header(weights.bytes);
  const ValueLayout& in = layouts[node.inputs[0]];
  // Scale and bias; the weights as bytes and as fields, while one node is built.
  const auto outs = static_cast<double>(header.out_channels);
  double bytes = 8.0 * (outs + 64.0) + 2.0 * static_cast<double>(header.count());
  for (const cpu::ConvTask& task : conv_tasks(program, node, in.own_input != nullptr, room)) {
    bytes += 4.0 * (outs + 64.0);  // the correction
    for (const cpu::ConvAlgorithm* algorithm : cpu::algorithms_for(task))
      bytes += algorithm->bytes(task, in.layout);
  }
  return bytes;
}

double most_scratch(const Program& program, const Node& node,
                    const std::vector<ValueLayout>& layouts, cpu::Room room) {
  const bool own_input = layouts[node.inputs[0]].own_input != nullptr;
  double most = 0.0;
  for (const cpu::ConvTask& task : conv_tasks(program, node, own_input, room))
    for (const cpu::ConvAlgorithm* algorithm : cpu::algorithms_for(task))
      most = std::max(most, algorithm->scratch_bytes(task));
  return most;
}

double stored_bytes(const Program& program) {
  double bytes = 0.0;
  for (const Constant& c : program.constants)
    if (c.planes.all())
      bytes += static_cast<double>(c.bytes.size());  // views hold none of their own
  for (const auto& [key, text] : program.metadata)
    bytes += static_cast<double>(key.size() + text.size());
  return bytes;
}

bool is_convolution(const Node& node) {
  return node.op == OpKind::Conv || node.op == OpKind::ConvTranspose;
}

bool is_float(const Program& program, const Node& node) {
  return weights_of(program, node).kind == ConstantKind::F32;
}

/// Of packed weights.
double weight_count(const Program& program, const Node& node) {
  return static_cast<double>(formats::read_header(weights_of(program, node).bytes).count());
}

}  // namespace

double planned_memory(const Program& program, const std::vector<ValueLayout>& layouts,
                      cpu::Room room) {
  double bytes = stored_bytes(program);
  double scratch = 0.0;
  for (const Node& node : program.nodes) {
    if (node.op == OpKind::Attention)
      scratch = std::max(scratch, cpu::attention_scratch(attention_shape(program, node)));
    if (node.op == OpKind::FloatConv) {
      const bool own = !is_float(program, node);
      const ConvShape shape = conv_shape(program, node);
      bytes += cpu::float_conv_bytes(shape, own);
      // (Whole numbers and floats while it is built.)
      if (own) bytes += 5.0 * weight_count(program, node);
      scratch = std::max(scratch, cpu::float_conv_scratch(shape));
    }
    if (node.op == OpKind::Recurrence) {
      const RecurrenceSpec spec = recurrence_spec(program, node);
      bytes += cpu::recurrence_bytes(spec.outputs(), spec.hidden);
      scratch = std::max(scratch, cpu::recurrence_scratch(spec));
    }
    if (node.op == OpKind::Linear) {
      const LinearSpec spec = linear_spec(program, node);
      bytes += cpu::linear_bytes(spec);
      scratch = std::max(scratch, cpu::linear_scratch(spec));
    }
    if (!is_convolution(node)) continue;
    bytes += convolution_bytes(program, node, layouts, room);
    scratch = std::max(scratch, most_scratch(program, node, layouts, room));
  }
  bytes += scratch;
  // Noise to time the convolutions with.
  for (const auto* ports : {&program.inputs, &program.outputs})
    for (const int32_t v : *ports) {
      const Value& value = program.values[v];
      bytes += 4.0 * static_cast<double>(value.c * value.h * value.w);
    }
  return bytes;
}

double interpreter_memory(const Program& program) {
  double bytes = stored_bytes(program);
  for (const Value& v : program.values)
    bytes += static_cast<double>(v.c * v.h * v.w) * (v.kind == ValueKind::U8 ? 1.0 : 4.0);
  for (const Node& node : program.nodes) {
    if (node.op == OpKind::FloatConv && !is_float(program, node))
      bytes += 5.0 * weight_count(program, node);
    if (is_convolution(node) || node.op == OpKind::Recurrence || node.op == OpKind::Linear)
      bytes += 2.0 * weight_count(program, node);
  }
  return bytes;
}

void check_memory(double bytes, int64_t limit) {
  if (limit > 0 && bytes > static_cast<double>(limit))
    fail<LimitExceeded>("the program needs about ", bytes / 1e6, " MB, the limit is ",
                        static_cast<double>(limit) / 1e6, " MB");
}

}  // namespace adalayer::engine

#include "engine/limits.hpp"

#include <algorithm>

#include "core/status.hpp"
#include "engine/conv_step.hpp"
#include "formats/canonical.hpp"

namespace adalayer::engine {
namespace {

double ceil_divided(double n, double by) { return (n + by - 1.0) / by; }

/// What plan_conv() and pack_panels() make of one convolution (cpu/conv/matmul_plan.cpp). While the
/// clock chooses between them there are packed weights and bytes.
double matmul_bytes(const ConvShape& s, int bits, const cpu::ImageLayout& in) {
  const auto kernel_h = static_cast<double>(s.kernel_h), kernel_w = static_cast<double>(s.kernel_w);
  const auto group_in = static_cast<double>(s.group_in()), groups = static_cast<double>(s.groups);
  const double weights = static_cast<double>(s.out_channels) * group_in * kernel_h * kernel_w;
  // A kernel row in one stretch is taken only where it needs no more than pixel by pixel.
  const double steps = kernel_h * (kernel_w * ceil_divided(group_in, 64) + 1.0);
  const double panels =
      steps * groups * ceil_divided(static_cast<double>(s.group_out()), 16) * 128.0 * (bits + 8);
  const auto out_h = static_cast<double>(s.out_h()), out_w = static_cast<double>(s.out_w());
  const double in_positions = static_cast<double>(in.image_bytes) / static_cast<double>(in.pitch);
  // Int8 weights live until all panels are packed; 64 table entries and a quad count per step; an
  // offset per step of every run, of which there may be one per output row; three offsets for every
  // position, those that are dropped included.
  return weights + panels + steps * 257.0 + steps * std::max(out_h, 0.0) * 8.0 +
         12.0 * (in_positions + std::max(out_h, 0.0) * std::max(out_w, 0.0));
}

double convolution_bytes(const Program& program, const Node& node,
                         const std::vector<ValueLayout>& layouts) {
  const ConvAttributes a = conv_attributes(node);
  const formats::CanonicalHeader header = formats::read_header(program.constants[a.weights].bytes);
  const int bits = header.bits;
  const ValueLayout& in = layouts[node.inputs[0]];
  // Scale, bias and correction; the weights as bytes and as fields, while one node is built.
  const auto outs = static_cast<double>(header.out_channels);
  double bytes = 12.0 * (outs + 64.0) + 2.0 * static_cast<double>(header.count());
  if (node.op == OpKind::ConvTranspose) {
    for (const TransposedPhase& phase : transposed_phases(program, node))
      bytes += matmul_bytes(phase.shape, bits, in.layout) + 4.0 * (outs + 64.0);
  } else if (runs_grouped(program, node)) {
    bytes += cpu::grouped_bytes(conv_shape(program, node));
  } else {
    bytes += matmul_bytes(in.stem.has_value() ? in.stem->shape : conv_shape(program, node), bits,
                          in.layout);
  }
  return bytes;
}

double stored_bytes(const Program& program) {
  double bytes = 0.0;
  for (const Constant& c : program.constants)
    bytes += static_cast<double>(c.bytes.size());
  for (const auto& [key, text] : program.metadata)
    bytes += static_cast<double>(key.size() + text.size());
  return bytes;
}

bool is_convolution(const Node& node) {
  return node.op == OpKind::Conv || node.op == OpKind::ConvTranspose;
}

}  // namespace

double planned_memory(const Program& program, const std::vector<ValueLayout>& layouts) {
  double bytes = stored_bytes(program);
  for (const Node& node : program.nodes)
    if (is_convolution(node)) bytes += convolution_bytes(program, node, layouts);
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
    bytes += static_cast<double>(v.c * v.h * v.w) * (v.kind == ValueKind::F32 ? 4.0 : 1.0);
  for (const Node& node : program.nodes) {
    if (!is_convolution(node)) continue;
    const Constant& weights = program.constants[conv_attributes(node).weights];
    bytes += 2.0 * static_cast<double>(formats::read_header(weights.bytes).count());
  }
  return bytes;
}

void check_memory(double bytes, int64_t limit) {
  if (limit > 0 && bytes > static_cast<double>(limit))
    fail<LimitExceeded>("the program needs about ", bytes / 1e6, " MB, the limit is ",
                        static_cast<double>(limit) / 1e6, " MB");
}

}  // namespace adalayer::engine

#include "engine/layouts.hpp"

#include <algorithm>
#include <numeric>

#include "engine/conv_step.hpp"

namespace adalayer::engine {
namespace {

// Strides whose least common multiple is larger get rows of their own instead of phases.
constexpr int64_t kMaxPhases = 8;

struct Needs {
  cpu::Padding padding;
  int64_t phases = 1;
  int64_t columns_multiple = 1;

  void read_by(const ConvShape& s, bool strided) {
    const cpu::Padding needed = cpu::padding_of(s);
    padding.top = std::max(padding.top, needed.top);
    padding.left = std::max(padding.left, needed.left);
    padding.bottom = std::max(padding.bottom, needed.bottom);
    padding.right = std::max(padding.right, needed.right);
    if (!strided) return;
    const int64_t together = std::lcm(phases, s.stride_h);
    if (together <= kMaxPhases) phases = together;
    const int64_t columns = std::lcm(columns_multiple, s.stride_w);
    if (columns <= kMaxPhases) columns_multiple = columns;
  }
};

}  // namespace

std::vector<ValueLayout> plan_layouts(const Program& program) {
  const cpu::KernelRow* kernels = cpu::active_kernels();
  const cpu::Positions positions = kernels == nullptr ? cpu::Positions::Listed : kernels->positions;
  // Listed positions may lie anywhere: rows need no phases.
  const bool strided = positions == cpu::Positions::Flattened;
  std::vector<Needs> needs(program.values.size());
  std::vector<int> readers(program.values.size(), 0);
  std::vector<const Node*> writer(program.values.size(), nullptr);
  for (const Node& node : program.nodes) {
    writer[node.output] = &node;
    for (const int32_t v : node.inputs)
      ++readers[v];
    if (node.op == OpKind::Conv) {
      needs[node.inputs[0]].read_by(conv_shape(program, node),
                                    strided && !runs_grouped(program, node));
    } else if (node.op == OpKind::ConvTranspose) {
      for (const TransposedPhase& phase : transposed_phases(program, node))
        needs[node.inputs[0]].read_by(phase.shape, strided);
    }
  }
  std::vector<ValueLayout> layouts(program.values.size());
  for (size_t v = 0; v < layouts.size(); ++v) {
    const Value& value = program.values[v];
    if (value.kind != ValueKind::U8) continue;
    layouts[v].layout = cpu::image_layout(value.c, value.h, value.w, needs[v].padding,
                                          needs[v].phases, needs[v].columns_multiple);
  }
  for (const Node& node : program.nodes) {
    if (node.op != OpKind::Conv) continue;
    const int32_t v = node.inputs[0];
    const bool only_reader =
        readers[v] == 1 && writer[v] != nullptr && writer[v]->op == OpKind::Quantize;
    const ConvShape shape = conv_shape(program, node);
    if (!only_reader || runs_grouped(program, node) || !cpu::stem_suits(shape)) continue;
    layouts[v].stem = cpu::plan_stem(shape, positions);
    layouts[v].layout = layouts[v].stem->layout;
  }
  return layouts;
}

}  // namespace adalayer::engine

#include "engine/layouts.hpp"

#include <algorithm>
#include <numeric>

#include "engine/conv_step.hpp"

namespace adalayer::engine {
namespace {

// Strides whose least common multiple is larger get rows of their own instead of phases.
constexpr int64_t kMaxPhases = 8;

struct Needs : cpu::LayoutNeeds {
  void add(const cpu::LayoutNeeds& more) {
    padding.top = std::max(padding.top, more.padding.top);
    padding.left = std::max(padding.left, more.padding.left);
    padding.bottom = std::max(padding.bottom, more.padding.bottom);
    padding.right = std::max(padding.right, more.padding.right);
    const int64_t together = std::lcm(phases, more.phases);
    if (together <= kMaxPhases) phases = together;
    const int64_t columns = std::lcm(columns_multiple, more.columns_multiple);
    if (columns <= kMaxPhases) columns_multiple = columns;
  }
};

}  // namespace

std::vector<ValueLayout> plan_layouts(const Program& program) {
  std::vector<Needs> needs(program.values.size());
  std::vector<int> readers(program.values.size(), 0);
  std::vector<const Node*> writer(program.values.size(), nullptr);
  for (const Node& node : program.nodes) {
    writer[node.output] = &node;
    for (const int32_t v : node.inputs)
      ++readers[v];
    if (node.op != OpKind::Conv && node.op != OpKind::ConvTranspose) continue;
    for (const cpu::ConvTask& task : conv_tasks(program, node, false, cpu::Room::Several))
      for (const cpu::ConvAlgorithm* algorithm : cpu::algorithms_for(task))
        needs[node.inputs[0]].add(algorithm->needs(task));
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
    if (!only_reader) continue;
    const cpu::ConvTask task = conv_tasks(program, node, true, cpu::Room::Several).front();
    layouts[v].own_input = cpu::algorithms_for(task).front()->own_input(task);
    if (layouts[v].own_input != nullptr) layouts[v].layout = layouts[v].own_input->layout;
  }
  return layouts;
}

}  // namespace adalayer::engine

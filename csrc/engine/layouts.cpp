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
    stride = std::max(stride, more.stride);
  }
};

// Kernels write whole columns of so many channels; what is next to them is another piece's.
constexpr int64_t kColumns = 16;

/// Whether a node writes nothing but the channels of its output, wherever pixels lie.
bool keeps_to_its_channels(const Node* writer) {
  if (writer == nullptr) return false;
  if (writer->op == OpKind::Concat) return true;
  return (writer->op == OpKind::Conv || writer->op == OpKind::ConvTranspose) &&
         conv_attributes(*writer).groups == 1;
}

/// Places pieces of concatenations, the outer ones first.
void place_pieces(const Program& program, const std::vector<int>& readers,
                  const std::vector<const Node*>& writer, std::vector<ValueLayout>& layouts) {
  for (size_t k = program.nodes.size(); k-- > 0;) {
    const Node& node = program.nodes[k];
    if (node.op != OpKind::Concat || program.values[node.output].kind != ValueKind::U8) continue;
    const ValueLayout& whole = layouts[node.output];
    const int32_t holder = whole.in_place() ? whole.holder : node.output;
    int64_t channel = whole.channel;
    for (size_t i = 0; i < node.inputs.size(); ++i) {
      const int32_t v = node.inputs[i];
      const Value& piece = program.values[v];
      const bool fits = readers[v] == 1 && node.constants[i] < 0 &&
                        piece.zero_point == program.values[node.output].zero_point &&
                        piece.c % kColumns == 0 && channel % kColumns == 0;
      if (fits && keeps_to_its_channels(writer[v])) {
        layouts[v].layout = layouts[holder].layout;
        layouts[v].layout.channels = piece.c;
        layouts[v].holder = holder;
        layouts[v].channel = channel;
      }
      channel += piece.c;
    }
  }
}

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
    layouts[v].layout =
        cpu::image_layout(value.c, value.h, value.w, needs[v].padding, needs[v].phases,
                          needs[v].columns_multiple, needs[v].stride);
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
  for (const int32_t v : program.outputs)
    ++readers[v];
  place_pieces(program, readers, writer, layouts);
  return layouts;
}

}  // namespace adalayer::engine

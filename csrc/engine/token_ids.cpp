#include "engine/token_ids.hpp"

#include <algorithm>

#include "core/status.hpp"

namespace adalayer::engine {

std::vector<int64_t> table_rows(const Program& program) {
  std::vector<int64_t> rows(program.inputs.size(), -1);
  for (const Node& node : program.nodes) {
    const bool flags = node.op == OpKind::Choose && !choose_attributes(node).any;
    if (node.op != OpKind::Embedding && !flags) continue;
    const auto port = std::find(program.inputs.begin(), program.inputs.end(), node.inputs[0]);
    int64_t& least = rows[static_cast<size_t>(port - program.inputs.begin())];
    const int64_t found = flags ? 2 : embedding_spec(program, node).rows;
    least = least < 0 ? found : std::min(least, found);
  }
  return rows;
}

void check_ids(const Program& program, std::span<const int64_t> rows,
               std::span<const InputTensor> inputs, int64_t batch) {
  for (size_t k = 0; k < rows.size(); ++k) {
    if (rows[k] < 0) continue;
    const Value& value = program.values[program.inputs[k]];
    const int64_t positions = value.h * value.w;
    const int32_t* ids = inputs[k].ids();
    for (int64_t i = 0; i < batch * positions; ++i)
      if (ids[i] < 0 || ids[i] >= rows[k])
        fail<InvalidArgument>("input ", k, " ('", value.name, "'): expected ids of 0 to ",
                              rows[k] - 1, ", got ", ids[i], " in sample ", i / positions,
                              ", position ", i % positions);
  }
}

}  // namespace adalayer::engine

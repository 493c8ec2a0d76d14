// Whether zeros may be left out of a layer's panels: what the process says about all layers.
#pragma once

#include <string_view>

namespace adalayer::cpu {

enum class SparsePolicy {
  Auto,     // the faster form; dense wins ties
  Dense,    // zeros are multiplied
  Blocks,   // blocks wherever a layer has panels
  Bitmask,  // bitmasks likewise, where the machine has the instructions
};

/// The process's policy: set_sparse_policy(), else ADALAYER_SPARSE (auto, dense, blocks, bitmask;
/// read at the first use). Results have the same bits under each. Throws InvalidArgument for
/// another name. Weights that are derived already stay as they are.
SparsePolicy sparse_policy();
void set_sparse_policy(std::string_view name);

inline bool sparse_is_forced() {
  return sparse_policy() == SparsePolicy::Blocks || sparse_policy() == SparsePolicy::Bitmask;
}

}  // namespace adalayer::cpu

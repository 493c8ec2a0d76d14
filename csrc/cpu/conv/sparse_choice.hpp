// Whether a layer's zeros are left out of its panels.
//
// plan_sparse() says in which form they could be, if that is worth a trial; the clock decides
// (of the engine: engine/planner.hpp; of single layers: sparse_wins()).
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "cpu/conv/matmul.hpp"
#include "cpu/image/layout.hpp"

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

/// A convolution whose zeros are left out.
struct SparseForm {
  ConvPlan plan;
  bool by_pixel = false;  // how it was planned
  SparsePanels panels;
};

/// The form that `weights` could have, if it saves products or bytes to speak of; `plan_of` plans
/// the convolution, and `dense` is plan_of(false).
std::optional<SparseForm> plan_sparse(const std::function<ConvPlan(bool by_pixel)>& plan_of,
                                      const ConvPlan& dense, std::span<const int8_t> weights,
                                      int bits, const KernelRow& kernels);

/// Whether so much is left out that no clock is needed.
bool surely_faster(const SparseForm& form, const ConvPlan& dense);

/// "blocks: 25 % of the tiles", for people.
std::string describe(const SparseForm& form, const ConvPlan& dense, int bits);

/// Whether a single layer is clearly faster so, by trial runs of one image (and, for a bitmask, no
/// slower with a larger batch). `in` is the layout of the plans' input; they have float outputs.
bool sparse_wins(const SparseForm& form, const ConvPlan& dense, std::span<const int8_t> weights,
                 int bits, const KernelRow& kernels, const ImageLayout& in);

}  // namespace adalayer::cpu

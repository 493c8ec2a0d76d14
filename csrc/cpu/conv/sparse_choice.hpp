// Whether a layer's zeros are left out of its panels.
//
// plan_sparse() says in which form they could be, if that is worth a trial; the clock decides
// (of the engine: engine/planner.hpp; of single layers: sparse_wins()).
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>

#include "cpu/conv/matmul.hpp"
#include "cpu/conv/sparse_policy.hpp"
#include "cpu/image/layout.hpp"

namespace adalayer::cpu {

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

}  // namespace adalayer::cpu

#include "cpu/conv/sparse_choice.hpp"

#include <algorithm>
#include <cmath>

namespace adalayer::cpu {
namespace {

// Zeros must leave this much at most of the work, or of the bytes, before the clock is asked.
constexpr double kWorthATrial = 0.95;
constexpr double kSurely = 0.7;  // of the products: no clock is needed
std::string percent(double share) { return std::to_string(std::lround(100.0 * share)) + " %"; }

/// Blocks, by whole kernel rows or by pixels: fewer products win.
SparseForm with_blocks(const std::function<ConvPlan(bool)>& plan_of, const ConvPlan& dense,
                       std::span<const int8_t> weights) {
  SparseForm best{dense, false, plan_blocks(dense, weights)};
  if (dense.shape.kernel_w == 1) return best;  // a kernel row is a pixel
  SparseForm other{plan_of(true), true, {}};
  other.panels = plan_blocks(other.plan, weights);
  return other.panels.products < best.panels.products ? std::move(other) : std::move(best);
}

double share_of_products(const SparseForm& form, const ConvPlan& dense) {
  return static_cast<double>(form.panels.products) /
         static_cast<double>(std::max<int64_t>(1, dense_products(dense)));
}

}  // namespace

std::optional<SparseForm> plan_sparse(const std::function<ConvPlan(bool by_pixel)>& plan_of,
                                      const ConvPlan& dense, std::span<const int8_t> weights,
                                      int bits, const KernelRow& kernels) {
  const SparsePolicy policy = sparse_policy();
  if (policy == SparsePolicy::Dense || weights.empty() || dense.runs.empty()) return std::nullopt;
  const auto with_bitmask = [&]() -> SparseForm {
    return {dense, false, plan_bitmask(dense, weights, bits)};
  };
  const bool has_bitmask = bitmask_kernels(kernels).expand != nullptr;
  if (policy == SparsePolicy::Blocks) return with_blocks(plan_of, dense, weights);
  if (policy == SparsePolicy::Bitmask)
    return has_bitmask ? std::optional(with_bitmask()) : std::nullopt;
  const auto zeros = static_cast<double>(std::count(weights.begin(), weights.end(), int8_t{0}));
  if (zeros < (1.0 - kWorthATrial) * static_cast<double>(weights.size())) return std::nullopt;
  SparseForm form = with_blocks(plan_of, dense, weights);
  if (share_of_products(form, dense) <= kWorthATrial) return form;
  // Expanding pays where each weight is used once, and the bytes are what takes the time.
  const bool few = dense.runs.size() == 1 && dense.runs.front().positions <= kGemvRows;
  if (!few || !has_bitmask) return std::nullopt;
  form = with_bitmask();
  if (static_cast<double>(form.panels.bytes(bits)) >
      kWorthATrial * static_cast<double>(dense.packed_bytes(bits)))
    return std::nullopt;
  return form;
}

bool surely_faster(const SparseForm& form, const ConvPlan& dense) {
  return sparse_is_forced() ||
         (form.panels.kind == Panels::Blocks && share_of_products(form, dense) <= kSurely);
}

std::string describe(const SparseForm& form, const ConvPlan& dense, int bits) {
  const SparsePanels& p = form.panels;
  if (p.kind == Panels::Bitmask)
    return "bitmask: " +
           percent(static_cast<double>(p.bytes(bits)) /
                   static_cast<double>(std::max<int64_t>(1, dense.packed_bytes(bits)))) +
           " of the dense bytes";
  return "blocks: " +
         percent(static_cast<double>(p.stored_tiles) /
                 static_cast<double>(std::max<int64_t>(1, p.tiles))) +
         " of the tiles";
}

}  // namespace adalayer::cpu

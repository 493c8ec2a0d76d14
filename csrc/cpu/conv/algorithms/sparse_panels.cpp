// Panels that leave zeros out, in the form that saves products, or else bytes, to speak of.
#include <algorithm>
#include <cmath>

#include "cpu/conv/panels.hpp"
#include "cpu/conv/policy.hpp"

namespace adalayer::cpu {
namespace {

// Zeros must leave this much at most of the work, or of the bytes, before a clock is asked.
constexpr double kWorthATrial = 0.95;
constexpr double kSurely = 0.7;  // of the products: no clock is needed

/// How the panels were planned.
enum Variant : int { kByRow = 0, kByPixel = 1 };

double share(int64_t part, int64_t whole) {
  return static_cast<double>(part) / static_cast<double>(std::max<int64_t>(1, whole));
}

std::string percent(double share) { return std::to_string(std::lround(100.0 * share)) + " %"; }

/// Blocks, by whole kernel rows or by pixels: fewer products win.
std::unique_ptr<PanelWeights> with_blocks(const ConvTask& task, const ConvLayouts& at,
                                          const ConvPlan& dense, std::span<const int8_t> values) {
  auto weights = std::make_unique<PanelWeights>(task);
  weights->widens = true;
  weights->sparse = plan_blocks(dense, values);
  if (dense.shape.kernel_w > 1) {  // else a kernel row is a pixel
    SparsePanels other = plan_blocks(plan_panels(task, task.shape, at, true), values);
    if (other.products < weights->sparse->products) {
      weights->sparse = std::move(other);
      weights->variant = kByPixel;
    }
  }
  const SparsePanels& panels = *weights->sparse;
  if (share(panels.products, dense_products(dense)) <= kSurely)
    weights->merit = Merit::SurelyFaster;
  weights->text = "blocks: " + percent(share(panels.stored_tiles, panels.tiles)) + " of the tiles";
  return weights;
}

std::unique_ptr<PanelWeights> with_bitmask(const ConvTask& task, const ConvPlan& dense,
                                           std::span<const int8_t> values) {
  auto weights = std::make_unique<PanelWeights>(task);
  weights->sparse = plan_bitmask(dense, values, task.bits);
  // It is slower to read where it is not memory that one waits for.
  weights->for_few_positions = true;
  weights->text = "bitmask: " +
                  percent(share(weights->sparse->bytes(task.bits), dense.packed_bytes(task.bits))) +
                  " of the dense bytes";
  return weights;
}

/// The form that the policy wants, or that is worth a trial.
std::unique_ptr<PanelWeights> form_of(const ConvTask& task, const ConvLayouts& at,
                                      std::span<const int8_t> values) {
  const SparsePolicy policy = sparse_policy();
  if (policy == SparsePolicy::Dense || values.empty()) return nullptr;
  const auto zeros = static_cast<double>(std::count(values.begin(), values.end(), int8_t{0}));
  if (!sparse_is_forced() && zeros < (1.0 - kWorthATrial) * static_cast<double>(values.size()))
    return nullptr;
  const ConvPlan dense = plan_panels(task, task.shape, at);
  if (dense.runs.empty()) return nullptr;
  const bool has_bitmask = bitmask_kernels(task.kernels).expand != nullptr;
  if (policy == SparsePolicy::Blocks) return with_blocks(task, at, dense, values);
  if (policy == SparsePolicy::Bitmask)
    return has_bitmask ? with_bitmask(task, dense, values) : nullptr;
  auto blocks = with_blocks(task, at, dense, values);
  if (share(blocks->sparse->products, dense_products(dense)) <= kWorthATrial) return blocks;
  // Expanding pays where each weight is used once, and the bytes are what takes the time.
  const bool few = dense.runs.size() == 1 && dense.runs.front().positions <= kGemvRows;
  if (!few || !has_bitmask) return nullptr;
  auto bitmask = with_bitmask(task, dense, values);
  if (share(bitmask->sparse->bytes(task.bits), dense.packed_bytes(task.bits)) > kWorthATrial)
    return nullptr;
  return bitmask;
}

class SparsePanelsAlgorithm final : public ConvAlgorithm {
 public:
  std::string name(const ConvShape&) const override { return "sparse panels"; }
  Fit fit(const ConvTask&) const override { return Fit::ByTrial; }
  bool joins_images() const override { return true; }

  LayoutNeeds needs(const ConvTask& task) const override { return kPanelsAlgorithm.needs(task); }

  // Whether there are zeros to leave out, and how many, only the weights say: as much as the dense
  // panels, and lists of all that is in them. Where forms may not stand beside each other, it is
  // in the place of the dense panels, or not there.
  double bytes(const ConvTask& task, const ImageLayout& in) const override {
    const PanelsBound dense = panels_bound(task.shape, task.bits, in);
    const double bitmasks = 128.0 * dense.tiles;
    const double lists = 4.0 * dense.tiles + 33.0 * (dense.column_tiles + 1.0);
    return dense.tables + lists + (task.room == Room::Several ? dense.packed + bitmasks : 0.0);
  }

  std::unique_ptr<ConvWeights> derive(const ConvTask& task, const ConvLayouts& at,
                                      std::span<const int8_t> values) const override {
    auto weights = form_of(task, at, values);
    if (weights == nullptr) return nullptr;
    if (sparse_is_forced()) weights->merit = Merit::Forced;
    if (weights->merit == Merit::Unknown && task.room != Room::Several) return nullptr;
    return weights;
  }

  std::unique_ptr<PlannedConv> plan(const ConvTask& task, const ConvLayouts& at,
                                    int variant) const override {
    return std::make_unique<PanelConv>(task, at.in,
                                       plan_panels(task, task.shape, at, variant == kByPixel));
  }
};

constinit const SparsePanelsAlgorithm g_algorithm;

}  // namespace

constinit const ConvAlgorithm& kSparsePanelsAlgorithm = g_algorithm;

}  // namespace adalayer::cpu

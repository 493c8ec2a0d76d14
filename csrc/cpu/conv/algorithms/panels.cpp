// Every convolution as a product of the image in place with dense panels.
#include "cpu/conv/panels.hpp"

namespace adalayer::cpu {
namespace {

class PanelsAlgorithm final : public ConvAlgorithm {
 public:
  std::string name(const ConvShape&) const override { return "panels"; }
  Fit fit(const ConvTask&) const override { return Fit::ByTrial; }
  bool joins_images() const override { return true; }

  LayoutNeeds needs(const ConvTask& task) const override {
    LayoutNeeds needs{.padding = padding_of(task.shape)};
    // Listed positions may lie anywhere; only flattened ones want the rows that one kernel row
    // visits side by side.
    if (task.kernels.positions == Positions::Flattened) {
      needs.phases = task.shape.stride_h;
      needs.columns_multiple = task.shape.stride_w;
      needs.stride = task.shape.stride_w;
    }
    return needs;
  }

  double bytes(const ConvTask& task, const ImageLayout& in) const override {
    return panels_bound(task.shape, task.bits, in).all();
  }

  std::unique_ptr<ConvWeights> derive(const ConvTask& task, const ConvLayouts&,
                                      std::span<const int8_t>) const override {
    auto weights = std::make_unique<PanelWeights>(task);
    weights->widens = true;
    return weights;
  }

  std::unique_ptr<PlannedConv> plan(const ConvTask& task, const ConvLayouts& at,
                                    int) const override {
    return std::make_unique<PanelConv>(task, at.in, plan_panels(task, task.shape, at));
  }
};

constinit const PanelsAlgorithm g_algorithm;

}  // namespace

constinit const ConvAlgorithm& kPanelsAlgorithm = g_algorithm;

}  // namespace adalayer::cpu

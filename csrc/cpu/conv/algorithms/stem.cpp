// The first convolution of a network: few channels, and an input that is written for it alone.
#include "cpu/conv/stem.hpp"
#include "cpu/conv/panels.hpp"

namespace adalayer::cpu {
namespace {

Stem stem_of(const ConvTask& task) { return plan_stem(task.shape, task.kernels.positions); }

class StemInput final : public OwnInput {
 public:
  explicit StemInput(Stem stem) : stem_(std::move(stem)) { layout = stem_.layout; }
  void pack(const ActivationIn& in, uint8_t* image, Part part) const override {
    pack_stem(stem_, in, image, part);
  }

 private:
  Stem stem_;
};

class StemConv final : public PanelConv {
 public:
  StemConv(const ConvTask& task, const ConvLayouts& at)
      : PanelConv(task, at.in, plan_panels(task, stem_of(task).shape, at)),
        stem_(stem_of(task)),
        shape_(task.shape) {}

  void pack(const ConvWeights& weights, std::span<const int8_t> values, int bits,
            uint8_t* packed) const override {
    PanelConv::pack(weights, stem_weights(stem_, shape_, values), bits, packed);
  }

  bool packs_like(const PlannedConv& other) const override {
    const Stem& stem = static_cast<const StemConv&>(other).stem_;
    return stem.dense == stem_.dense && stem.rows == stem_.rows && stem.step == stem_.step &&
           stem.kernel_rows == stem_.kernel_rows && PanelConv::packs_like(other);
  }

 private:
  Stem stem_;
  ConvShape shape_;
};

class StemAlgorithm final : public ConvAlgorithm {
 public:
  std::string name(const ConvShape&) const override { return "stem"; }
  Fit fit(const ConvTask& task) const override {
    return task.own_input && stem_suits(task.shape) ? Fit::Always : Fit::No;
  }

  std::shared_ptr<const OwnInput> own_input(const ConvTask& task) const override {
    return std::make_shared<StemInput>(stem_of(task));
  }

  double bytes(const ConvTask& task, const ImageLayout& in) const override {
    return panels_bound(stem_of(task).shape, task.bits, in).all();
  }

  std::unique_ptr<ConvWeights> derive(const ConvTask& task, const ConvLayouts&,
                                      std::span<const int8_t>) const override {
    auto weights = std::make_unique<PanelWeights>(task);
    weights->widens = true;
    return weights;
  }

  std::unique_ptr<PlannedConv> plan(const ConvTask& task, const ConvLayouts& at,
                                    int) const override {
    return std::make_unique<StemConv>(task, at);
  }
};

constinit const StemAlgorithm g_algorithm;

}  // namespace

constinit const ConvAlgorithm& kStemAlgorithm = g_algorithm;

}  // namespace adalayer::cpu

#include "cpu/conv/algorithm.hpp"

#include <array>

namespace adalayer::cpu {

// Each is in a file of its own in conv/algorithms/.
extern const ConvAlgorithm& kStemAlgorithm;
extern const ConvAlgorithm& kGroupedAlgorithm;
extern const ConvAlgorithm& kPanelsAlgorithm;
extern const ConvAlgorithm& kSparsePanelsAlgorithm;
extern const ConvAlgorithm& kWinograd4x4Algorithm;
extern const ConvAlgorithm& kWinograd2x2Algorithm;
extern const ConvAlgorithm& kMadeWinograd4x4Algorithm;
extern const ConvAlgorithm& kMadeWinograd2x2Algorithm;

std::span<const ConvAlgorithm* const> conv_algorithms() {
  // Of those that a clock compares, the first one wins ties.
  static const std::array list{&kStemAlgorithm,
                               &kGroupedAlgorithm,
                               &kPanelsAlgorithm,
                               &kSparsePanelsAlgorithm,
                               &kWinograd4x4Algorithm,
                               &kWinograd2x2Algorithm,
                               &kMadeWinograd4x4Algorithm,
                               &kMadeWinograd2x2Algorithm};
  return list;
}

std::vector<const ConvAlgorithm*> algorithms_for(const ConvTask& task) {
  std::vector<const ConvAlgorithm*> suitable;
  for (const ConvAlgorithm* algorithm : conv_algorithms()) {
    const Fit fit = algorithm->fit(task);
    if (fit == Fit::Always) return {algorithm};
    if (fit == Fit::ByTrial) suitable.push_back(algorithm);
  }
  return suitable;
}

LayoutNeeds ConvAlgorithm::needs(const ConvTask& task) const {
  return {.padding = padding_of(task.shape)};
}

double ConvAlgorithm::scratch_bytes(const ConvTask&) const { return 0.0; }

std::shared_ptr<const OwnInput> ConvAlgorithm::own_input(const ConvTask&) const { return nullptr; }

ConvForm make_form(const ConvAlgorithm& algorithm, const ConvTask& task, const ConvLayouts& at,
                   std::span<const int8_t> values) {
  ConvForm form{&algorithm, algorithm.derive(task, at, values), nullptr};
  if (form.weights != nullptr) form.plan = algorithm.plan(task, at, form.weights->variant);
  return form;
}

}  // namespace adalayer::cpu

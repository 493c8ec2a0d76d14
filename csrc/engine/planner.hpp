// How each convolution runs on this machine, by the clock.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/steps.hpp"

namespace adalayer::engine {

/// Runs the program once, with the choices that its convolutions have, and adds the seconds of
/// every node to its entry.
using TimedRun = std::function<void(std::vector<double>& seconds)>;

/// The most forms that a convolution of the program has for the clock.
int most_forms(const std::vector<Step>& steps);

/// Times the whole program with every kind of choice in turn, so that caches hold what they hold in
/// use, and leaves each convolution with its fastest one. Packed weights and the planned order win
/// unless another choice is clearly faster. Needs weights in both forms (ConvStep::pack).
void choose_by_clock(std::vector<Step>& steps, const TimedRun& run);

/// Of the sources of this build's kernels.
uint64_t kernels_digest();

/// What the measured times depend on: processor, instruction set, kernels, threads, and every
/// convolution with the algorithms that it has.
uint64_t planning_key(const std::vector<Step>& steps, int threads,
                      uint64_t kernels = kernels_digest());

/// What the convolutions of a planned program have chosen, in a line of text.
std::string plan_line(uint64_t key, const std::vector<Step>& steps);

/// Gives every convolution its choice of such a line; false if it belongs to another key or makes
/// no sense.
bool apply_plan(std::string_view line, uint64_t key, std::vector<Step>& steps);

/// Choices of former processes: a text file with a line per program. A file that cannot be read or
/// written, or lines that make no sense, are as good as none: then the clock decides again.
class PlanCache {
 public:
  explicit PlanCache(std::filesystem::path file) : file_(std::move(file)) {}

  /// ADALAYER_PLAN_CACHE (a file, or "off"), else adalayer_native/engine-plans in $XDG_CACHE_HOME
  /// or ~/.cache; none without a home.
  static std::optional<PlanCache> of_user();

  /// Gives every convolution its kept choice; false if there is none that fits.
  bool apply(uint64_t key, std::vector<Step>& steps) const;
  void keep(uint64_t key, const std::vector<Step>& steps) const;

 private:
  std::filesystem::path file_;
};

}  // namespace adalayer::engine

#include "engine/leveled_engine.hpp"

#include <algorithm>
#include <utility>

#include "core/status.hpp"
#include "engine/levels.hpp"

namespace adalayer::engine {

LeveledEngine::LeveledEngine(Program program, const EngineOptions& options, CacheLimits limits)
    : program_(std::move(program)), options_(options), kept_(limits_within(limits, options)) {
  validate(program_);
  best_ = std::make_shared<const SizedEngine>(at_level(program_, 0), options);
  if (options.memory_bytes > 0) {
    // A level that is in use has what the best one's weights leave.
    const auto held = static_cast<int64_t>(best_->compiled()->weight_bytes());
    options_.memory_bytes = std::max<int64_t>(1, options.memory_bytes - held);
  }
  options_.plan.clear();  // of the best level alone
}

std::shared_ptr<const SizedEngine> LeveledEngine::at(size_t level) const {
  if (level == 0) return best_;
  return kept_.at(level, false, [&] {
    auto engine = std::make_shared<const SizedEngine>(at_level(program_, level), options_,
                                                      kSizeLimits, best_->compiled().get());
    const size_t bytes = engine->compiled()->weight_bytes() + engine->compiled()->own_bytes();
    return EngineCache<size_t, SizedEngine>::Made{std::move(engine), bytes};
  });
}

}  // namespace adalayer::engine

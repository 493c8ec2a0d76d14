// One network at the qualities that its program has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "engine/sized_engine.hpp"

namespace adalayer::engine {

/// What is kept for levels beside the best one; the level used last always is. At most an eighth of
/// EngineOptions::memory_bytes, within which a level and the best one's weights fit together.
constexpr CacheLimits kLevelLimits{.entries = kMaxLevels, .bytes = size_t{256} << 20};

/// The engines of all levels of a program. Stored weights are in memory once; what is derived from
/// them for this machine (panels, taps, corrections), and tables, is a level's own. It is made when
/// the level is first asked for, which takes as long as compiling does. Memory of calls is shared.
/// Safe from many threads.
class LeveledEngine {
 public:
  /// Makes the best level. Throws what SizedEngine throws.
  explicit LeveledEngine(Program program, const EngineOptions& options = {},
                         CacheLimits limits = kLevelLimits);

  size_t levels() const { return program_.levels.size() + 1; }
  const std::shared_ptr<const SizedEngine>& best() const { return best_; }

  /// The engine of a level; 0 is the best one. Throws InvalidArgument where there is none, and what
  /// SizedEngine throws.
  std::shared_ptr<const SizedEngine> at(size_t level) const;

  /// What is kept beside the best level.
  CacheInfo info() const { return kept_.info(); }
  void set_limits(CacheLimits limits) { kept_.set_limits(limits); }

 private:
  Program program_;
  EngineOptions options_;
  std::shared_ptr<const SizedEngine> best_;
  mutable EngineCache<size_t, SizedEngine> kept_;
};

}  // namespace adalayer::engine

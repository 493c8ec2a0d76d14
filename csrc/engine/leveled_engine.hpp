// One network at the qualities that its program has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/sized_engine.hpp"

namespace adalayer::engine {

/// What is kept for levels beside the best one; the level used last always is. At most an eighth of
/// EngineOptions::memory_bytes, within which a level and the best one's weights fit together.
struct LevelLimits {
  size_t entries = kMaxLevels;
  size_t bytes = size_t{256} << 20;
};

/// The engines of all levels of a program. Stored weights are in memory once; what is derived from
/// them for this machine (panels, taps, corrections), and tables, is a level's own. It is made when
/// the level is first asked for, which takes as long as compiling does, and the levels used longest
/// ago leave above the limits. Memory of calls is shared. Safe from many threads: two that ask for
/// a new level make it once, calls of other levels go on meanwhile, and whoever uses a level keeps
/// it alive.
class LeveledEngine {
 public:
  /// Makes the best level. Throws what SizedEngine throws.
  explicit LeveledEngine(Program program, const EngineOptions& options = {},
                         LevelLimits limits = {});

  size_t levels() const { return program_.levels.size() + 1; }
  const std::shared_ptr<const SizedEngine>& best() const { return best_; }

  /// The engine of a level; 0 is the best one. Throws InvalidArgument where there is none, and what
  /// SizedEngine throws.
  std::shared_ptr<const SizedEngine> at(size_t level) const;

  struct Info {
    size_t entries = 0, bytes = 0;  // beside the best level
    uint64_t made = 0;              // since the engine was made
    LevelLimits limits;
  };
  Info info() const;
  void set_limits(LevelLimits limits);

 private:
  struct Entry {
    std::mutex making;
    std::shared_ptr<const SizedEngine> engine;  // this and what follows: guarded by mutex_
    size_t bytes = 0;
    uint64_t used = 0;
  };
  std::shared_ptr<const SizedEngine> found(Entry& entry) const;
  void shrink() const;

  Program program_;
  EngineOptions options_;
  std::shared_ptr<const SizedEngine> best_;

  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Entry>> entries_;  // [levels() - 1]
  mutable uint64_t clock_ = 0, made_ = 0;
  LevelLimits limits_;
};

}  // namespace adalayer::engine

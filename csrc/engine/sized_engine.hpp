// One network at any of the image sizes that its program allows.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "engine/engine.hpp"
#include "engine/size_rules.hpp"

namespace adalayer::engine {

/// What is kept for sizes beside the compiled one; the size used last always is. At most an eighth
/// of EngineOptions::memory_bytes.
struct SizeLimits {
  size_t entries = 32;
  size_t bytes = size_t{128} << 20;
};

/// The engine of the compiled size, and those of others, which are made when they are first asked
/// for: programs, layouts and tables of positions. Weights are in memory once, and so is the memory
/// of a call; nothing is timed in at(), where all layers run as they do at the nearest size that
/// was timed: the compiled one, or one that was warmed up. Safe from many threads: two that ask for
/// one new size make it once. The sizes used longest ago leave above the limits; whoever still uses
/// one keeps it alive.
class SizedEngine {
 public:
  /// Calls share the memory of `memory`'s where it is not null. Throws what Engine throws, and
  /// CorruptData where the program's text about sizes is wrong.
  explicit SizedEngine(Program program, const EngineOptions& options = {}, SizeLimits limits = {},
                       const Engine* memory = nullptr);

  const SizeRules& rules() const { return rules_; }
  const std::vector<int64_t>& compiled_sizes() const { return compiled_sizes_; }
  const std::shared_ptr<const Engine>& compiled() const { return compiled_; }

  /// The engine at these sizes of the rules' axes. Throws InvalidArgument where they are not
  /// allowed, or a node cannot be made for them; LimitExceeded.
  std::shared_ptr<const Engine> at(std::span<const int64_t> sizes) const;

  /// The same, and every convolution's algorithm and loops are chosen by the clock for this size,
  /// which takes up to some seconds; the choice is kept as long as the size is.
  std::shared_ptr<const Engine> warm_up(std::span<const int64_t> sizes) const;

  struct Info {
    size_t entries = 0, bytes = 0;  // beside the compiled size
    uint64_t made = 0;              // since the engine was made
    SizeLimits limits;
  };
  Info info() const;
  void set_limits(SizeLimits limits);

 private:
  struct Entry {
    std::vector<int64_t> sizes;
    std::mutex making;
    std::shared_ptr<const Engine> engine;  // guarded by SizedEngine::mutex_
    size_t bytes = 0;
    bool measured = false;
  };
  using Entries = std::list<std::shared_ptr<Entry>>;

  std::shared_ptr<const Engine> found(std::span<const int64_t> sizes, bool measured) const;
  std::shared_ptr<Entry> entry(std::span<const int64_t> sizes) const;
  std::shared_ptr<const Engine> make(std::span<const int64_t> sizes, bool measured) const;
  std::shared_ptr<const Engine> nearest(std::span<const int64_t> sizes) const;
  void shrink() const;

  EngineOptions options_;
  std::shared_ptr<const Engine> compiled_;
  SizeRules rules_;
  std::vector<int64_t> compiled_sizes_;

  mutable std::mutex mutex_;
  mutable Entries entries_;  // most recently used first
  mutable std::map<std::vector<int64_t>, Entries::iterator> index_;
  mutable size_t bytes_ = 0;
  mutable uint64_t made_ = 0;
  SizeLimits limits_;
};

}  // namespace adalayer::engine

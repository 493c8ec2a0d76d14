// One network at any of the image sizes that its program allows.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/engine.hpp"
#include "engine/engine_cache.hpp"
#include "engine/size_rules.hpp"

namespace adalayer::engine {

/// What is kept for sizes beside the compiled one; the size used last always is. At most an eighth
/// of EngineOptions::memory_bytes.
constexpr CacheLimits kSizeLimits{.entries = 32, .bytes = size_t{128} << 20};

/// The host's room, where it gave one, is for weights and tensors first.
CacheLimits limits_within(CacheLimits limits, const EngineOptions& options);

/// The engine of the compiled size, and those of others, which are made when they are first asked
/// for: programs, layouts and tables of positions. Weights are in memory once, and so is the memory
/// of a call; nothing is timed in at(), where all layers run as they do at the nearest size that
/// was timed: the compiled one, or one that was warmed up. Safe from many threads.
class SizedEngine {
 public:
  /// Calls share the memory of `memory`'s where it is not null. Throws what Engine throws, and
  /// CorruptData where the program's text about sizes is wrong.
  explicit SizedEngine(Program program, const EngineOptions& options = {},
                       CacheLimits limits = kSizeLimits, const Engine* memory = nullptr);

  const SizeRules& rules() const { return rules_; }
  const std::vector<int64_t>& compiled_sizes() const { return compiled_sizes_; }
  const std::shared_ptr<const Engine>& compiled() const { return compiled_; }

  /// The engine at these sizes of the rules' axes. Throws InvalidArgument where they are not
  /// allowed, or a node cannot be made for them; LimitExceeded.
  std::shared_ptr<const Engine> at(std::span<const int64_t> sizes) const;

  /// The same, and every convolution's algorithm and loops are chosen by the clock for this size,
  /// which takes up to some seconds; the choice is kept as long as the size is.
  std::shared_ptr<const Engine> warm_up(std::span<const int64_t> sizes) const;

  /// What is kept beside the compiled size.
  CacheInfo info() const { return kept_.info(); }
  void set_limits(CacheLimits limits) { kept_.set_limits(limits); }

 private:
  using Sizes = std::vector<int64_t>;
  using Cache = EngineCache<Sizes, Engine>;

  std::shared_ptr<const Engine> found(std::span<const int64_t> sizes, bool measured) const;
  Cache::Made make(const Sizes& sizes, bool measured) const;
  std::shared_ptr<const Engine> nearest(const Sizes& sizes) const;

  EngineOptions options_;
  std::shared_ptr<const Engine> compiled_;
  SizeRules rules_;
  Sizes compiled_sizes_;
  mutable Cache kept_;
};

}  // namespace adalayer::engine

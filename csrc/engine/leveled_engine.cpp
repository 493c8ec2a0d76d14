#include "engine/leveled_engine.hpp"

#include <algorithm>
#include <utility>

#include "core/status.hpp"
#include "engine/levels.hpp"

namespace adalayer::engine {

LeveledEngine::LeveledEngine(Program program, const EngineOptions& options, LevelLimits limits)
    : program_(std::move(program)), options_(options), limits_(limits) {
  validate(program_);
  best_ = std::make_shared<const SizedEngine>(at_level(program_, 0), options);
  if (options.memory_bytes > 0) {
    // As for sizes: the host's room is for the best level and its tensors first, and a level that
    // is in use has what the best one's weights leave.
    limits_.bytes = std::min(limits_.bytes, static_cast<size_t>(options.memory_bytes) / 8);
    const auto held = static_cast<int64_t>(best_->compiled()->weight_bytes());
    options_.memory_bytes = std::max<int64_t>(1, options.memory_bytes - held);
  }
  options_.plan.clear();  // of the best level alone
  for (size_t k = 0; k < program_.levels.size(); ++k)
    entries_.push_back(std::make_unique<Entry>());
}

std::shared_ptr<const SizedEngine> LeveledEngine::found(Entry& entry) const {
  const std::lock_guard lock(mutex_);
  if (entry.engine != nullptr) entry.used = ++clock_;
  return entry.engine;
}

std::shared_ptr<const SizedEngine> LeveledEngine::at(size_t level) const {
  if (level == 0) return best_;
  if (level > entries_.size()) (void)at_level(program_, level);  // throws
  Entry& entry = *entries_[level - 1];
  if (auto engine = found(entry)) return engine;
  const std::lock_guard making(entry.making);
  if (auto engine = found(entry)) return engine;  // another thread was quicker
  auto engine = std::make_shared<const SizedEngine>(at_level(program_, level), options_,
                                                    SizeLimits{}, best_->compiled().get());
  const std::lock_guard lock(mutex_);
  entry.engine = engine;
  entry.bytes = engine->compiled()->weight_bytes() + engine->compiled()->own_bytes();
  entry.used = ++clock_;
  ++made_;
  shrink();
  return engine;
}

void LeveledEngine::shrink() const {
  for (;;) {
    size_t entries = 0, bytes = 0;
    Entry* oldest = nullptr;
    for (const auto& e : entries_) {
      if (e->engine == nullptr) continue;
      ++entries;
      bytes += e->bytes;
      if (oldest == nullptr || e->used < oldest->used) oldest = e.get();
    }
    // The one used last stays.
    if (entries <= 1 || (entries <= limits_.entries && bytes <= limits_.bytes)) return;
    oldest->engine.reset();
  }
}

LeveledEngine::Info LeveledEngine::info() const {
  const std::lock_guard lock(mutex_);
  Info info{0, 0, made_, limits_};
  for (const auto& e : entries_)
    if (e->engine != nullptr) {
      ++info.entries;
      info.bytes += e->bytes;
    }
  return info;
}

void LeveledEngine::set_limits(LevelLimits limits) {
  const std::lock_guard lock(mutex_);
  limits_ = limits;
  shrink();
}

}  // namespace adalayer::engine

// Engines that are made when they are first asked for; those used longest ago leave.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace adalayer::engine {

struct CacheLimits {
  size_t entries = 0, bytes = 0;
};
struct CacheInfo {
  size_t entries = 0, bytes = 0;
  uint64_t made = 0;  // since the cache was made
  CacheLimits limits;
};

/// Safe from many threads: two that ask for one new engine make it once, those that ask for others
/// go on meanwhile, and whoever still uses an engine keeps it alive. The one used last stays,
/// however large it is.
template <class Key, class Kept>
class EngineCache {
 public:
  struct Made {
    std::shared_ptr<const Kept> engine;
    size_t bytes = 0;
    bool measured = false;  // what runs its layers was chosen by the clock for it
  };

  explicit EngineCache(CacheLimits limits) : limits_(limits) {}

  /// The engine of `key`. `make()` gives it as Made where there is none, or none that was measured
  /// and `measured` is wanted; what it throws leaves no entry.
  template <class Make>
  std::shared_ptr<const Kept> at(const Key& key, bool measured, const Make& make) {
    const std::shared_ptr<Entry> e = entry(key);
    const auto done = [&] {
      const std::lock_guard lock(mutex_);
      return e->made.measured || !measured ? e->made.engine : nullptr;
    };
    if (auto engine = done()) return engine;
    const std::lock_guard making(e->making);
    if (auto engine = done()) return engine;  // another thread was quicker
    try {
      Made made = make();
      const std::lock_guard lock(mutex_);
      if (is_kept(e)) bytes_ += made.bytes - e->made.bytes;
      e->made = made;
      ++made_;
      shrink();
      return made.engine;
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (e->made.engine == nullptr && is_kept(e)) drop(index_.at(key));
      throw;
    }
  }

  /// `visit(key, made)` for every engine that is kept, the one used last first.
  template <class Visit>
  void each(const Visit& visit) const {
    const std::lock_guard lock(mutex_);
    for (const auto& e : entries_)
      if (e->made.engine != nullptr) visit(e->key, e->made);
  }

  CacheInfo info() const {
    const std::lock_guard lock(mutex_);
    return {count(), bytes_, made_, limits_};
  }
  void set_limits(CacheLimits limits) {
    const std::lock_guard lock(mutex_);
    limits_ = limits;
    shrink();
  }

 private:
  struct Entry {
    Key key;
    std::mutex making;
    Made made;  // guarded by mutex_
  };
  using Entries = std::list<std::shared_ptr<Entry>>;

  std::shared_ptr<Entry> entry(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = index_.find(key);
    if (found != index_.end()) {
      entries_.splice(entries_.begin(), entries_, found->second);
      return *found->second;
    }
    auto made = std::make_shared<Entry>();
    made->key = key;
    entries_.push_front(made);
    index_.emplace(key, entries_.begin());
    return made;
  }

  /// Whether it has not left while it was made.
  bool is_kept(const std::shared_ptr<Entry>& e) const {
    const auto place = index_.find(e->key);
    return place != index_.end() && *place->second == e;
  }

  size_t count() const {
    size_t engines = 0;
    for (const auto& e : entries_)
      engines += e->made.engine != nullptr;
    return engines;
  }

  typename Entries::iterator drop(typename Entries::iterator place) {
    bytes_ -= (*place)->made.bytes;
    index_.erase((*place)->key);
    return entries_.erase(place);
  }

  void shrink() {
    size_t engines = count();
    // From the one used longest ago on; the newest one, and those that are being made, stay.
    for (auto place = entries_.end(); place != entries_.begin();) {
      --place;
      const bool fits = engines <= limits_.entries && bytes_ <= limits_.bytes;
      if (place == entries_.begin() || fits) return;
      if ((*place)->made.engine == nullptr) continue;
      --engines;
      place = drop(place);
    }
  }

  mutable std::mutex mutex_;
  Entries entries_;  // most recently used first
  std::map<Key, typename Entries::iterator> index_;
  size_t bytes_ = 0;
  uint64_t made_ = 0;
  CacheLimits limits_;
};

}  // namespace adalayer::engine

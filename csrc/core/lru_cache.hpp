// Shared, immutable values by key; the least recently used ones leave above a limit in bytes.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace adalayer {

/// Safe from many threads. Value has bytes(), which never changes. A found value costs a look-up
/// and no memory.
template <class Key, class Value, class Hash>
class LruCache {
 public:
  explicit LruCache(std::size_t limit) : limit_(limit) {}

  /// The value of `key`, or null.
  std::shared_ptr<const Value> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = index_.find(key);
    if (found == index_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, found->second);
    return found->second->value;
  }

  /// Adds `value` in the place of `old` (null: where there is none) unless another thread was
  /// quicker; returns what the cache holds. The newest value stays, however large it is.
  std::shared_ptr<const Value> insert(const Key& key, std::shared_ptr<const Value> value,
                                      const std::shared_ptr<const Value>& old = nullptr) {
    const std::lock_guard lock(mutex_);
    const auto found = index_.find(key);
    if (found != index_.end()) {
      if (found->second->value != old) return found->second->value;
      bytes_ -= old->bytes();
      entries_.erase(found->second);
    }
    entries_.push_front({key, value});
    index_[key] = entries_.begin();
    bytes_ += value->bytes();
    shrink();
    return value;
  }

  struct Info {
    std::size_t entries, bytes, limit;
  };
  Info info() {
    const std::lock_guard lock(mutex_);
    return {entries_.size(), bytes_, limit_};
  }
  void set_limit(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    limit_ = bytes;
    shrink();
  }
  void clear() {
    const std::lock_guard lock(mutex_);
    while (!entries_.empty())
      drop_oldest();
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Entry {
    Key key;
    std::shared_ptr<const Value> value;
  };
  void shrink() {
    while (bytes_ > limit_ && entries_.size() > 1)
      drop_oldest();
  }
  void drop_oldest() {
    bytes_ -= entries_.back().value->bytes();
    index_.erase(entries_.back().key);
    entries_.pop_back();
  }

  std::mutex mutex_;
  std::list<Entry> entries_;  // most recently used first
  std::unordered_map<Key, typename std::list<Entry>::iterator, Hash> index_;
  std::size_t bytes_ = 0;
  std::size_t limit_;
};

/// The cache of this type that the whole process has. Never destroyed: worker threads and atexit
/// handlers may still look something up.
///
/// A fork copies the mutex as it is: held by a thread that the child does not have, it would never
/// be free again. So it is held over the fork, and the cache is whole on both sides.
template <class Cache, std::size_t kLimit>
Cache& process_cache() {
  static Cache* const instance = [] {
    constexpr auto unlock = [] { process_cache<Cache, kLimit>().unlock(); };
    pthread_atfork([] { process_cache<Cache, kLimit>().lock(); }, unlock, unlock);
    return new Cache(kLimit);
  }();
  return *instance;
}

}  // namespace adalayer

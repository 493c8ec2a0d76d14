// Derived weights by canonical content. Operators receive canonical bytes, so that a compiled or
// exported program carries nothing that depends on the machine; what the machine wants is derived
// on first use and found again by hash.
#include <pthread.h>

#include <list>
#include <mutex>
#include <unordered_map>

#include "core/status.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

struct Key {
  uint64_t hash;
  int64_t groups;
  bool dilated;  // a dilation along the row changes how steps span columns
  bool scalar;   // dense bytes for the reference, panels for everything else
  bool depthwise;
  bool operator==(const Key&) const = default;
};
struct KeyHash {
  size_t operator()(const Key& k) const {
    return k.hash ^ (static_cast<uint64_t>(k.groups) * 0x9E3779B97F4A7C15ull) ^
           (k.dilated ? 1u : 0u) ^ (k.scalar ? 2u : 0u) ^ (k.depthwise ? 4u : 0u);
  }
};

struct Entry {
  Key key;
  std::shared_ptr<const LayerWeights> weights;
};

struct Cache {
  std::mutex mutex;
  std::list<Entry> entries;  // most recently used first
  std::unordered_map<Key, std::list<Entry>::iterator, KeyHash> index;
  size_t bytes = 0;
  size_t limit = size_t{1} << 30;

  void shrink_to(size_t target) {
    while (bytes > target && entries.size() > 1)
      drop_oldest();
  }
  void drop_oldest() {
    bytes -= entries.back().weights->bytes();
    index.erase(entries.back().key);
    entries.pop_back();
  }
};

// Never destroyed: worker threads and atexit handlers may still run layers.
Cache& cache() {
  static Cache* instance = new Cache;
  return *instance;
}

// A fork copies the mutex as it is: held by a thread that the child does not have, it would never
// be free again. So the forking thread holds it during the fork, and the cache is whole on both
// sides. Nothing else is locked while it is held.
[[maybe_unused]] const int g_at_fork = pthread_atfork(
    [] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, [] { cache().mutex.unlock(); });

/// The hash covers the shape and the width; comparing them again keeps a forged or colliding hash
/// from reading out of bounds.
bool fits(const LayerWeights& weights, const ConvShape& shape, int bits) {
  const formats::CanonicalHeader& h = weights.header;
  return h.bits == bits && h.out_channels == shape.out_channels && h.group_in == shape.group_in() &&
         h.kernel_h == shape.kernel_h && h.kernel_w == shape.kernel_w;
}

}  // namespace

std::shared_ptr<const LayerWeights> cached_weights(const ConvShape& shape,
                                                   std::span<const uint8_t> canonical) {
  const formats::CanonicalHeader header = formats::read_header(canonical);
  const bool scalar = active_kernels() == nullptr;
  const Key key{header.content_hash, shape.groups, shape.dilation_w != 1, scalar,
                shape.depthwise()};
  Cache& c = cache();
  {
    const std::lock_guard lock(c.mutex);
    const auto found = c.index.find(key);
    if (found != c.index.end() && fits(*found->second->weights, shape, header.bits)) {
      c.entries.splice(c.entries.begin(), c.entries, found->second);
      return found->second->weights;
    }
  }
  // Derived outside the lock: two threads may do it twice, none waits for the other.
  auto weights = std::make_shared<const LayerWeights>(derive_weights(shape, canonical));
  const std::lock_guard lock(c.mutex);
  const auto found = c.index.find(key);
  if (found != c.index.end()) {
    const auto& present = found->second->weights;
    return fits(*present, shape, header.bits) ? present : weights;
  }
  c.entries.push_front({key, weights});
  c.index[key] = c.entries.begin();
  c.bytes += weights->bytes();
  c.shrink_to(c.limit);
  return weights;
}

CacheInfo weight_cache_info() {
  Cache& c = cache();
  const std::lock_guard lock(c.mutex);
  return {c.entries.size(), c.bytes, c.limit};
}

void set_weight_cache_limit(size_t bytes) {
  Cache& c = cache();
  const std::lock_guard lock(c.mutex);
  c.limit = bytes;
  c.shrink_to(bytes);
}

void clear_weight_cache() {
  Cache& c = cache();
  const std::lock_guard lock(c.mutex);
  while (!c.entries.empty())
    c.drop_oldest();
}

}  // namespace adalayer::cpu

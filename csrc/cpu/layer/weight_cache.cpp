// Derived weights by canonical content. Operators receive canonical bytes, so that a compiled or
// exported program carries nothing that depends on the machine; what the machine wants is derived
// on first use and found again by hash.
#include <pthread.h>

#include "core/lru_cache.hpp"
#include "cpu/layer/plan.hpp"
#include "cpu/layer/single_layer.hpp"

namespace adalayer::cpu {
namespace {

constexpr size_t kWeightBytes = size_t{1} << 30;

using WeightCache = LruCache<LayerKey, LayerWeights, LayerKeyHash>;

// Never destroyed: worker threads and atexit handlers may still run layers.
WeightCache& cache() {
  static auto* instance = new WeightCache(kWeightBytes);
  return *instance;
}

[[maybe_unused]] const int g_at_fork =
    pthread_atfork([] { cache().lock(); }, [] { cache().unlock(); }, [] { cache().unlock(); });

/// What of a shape decides how weights are laid out: all but the image's size and padding.
ConvShape geometry_of(ConvShape shape) {
  shape.batch = 1;
  shape.in_h = shape.in_w = 0;
  shape.pad_top = shape.pad_left = shape.pad_bottom = shape.pad_right = 0;
  return shape;
}

}  // namespace

std::shared_ptr<const LayerWeights> cached_weights(const ConvShape& shape,
                                                   std::span<const uint8_t> canonical, int qmax) {
  const formats::CanonicalHeader header = formats::read_header(canonical);
  const LayerKey key{header.content_hash, geometry_of(shape), qmax, active_isa()};
  // The hash covers the shape and the width; comparing them again keeps a forged or colliding hash
  // from reading out of bounds.
  const auto fits = [&](const LayerWeights& weights) {
    const formats::CanonicalHeader& h = weights.header;
    return h.bits == header.bits && h.out_channels == shape.out_channels &&
           h.group_in == shape.group_in() && h.kernel_h == shape.kernel_h &&
           h.kernel_w == shape.kernel_w;
  };
  auto weights = cache().find(key);
  if (weights != nullptr && fits(*weights)) return weights;
  // Derived outside the lock: two threads may do it twice, none waits for the other.
  const auto derived = std::make_shared<const LayerWeights>(derive_weights(shape, canonical, qmax));
  weights = cache().insert(key, derived);
  return fits(*weights) ? weights : derived;
}

CacheInfo weight_cache_info() {
  const auto info = cache().info();
  return {info.entries, info.bytes, info.limit};
}

void set_weight_cache_limit(size_t bytes) { cache().set_limit(bytes); }

void clear_weight_cache() { cache().clear(); }

}  // namespace adalayer::cpu

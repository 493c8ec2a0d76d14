// Derived weights by canonical content. Operators receive canonical bytes, so that a compiled or
// exported program carries nothing that depends on the machine; what the machine wants is derived
// on first use and found again by hash.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/lru_cache.hpp"
#include "cpu/layer/plan.hpp"
#include "cpu/layer/single_layer.hpp"

namespace adalayer::cpu {
namespace {

constexpr size_t kWeightBytes = size_t{1} << 30;

/// One layer: its weights by the sizes of the images that it has met.
struct LayerSizes {
  struct Size {
    ConvShape shape;  // of one image
    std::shared_ptr<const LayerWeights> weights;
  };
  std::vector<Size> sizes;

  size_t bytes() const {
    size_t total = sizes.capacity() * sizeof(Size);
    for (auto size = sizes.begin(); size != sizes.end(); ++size)
      if (std::none_of(sizes.begin(), size,
                       [&](const Size& before) { return before.weights == size->weights; }))
        total += size->weights->bytes();
    return total;
  }
};

auto& cache() {
  return process_cache<LruCache<LayerKey, LayerSizes, LayerKeyHash>, kWeightBytes>();
}

ConvShape of_one_image(ConvShape shape) {
  shape.batch = 1;
  return shape;
}

/// What of a shape decides how weights are laid out: all but the image's size and padding.
ConvShape geometry_of(ConvShape shape) {
  shape.batch = 1;
  shape.in_h = shape.in_w = 0;
  shape.pad_top = shape.pad_left = shape.pad_bottom = shape.pad_right = 0;
  return shape;
}

double outputs(const ConvShape& s) {
  return static_cast<double>(std::max<int64_t>(s.out_h(), 1) * std::max<int64_t>(s.out_w(), 1));
}

/// The size with the most similar number of outputs.
const LayerSizes::Size& nearest(const LayerSizes& layer, const ConvShape& shape) {
  return *std::min_element(layer.sizes.begin(), layer.sizes.end(),
                           [&](const auto& a, const auto& b) {
                             const auto distance = [&](const ConvShape& s) {
                               return std::abs(std::log(outputs(s) / outputs(shape)));
                             };
                             return distance(a.shape) < distance(b.shape);
                           });
}

/// Whether one form at most suits a layer, whatever its images are.
bool has_no_choice(const ConvShape& shape, int bits, int qmax) {
  return active_kernels() == nullptr || algorithms_for(layer_task(shape, bits, qmax)).size() == 1;
}

bool same_form(const LayerWeights& a, const LayerWeights& b) {
  return a.algorithm == b.algorithm && a.form->variant == b.form->variant &&
         a.form->key() == b.form->key() && a.form->form() == b.form->form() &&
         a.packed.size() == b.packed.size() &&
         std::memcmp(a.packed.data(), b.packed.data(), a.packed.size()) == 0;
}

/// Weights for a size that a layer (which may be null) has not met: those of another size where
/// they would be the same.
std::shared_ptr<const LayerWeights> weights_for(const ConvShape& shape,
                                                std::span<const uint8_t> canonical, int qmax,
                                                const LayerSizes* layer) {
  if (layer != nullptr && has_no_choice(shape, layer->sizes.front().weights->header.bits, qmax))
    return layer->sizes.front().weights;
  auto derived = std::make_shared<const LayerWeights>(derive_weights(shape, canonical, qmax));
  if (layer != nullptr)
    for (const LayerSizes::Size& size : layer->sizes)
      if (same_form(*size.weights, *derived)) return size.weights;
  return derived;
}

}  // namespace

std::shared_ptr<const LayerWeights> cached_weights(const ConvShape& shape,
                                                   std::span<const uint8_t> canonical, int qmax) {
  const formats::CanonicalHeader header = formats::read_header(canonical);
  const LayerKey key{header.content_hash, geometry_of(shape), qmax, active_isa()};
  const ConvShape image = of_one_image(shape);
  // The hash covers the shape and the width; comparing them again keeps a forged or colliding hash
  // from reading out of bounds.
  const auto fits = [&](const LayerSizes& layer) {
    const formats::CanonicalHeader& h = layer.sizes.front().weights->header;
    return h.bits == header.bits && h.out_channels == shape.out_channels &&
           h.group_in == shape.group_in() && h.kernel_h == shape.kernel_h &&
           h.kernel_w == shape.kernel_w;
  };
  const auto layer = cache().find(key);
  if (layer != nullptr && !fits(*layer))
    return std::make_shared<const LayerWeights>(derive_weights(shape, canonical, qmax));
  if (layer != nullptr) {
    for (const LayerSizes::Size& size : layer->sizes)
      if (size.shape == image) return size.weights;
    if (layer->sizes.size() >= kMostSizes) return nearest(*layer, image).weights;
  }
  // Derived outside the lock: two threads may do it twice, none waits for the other. What is lost
  // where two add a size at once is derived again.
  const auto weights = weights_for(image, canonical, qmax, layer.get());
  LayerSizes more = layer == nullptr ? LayerSizes{} : *layer;
  more.sizes.push_back({image, weights});
  cache().insert(key, std::make_shared<const LayerSizes>(std::move(more)), layer);
  return weights;
}

CacheInfo weight_cache_info() {
  const auto info = cache().info();
  return {info.entries, info.bytes, info.limit};
}

void set_weight_cache_limit(size_t bytes) { cache().set_limit(bytes); }

void clear_weight_cache() { cache().clear(); }

}  // namespace adalayer::cpu

#include "cpu/layer/linear_layer.hpp"

#include <algorithm>
#include <memory>

#include "core/lru_cache.hpp"
#include "core/status.hpp"
#include "core/thread_pool.hpp"
#include "formats/canonical.hpp"
#include "reference/reference.hpp"

namespace adalayer::cpu {
namespace {

constexpr size_t kCacheBytes = size_t{1} << 28;
constexpr int64_t kProductsPerPart = 1 << 18;

struct Key {
  uint64_t content = 0;
  int64_t outputs = 0, inputs = 0, group = 0;
  int32_t qmax = 255;
  Isa isa = Isa::Scalar;
  bool operator==(const Key&) const = default;
};
struct KeyHash {
  size_t operator()(const Key& key) const {
    return static_cast<size_t>(key.content ^
                               (static_cast<uint64_t>(key.group) * 0x9E3779B97F4A7C15u) ^
                               (static_cast<uint64_t>(key.isa) << 56));
  }
};
using Cache = LruCache<Key, Linear, KeyHash>;

Cache& cache() { return process_cache<Cache, kCacheBytes>(); }

}  // namespace

void linear_layer(const LinearSpec& spec, std::span<const uint8_t> canonical, const LinearJob& job,
                  int threads) {
  const formats::CanonicalHeader header = formats::read_header(canonical);
  if (header.out_channels != spec.outputs || header.group_in != spec.inputs ||
      header.kernel_h != 1 || header.kernel_w != 1)
    fail<InvalidArgument>("linear: expected weights of ", spec.outputs, " x ", spec.inputs,
                          ", got ", header.out_channels, " x ", header.group_in, " x ",
                          header.kernel_h, " x ", header.kernel_w);
  check_accumulator(spec.inputs, header.bits);
  const Key key{header.content_hash, spec.outputs, spec.inputs,
                spec.group,          spec.qmax,    active_isa()};
  std::shared_ptr<const Linear> held = cache().find(key);
  if (held == nullptr) {
    held = std::make_shared<const Linear>(spec, formats::unpack_canonical(canonical), header.bits);
    held = cache().insert(key, held);
  }
  const Linear layer(*held, spec, true);
  const int64_t products = job.rows() * spec.outputs * spec.inputs;
  const int64_t parts = std::clamp<int64_t>(products / kProductsPerPart, 1, std::max(threads, 1));
  parallel_for(parts, threads, [&](int64_t part, int) { layer.run(job, {part, parts}); });
}

void clear_linear_cache() { cache().clear(); }

}  // namespace adalayer::cpu

#include "cpu/layer/recurrent_layer.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/lru_cache.hpp"
#include "core/status.hpp"
#include "core/thread_pool.hpp"
#include "formats/canonical.hpp"
#include "reference/reference.hpp"

namespace adalayer::cpu {
namespace {

constexpr size_t kCacheBytes = size_t{1} << 28;

struct Key {
  uint64_t content = 0;
  int64_t outputs = 0, hidden = 0;
  int32_t zero_point = 0, highest = 255;
  Isa isa = Isa::Scalar;
  bool operator==(const Key&) const = default;
};
struct KeyHash {
  size_t operator()(const Key& key) const {
    return static_cast<size_t>(key.content ^
                               (static_cast<uint64_t>(key.zero_point) * 0x9E3779B97F4A7C15u) ^
                               (static_cast<uint64_t>(key.isa) << 56));
  }
};
using Cache = LruCache<Key, Recurrence, KeyHash>;

Cache& cache() { return process_cache<Cache, kCacheBytes>(); }

}  // namespace

void recurrent_layer(const RecurrenceSpec& spec, std::span<const uint8_t> canonical,
                     const RecurrenceJob& job, int threads) {
  const formats::CanonicalHeader header = formats::read_header(canonical);
  const int64_t outputs = spec.outputs(), hidden = spec.hidden;
  if (header.out_channels != outputs || header.group_in != hidden || header.kernel_h != 1 ||
      header.kernel_w != 1)
    fail<InvalidArgument>("recurrence: expected weights of ", outputs, " x ", hidden, ", got ",
                          header.out_channels, " x ", header.group_in, " x ", header.kernel_h,
                          " x ", header.kernel_w);
  check_accumulator(hidden, header.bits);
  const int32_t highest = static_cast<int32_t>(spec.state.hi) + spec.state.zero_point;
  const Key key{header.content_hash, outputs, hidden, spec.state.zero_point, highest, active_isa()};
  std::shared_ptr<const Recurrence> held = cache().find(key);
  if (held == nullptr) {
    held =
        std::make_shared<const Recurrence>(spec, formats::unpack_canonical(canonical), header.bits);
    held = cache().insert(key, held);
  }
  const Recurrence layer(*held, spec);
  // Images share a pass over the weights, as many as a product takes.
  const int64_t groups = (job.images + kGemvRows - 1) / kGemvRows;
  const int64_t parts = std::clamp<int64_t>(threads, 1, std::max<int64_t>(groups, 1));
  parallel_for(parts, threads, [&](int64_t part, int) { layer.run(job, {part, parts}); });
}

void clear_recurrent_cache() { cache().clear(); }

}  // namespace adalayer::cpu

#include "engine/memory.hpp"

#include <algorithm>
#include <numeric>

namespace adalayer::engine {

ArenaPlan plan_arena(std::span<const Lifetime> lifetimes) {
  ArenaPlan plan;
  plan.offsets.assign(lifetimes.size(), 0);
  std::vector<size_t> order(lifetimes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return lifetimes[a].bytes > lifetimes[b].bytes; });
  std::vector<size_t> placed;  // by rising offset
  for (const size_t i : order) {
    const Lifetime& l = lifetimes[i];
    const int64_t bytes = (l.bytes + 63) / 64 * 64;
    int64_t at = 0;
    for (const size_t j : placed) {
      const Lifetime& other = lifetimes[j];
      if (other.last < l.first || l.last < other.first) continue;
      if (at + bytes <= plan.offsets[j]) break;
      at = std::max(at, plan.offsets[j] + (other.bytes + 63) / 64 * 64);
    }
    plan.offsets[i] = at;
    plan.bytes = std::max(plan.bytes, at + bytes);
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), i,
                         [&](size_t a, size_t b) { return plan.offsets[a] < plan.offsets[b]; }),
        i);
  }
  return plan;
}

}  // namespace adalayer::engine

// One arena for all tensors between operations.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace adalayer::engine {

/// A tensor that is written by node `first` and last read by node `last`.
struct Lifetime {
  int64_t bytes = 0;
  int32_t first = 0, last = 0;
};

struct ArenaPlan {
  std::vector<int64_t> offsets;  // [lifetimes]
  int64_t bytes = 0;
};

/// Offsets (multiples of 64) such that tensors alive at the same node do not overlap. The largest
/// tensors choose first, each the lowest place where it fits.
ArenaPlan plan_arena(std::span<const Lifetime> lifetimes);

}  // namespace adalayer::engine

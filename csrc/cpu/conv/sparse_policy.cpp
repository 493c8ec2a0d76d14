#include "cpu/conv/sparse_policy.hpp"

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

#include "core/status.hpp"

namespace adalayer::cpu {
namespace {

constexpr std::array<std::string_view, 4> kPolicies = {"auto", "dense", "blocks", "bitmask"};
std::atomic<int> g_policy{-1};

int policy_named(std::string_view name) {
  for (size_t i = 0; i < kPolicies.size(); ++i)
    if (kPolicies[i] == name) return static_cast<int>(i);
  throw InvalidArgument("sparse policy: expected auto, dense, blocks or bitmask, got '" +
                        std::string(name) + "'");
}

}  // namespace

SparsePolicy sparse_policy() {
  int policy = g_policy.load(std::memory_order_relaxed);
  if (policy < 0) {
    const char* name = std::getenv("ADALAYER_SPARSE");
    policy = name == nullptr || *name == '\0' ? 0 : policy_named(name);
    g_policy.store(policy, std::memory_order_relaxed);
  }
  return static_cast<SparsePolicy>(policy);
}

void set_sparse_policy(std::string_view name) {
  g_policy.store(policy_named(name), std::memory_order_relaxed);
}

}  // namespace adalayer::cpu

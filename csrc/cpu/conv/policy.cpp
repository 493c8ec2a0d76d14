#include "cpu/conv/policy.hpp"

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

#include "core/status.hpp"

namespace adalayer::cpu {
namespace {

class Setting {
 public:
  using Names = std::array<std::string_view, 4>;

  constexpr Setting(const char* what, const char* variable, const Names& names)
      : what_(what), variable_(variable), names_(names) {}

  int get() {
    int value = value_.load(std::memory_order_relaxed);
    if (value < 0) {
      const char* name = std::getenv(variable_);
      value = name == nullptr || *name == '\0' ? 0 : named(name);
      value_.store(value, std::memory_order_relaxed);
    }
    return value;
  }
  void set(std::string_view name) { value_.store(named(name), std::memory_order_relaxed); }

 private:
  int named(std::string_view name) const {
    for (size_t i = 0; i < names_.size(); ++i)
      if (names_[i] == name) return static_cast<int>(i);
    fail<InvalidArgument>(what_, " policy: expected ", names_[0], ", ", names_[1], ", ", names_[2],
                          " or ", names_[3], ", got '", name, "'");
  }

  const char* what_;
  const char* variable_;
  Names names_;
  std::atomic<int> value_{-1};
};

constinit Setting g_sparse("sparse", "ADALAYER_SPARSE", {"auto", "dense", "blocks", "bitmask"});
constinit Setting g_winograd("winograd", "ADALAYER_WINOGRAD", {"auto", "off", "4x4", "2x2"});

}  // namespace

SparsePolicy sparse_policy() { return static_cast<SparsePolicy>(g_sparse.get()); }
void set_sparse_policy(std::string_view name) { g_sparse.set(name); }

WinogradPolicy winograd_policy() { return static_cast<WinogradPolicy>(g_winograd.get()); }
void set_winograd_policy(std::string_view name) { g_winograd.set(name); }

}  // namespace adalayer::cpu

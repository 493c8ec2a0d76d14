// The kernels of the widest vectors on machines without them: csrc/cpu/isa/shared/winograd.inl over
// vectors of 512 bits that are two of 256.
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/winograd_kernels.hpp"

namespace adalayer::cpu {
namespace {

#include "cpu/isa/avx2/winograd256.inl"

struct Vec {
  struct T {
    __m256i low, high;
  };
  static constexpr int kLevels = 32, kSums = 16;
  static constexpr int kGroups = 2, kRows = 12;

  static T load(const void* p) {
    const auto* bytes = static_cast<const uint8_t*>(p);
    return {Vec256::load(bytes), Vec256::load(bytes + 32)};
  }
  static void store(void* p, T v) {
    Vec256::store(p, v.low);
    Vec256::store(static_cast<uint8_t*>(p) + 32, v.high);
  }
  static T load_levels(const uint8_t* p) {
    return {Vec256::load_levels(p), Vec256::load_levels(p + 16)};
  }
  static T load_narrow(const uint8_t* p) {
    return {Vec256::load_narrow(p), Vec256::load_narrow(p + 16)};
  }
  static void store_narrow(uint8_t* p, T v) {
    Vec256::store_narrow(p, v.low);
    Vec256::store_narrow(p + 16, v.high);
  }
  static T broadcast(const int16_t* pair) {
    return {Vec256::broadcast(pair), Vec256::broadcast(pair)};
  }
  static T set32(int32_t v) { return {Vec256::set32(v), Vec256::set32(v)}; }
  static T add16(T a, T b) { return {Vec256::add16(a.low, b.low), Vec256::add16(a.high, b.high)}; }
  static T sub16(T a, T b) { return {Vec256::sub16(a.low, b.low), Vec256::sub16(a.high, b.high)}; }
  template <int kBits>
  static T shl16(T a) {
    return {Vec256::shl16<kBits>(a.low), Vec256::shl16<kBits>(a.high)};
  }
  static T add32(T a, T b) { return {Vec256::add32(a.low, b.low), Vec256::add32(a.high, b.high)}; }
  static T sub32(T a, T b) { return {Vec256::sub32(a.low, b.low), Vec256::sub32(a.high, b.high)}; }
  static T mul32(T a, T b) { return {Vec256::mul32(a.low, b.low), Vec256::mul32(a.high, b.high)}; }
  template <int kBits>
  static T sra32(T a) {
    return {Vec256::sra32<kBits>(a.low), Vec256::sra32<kBits>(a.high)};
  }
  static T product(T a, T w) {
    return {_mm256_madd_epi16(a.low, w.low), _mm256_madd_epi16(a.high, w.high)};
  }
  static T dot(T sum, T a, T w) { return add32(sum, product(a, w)); }
};

#include "cpu/isa/shared/winograd.inl"

}  // namespace

extern const WinogradKernels kWinogradWide;
const WinogradKernels kWinogradWide = kernels_named("wide vectors");

}  // namespace adalayer::cpu

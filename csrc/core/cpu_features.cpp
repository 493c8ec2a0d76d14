#include "core/cpu_features.hpp"

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "core/status.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace adalayer {
namespace {

constexpr std::array<std::string_view, kIsaCount> kNames = {"scalar", "avx2", "avxvnni",
                                                            "avx512vnni", "amx"};
constexpr std::string_view kEnvironment = "ADALAYER_FORCE_ISA";

#if defined(__x86_64__)

constexpr bool bit(std::uint32_t word, int index) { return ((word >> index) & 1U) != 0; }

// XCR0: which register states the operating system saves. Written in assembly because the
// _xgetbv intrinsic would need -mxsave for this whole file.
std::uint64_t read_xcr0() {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux gives tile registers only to processes that ask (the state is 8 KiB per thread).
bool request_amx_permission() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures features;
  std::uint32_t a = 0;
  std::uint32_t b = 0;
  std::uint32_t c = 0;
  std::uint32_t d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return features;
  const bool fma = bit(c, 12);
  const bool osxsave = bit(c, 27);
  const bool avx = bit(c, 28);
  const bool f16c = bit(c, 29);
  // XGETBV itself faults without OSXSAVE.
  if (!osxsave || !avx) return features;
  const std::uint64_t xcr0 = read_xcr0();
  constexpr std::uint64_t kAvxState = 0x6;       // SSE, AVX
  constexpr std::uint64_t kAvx512State = 0xe6;   // + opmask, upper halves of ZMM 0-15, ZMM 16-31
  constexpr std::uint64_t kTileState = 0x60000;  // tile configuration, tile data
  const bool os_avx = (xcr0 & kAvxState) == kAvxState;
  const bool os_avx512 = (xcr0 & kAvx512State) == kAvx512State;
  const bool os_tiles = (xcr0 & kTileState) == kTileState;

  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return features;
  const std::uint32_t subleaves = a;
  features.avx2 = os_avx && fma && f16c && bit(b, 5);
  const bool avx512 = os_avx512 && features.avx2 && bit(b, 16) /* F */ && bit(b, 17) /* DQ */ &&
                      bit(b, 30) /* BW */ && bit(b, 31) /* VL */;
  features.avx512vnni = avx512 && bit(c, 11);
  features.avx512vbmi = avx512 && bit(c, 1);
  features.avx512vbmi2 = avx512 && bit(c, 6);
  features.gfni = avx512 && bit(c, 8);
  const bool amx_tile = bit(d, 24);
  const bool amx_int8 = bit(d, 25);
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
    features.avxvnni = features.avx2 && bit(a, 4);
  }
  // Every AMX machine has GFNI; the AMX kernels unpack weights with it.
  features.amx_int8 = os_tiles && amx_tile && amx_int8 && features.gfni && request_amx_permission();
  return features;
}

#else

CpuFeatures detect() { return {}; }

#endif

bool in_build(Isa isa) {
  switch (isa) {
    case Isa::Scalar:
      return true;
    case Isa::Avx2:
#if defined(ADALAYER_HAVE_AVX2)
      return true;
#else
      return false;
#endif
    case Isa::AvxVnni:
#if defined(ADALAYER_HAVE_AVXVNNI)
      return true;
#else
      return false;
#endif
    case Isa::Avx512Vnni:
#if defined(ADALAYER_HAVE_AVX512VNNI)
      return true;
#else
      return false;
#endif
    case Isa::Amx:
#if defined(ADALAYER_HAVE_AMX)
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool on_machine(Isa isa) {
  const CpuFeatures& features = cpu_features();
  switch (isa) {
    case Isa::Scalar:
      return true;
    case Isa::Avx2:
      return features.avx2;
    case Isa::AvxVnni:
      return features.avxvnni;
    case Isa::Avx512Vnni:
      return features.avx512vnni;
    case Isa::Amx:
      // The AMX file uses AVX-512 around its tiles (packing, requantization).
      return features.amx_int8 && features.avx512vnni;
  }
  return false;
}

std::string list_supported() {
  std::string out;
  for (const Isa isa : supported_isas()) {
    if (!out.empty()) out += ", ";
    out += isa_name(isa);
  }
  return out;
}

// The family that `name` asks for; `source` names where it came from in error messages.
Isa resolve(std::string_view name, std::string_view source) {
  if (name.empty() || name == "auto") return best_isa();
  for (int i = 0; i < kIsaCount; ++i) {
    if (kNames[i] != name) continue;
    const Isa isa = static_cast<Isa>(i);
    if (!on_machine(isa)) {
      fail(source, ": this machine does not support '", name, "'; supported: ", list_supported());
    }
    if (!in_build(isa)) {
      fail(source, ": this build has no '", name, "' kernels; supported: ", list_supported());
    }
    return isa;
  }
  fail<InvalidArgument>(
      source, ": unknown instruction set '", name,
      "'; valid: auto, scalar, avx2, avxvnni, avx512vnni, amx; supported here: ", list_supported());
}

constexpr int kUndecided = -1;
std::atomic<int> g_active{kUndecided};

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::string describe_cpu_features() {
  const CpuFeatures& features = cpu_features();
  std::string out;
  const auto add = [&out](bool present, std::string_view name) {
    if (!present) return;
    if (!out.empty()) out += ' ';
    out += name;
  };
  add(features.avx2, "avx2");
  add(features.avxvnni, "avxvnni");
  add(features.avx512vnni, "avx512vnni");
  add(features.avx512vbmi, "avx512vbmi");
  add(features.avx512vbmi2, "avx512vbmi2");
  add(features.gfni, "gfni");
  add(features.amx_int8, "amx_int8");
  return out;
}

std::string_view isa_name(Isa isa) {
  const int index = static_cast<int>(isa);
  return index >= 0 && index < kIsaCount ? kNames[index] : std::string_view("unknown");
}

bool isa_supported(Isa isa) { return in_build(isa) && on_machine(isa); }

std::vector<Isa> supported_isas() {
  std::vector<Isa> out;
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_supported(static_cast<Isa>(i))) out.push_back(static_cast<Isa>(i));
  }
  return out;
}

Isa best_isa() { return supported_isas().back(); }

Isa active_isa() {
  const int active = g_active.load(std::memory_order_acquire);
  if (active != kUndecided) return static_cast<Isa>(active);
  // Threads that come here together read the same environment and store the same value. A failed
  // resolve stores nothing, so that every later use fails as clearly as the first.
  const char* value = std::getenv(kEnvironment.data());
  const Isa isa = resolve(value == nullptr ? std::string_view() : value, kEnvironment);
  int expected = kUndecided;
  g_active.compare_exchange_strong(expected, static_cast<int>(isa), std::memory_order_acq_rel);
  return expected == kUndecided ? isa : static_cast<Isa>(expected);
}

void force_isa(std::string_view name) {
  if (name.empty() || name == "auto") {
    g_active.store(kUndecided, std::memory_order_release);
    return;
  }
  g_active.store(static_cast<int>(resolve(name, "force_isa")), std::memory_order_release);
}

}  // namespace adalayer

#include "core/cpu_features.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "core/arm_cores.hpp"
#include "core/status.hpp"

namespace adalayer {
namespace {

constexpr std::array<std::string_view, kIsaCount> kNames = {
    "scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "neon", "dotprod", "i8mm"};
constexpr std::string_view kEnvironment = "ADALAYER_FORCE_ISA";

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
    case Isa::Avx512:
#if defined(ADALAYER_HAVE_AVX512)
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
    case Isa::Neon:
#if defined(ADALAYER_HAVE_NEON)
      return true;
#else
      return false;
#endif
    case Isa::Dotprod:
#if defined(ADALAYER_HAVE_DOTPROD)
      return true;
#else
      return false;
#endif
    case Isa::I8mm:
#if defined(ADALAYER_HAVE_I8MM)
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
    case Isa::Avx512:
      return features.avx512;
    case Isa::Avx512Vnni:
      return features.avx512vnni;
    case Isa::Amx:
      // The AMX file uses AVX-512 around its tiles (packing, requantization).
      return features.amx_int8 && features.avx512vnni;
    case Isa::Neon:
      return features.neon;
    case Isa::Dotprod:
      return features.dotprod;
    case Isa::I8mm:
      return features.i8mm;
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
  fail<InvalidArgument>(source, ": unknown instruction set '", name,
                        "'; valid: auto, scalar, avx2, avxvnni, avx512, avx512vnni, amx, neon, "
                        "dotprod, i8mm; supported "
                        "here: ",
                        list_supported());
}

constexpr int kUndecided = -1;
std::atomic<int> g_active{kUndecided};

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect_cpu_features();
  return features;
}

std::string cpu_brand() {
  std::string brand;
#if defined(__x86_64__)
  constexpr unsigned kFirst = 0x80000002, kLast = 0x80000004;
  unsigned words[4];
  for (unsigned leaf = kFirst; leaf <= kLast; ++leaf) {
    if (__get_cpuid(leaf, &words[0], &words[1], &words[2], &words[3]) == 0) return {};
    char text[sizeof words + 1] = {};
    std::memcpy(text, words, sizeof words);
    brand += text;
  }
#elif defined(__aarch64__) && defined(__linux__)
  brand = arm_cores();
  // The register of this core, which the kernel answers for in user programs where it says so.
  constexpr unsigned long kCpuid = 1UL << 11;
  if (brand.empty() && (getauxval(AT_HWCAP) & kCpuid) != 0) {
    std::uint64_t midr = 0;
    __asm__("mrs %0, midr_el1" : "=r"(midr));
    brand = "arm " + arm_core(midr);
  }
#endif
  return brand;
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
  add(features.avx512, "avx512");
  add(features.avx512vnni, "avx512vnni");
  add(features.avx512vbmi, "avx512vbmi");
  add(features.avx512vbmi2, "avx512vbmi2");
  add(features.gfni, "gfni");
  add(features.amx_int8, "amx_int8");
  add(features.neon, "neon");
  add(features.dotprod, "dotprod");
  add(features.i8mm, "i8mm");
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

Isa best_isa() {
  // Without VNNI, products of eight bits are bound below what AVX2's reach, and nobody has measured
  // that row yet: it is there for who asks for it.
  const Isa last = supported_isas().back();
  return last == Isa::Avx512 ? Isa::Avx2 : last;
}

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

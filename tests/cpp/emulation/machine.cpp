// The machine of tests that run on emulated instructions (immintrin.h, amx.hpp). Linked into a test
// it takes the place of the library's detection, so that ADALAYER_FORCE_ISA, force_isa() and the
// kernel table mean the emulated rows.
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "amx.hpp"

#define detect_cpu_features detect_real_machine
#include "core/cpu_detect.cpp"
#undef detect_cpu_features

namespace adalayer {
namespace {

/// ADALAYER_EMULATED_MACHINE=plain: the rows without what newer machines have besides.
bool plain() {
  const char* machine = std::getenv("ADALAYER_EMULATED_MACHINE");
  return machine != nullptr && std::string_view(machine) == "plain";
}

}  // namespace

/// AVX2 itself is left out: the same tests without emulation run it.
CpuFeatures detect_cpu_features() {
  CpuFeatures features;
  if (!detect_real_machine().avx2) return features;
  features.avxvnni = features.avx512 = features.avx512vnni = true;
  if (!plain())
    features.gfni = features.avx512vbmi = features.avx512vbmi2 = features.amx_int8 = true;
  return features;
}

}  // namespace adalayer

namespace {

constexpr int kSkipped = 77;  // SKIP_RETURN_CODE in CMakeLists.txt

[[noreturn]] void leave(int status, const char* why) {
  std::fflush(nullptr);
  std::fprintf(stderr, "emulation: %s\n", why);
  std::_Exit(status);
}

/// Around main(): skips it on machines without AVX2, and fails it if it left tiles configured.
struct Process {
  Process() {
    if (!adalayer::detect_cpu_features().avx512vnni)
      leave(kSkipped, "skipped, instructions in software are made of AVX2's");
  }
  ~Process() {
    if (amx_emulation::configured_threads() != 0)
      leave(1, "FAILED: tiles are still configured, an end() is missing");
    std::printf("%lld tile products were emulated\n", amx_emulation::products());
  }
};
const Process process;

}  // namespace

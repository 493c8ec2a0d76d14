// The machine of tests that run on emulated AMX: this one, and AMX. Linked into a test it takes the
// place of the library's detection, so that ADALAYER_FORCE_ISA=amx, force_isa("amx") and the kernel
// table mean the emulated row.
#include <cstdio>
#include <cstdlib>

#include "amx_emulation.hpp"

#define detect_cpu_features detect_real_machine
#include "core/cpu_detect.cpp"
#undef detect_cpu_features

namespace adalayer {

CpuFeatures detect_cpu_features() {
  CpuFeatures features = detect_real_machine();
  features.amx_int8 = features.avx512vnni && features.gfni;
  // The same tests without emulation run these.
  features.avx2 = features.avxvnni = false;
  return features;
}

}  // namespace adalayer

namespace {

constexpr int kSkipped = 77;  // SKIP_RETURN_CODE in CMakeLists.txt

[[noreturn]] void leave(int status, const char* why) {
  std::fflush(nullptr);
  std::fprintf(stderr, "emulated AMX: %s\n", why);
  std::_Exit(status);
}

/// Around main(): skips it on machines that lack the rest, and fails it if it left tiles configured
/// or multiplied none.
struct Process {
  Process() {
    if (!adalayer::detect_cpu_features().amx_int8)
      leave(kSkipped, "skipped, the kernels need AVX-512-VNNI and GFNI besides");
  }
  ~Process() {
    if (amx_emulation::configured_threads() != 0)
      leave(1, "FAILED: tiles are still configured, an end() is missing");
    if (amx_emulation::products() == 0) leave(1, "no tile was multiplied: that is a failure");
    std::printf("%lld tile products were emulated\n", amx_emulation::products());
  }
};
const Process process;

}  // namespace

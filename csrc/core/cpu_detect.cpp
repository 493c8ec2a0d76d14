// What the processor and the operating system say. Which family is used is decided in
// cpu_features.cpp.
#include "core/cpu_features.hpp"

#if defined(__x86_64__)

#include <cpuid.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace adalayer {
namespace {

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

}  // namespace

CpuFeatures detect_cpu_features() {
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
  features.avx512 = os_avx512 && features.avx2 && bit(b, 16) /* F */ && bit(b, 17) /* DQ */ &&
                    bit(b, 30) /* BW */ && bit(b, 31) /* VL */;
  features.avx512vnni = features.avx512 && bit(c, 11);
  features.avx512vbmi = features.avx512 && bit(c, 1);
  features.avx512vbmi2 = features.avx512 && bit(c, 6);
  features.gfni = features.avx512 && bit(c, 8);
  const bool amx_tile = bit(d, 24);
  const bool amx_int8 = bit(d, 25);
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
    features.avxvnni = features.avx2 && bit(a, 4);
  }
  // Every AMX machine has GFNI; the AMX kernels unpack weights with it.
  features.amx_int8 = os_tiles && amx_tile && amx_int8 && features.gfni && request_amx_permission();
  return features;
}

}  // namespace adalayer

#elif defined(__aarch64__) && defined(__linux__)

#include <sys/auxv.h>

namespace adalayer {

CpuFeatures detect_cpu_features() {
  // From the kernel's asm/hwcap.h, whose older versions lack the later ones.
  constexpr unsigned long kAsimd = 1UL << 1, kAsimdDp = 1UL << 20;  // of AT_HWCAP
  constexpr unsigned long kI8mm = 1UL << 13;                        // of AT_HWCAP2
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  CpuFeatures features;
  features.neon = (first & kAsimd) != 0;
  features.dotprod = features.neon && (first & kAsimdDp) != 0;
  features.i8mm = features.dotprod && (second & kI8mm) != 0;
  return features;
}

}  // namespace adalayer

#else

namespace adalayer {

CpuFeatures detect_cpu_features() { return {}; }

}  // namespace adalayer

#endif

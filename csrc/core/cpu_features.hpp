// What this machine and this build can run, and which of it is in use.
//
// "Supported" means four things together: the CPU reports the instructions (CPUID; on ARM the
// kernel's auxiliary vector, which leaves out what it does not support either), the operating
// system saves the registers (XGETBV), for AMX the kernel grants the process permission, and this
// build contains the kernels.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace adalayer {

struct CpuFeatures {
  bool avx2 = false;         // AVX2 + FMA + F16C
  bool avx512 = false;       // AVX-512 F, BW, DQ and VL
  bool avx512vnni = false;   // the same and VNNI
  bool gfni = false;         // with 512-bit registers: gf2p8affineqb unpacks bit-planes
  bool avx512vbmi = false;   // vpermi2b: 256-entry tables in registers
  bool avx512vbmi2 = false;  // vpexpandb expands bitmask-sparse weights
  bool avxvnni = false;      // VNNI in 256-bit VEX encoding
  bool amx_int8 = false;     // AMX tiles with int8, the permission to use them, and GFNI
  bool neon = false;         // Advanced SIMD of 64-bit ARM
  bool dotprod = false;      // the same with sdot and udot
  bool i8mm = false;         // the same with usmmla and usdot, beside sdot and udot
};

// The instruction-set families of the kernel table, slowest first; x86 and ARM have nothing but
// Scalar in common.
enum class Isa : int {
  Scalar = 0,
  Avx2 = 1,
  AvxVnni = 2,
  Avx512 = 3,
  Avx512Vnni = 4,
  Amx = 5,
  Neon = 6,
  Dotprod = 7,
  I8mm = 8
};
inline constexpr int kIsaCount = 9;

// Detected once, at the first call, which also asks the kernel for the AMX permission (granted
// per process, inherited by threads and forked children).
const CpuFeatures& cpu_features();

// The detection itself, made anew; callers want cpu_features(). It has a source file of its own, so
// that a test can be linked with another machine in its place.
CpuFeatures detect_cpu_features();

// The processor's own name, "" if it has none. ARM's have numbers: "arm 41:d0b r4p1" is
// implementer, part, variant and revision.
std::string cpu_brand();

// Every feature that is present, as "avx2 avx512 ...", for people.
std::string describe_cpu_features();

// "scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "neon", "dotprod", "i8mm": the values
// of ADALAYER_FORCE_ISA.
std::string_view isa_name(Isa isa);

// True if both this machine and this build have it. Scalar always is.
bool isa_supported(Isa isa);

// All supported families, slowest first; never empty.
std::vector<Isa> supported_isas();

// The fastest supported family.
Isa best_isa();

// The family in use: the one forced by force_isa(), else by ADALAYER_FORCE_ISA (read at the first
// use; unset, empty or "auto" means best_isa()). Throws InvalidArgument if the value is unknown,
// Error if the machine or the build lacks it; both messages list what would work. It never falls
// back silently.
Isa active_isa();

// Forces a family by name; "auto" undoes it, and the environment is read again. For tests and
// diagnosis. Throws as active_isa(), and then leaves the choice as it was.
void force_isa(std::string_view name);

}  // namespace adalayer

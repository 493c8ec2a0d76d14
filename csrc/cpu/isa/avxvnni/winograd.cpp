// Winograd with AVX-VNNI: multiplication and addition are one instruction.
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/isa/shared/unrolled.hpp"
#include "cpu/winograd_kernels.hpp"

namespace adalayer::cpu::avxvnni {
namespace {

#include "cpu/isa/avx2/winograd256.inl"

struct Vec : Vec256 {
  static T product(T a, T w) { return _mm256_madd_epi16(a, w); }
  static T dot(T sum, T a, T w) { return _mm256_dpwssd_avx_epi32(sum, a, w); }
};

#include "cpu/isa/shared/winograd.inl"
// Behind which its products come.
#include "cpu/isa/shared/winograd_multiply.inl"

}  // namespace

const WinogradKernels kWinograd = kernels_named("avxvnni");

}  // namespace adalayer::cpu::avxvnni

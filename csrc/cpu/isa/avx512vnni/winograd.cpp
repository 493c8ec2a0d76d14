// Winograd with AVX-512-VNNI: multiplication and addition are one instruction.
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/isa/shared/unrolled.hpp"
#include "cpu/winograd_kernels.hpp"

namespace adalayer::cpu::avx512vnni {
namespace {

#include "cpu/isa/avx512/winograd512.inl"

struct Vec : Vec512 {
  static T product(T a, T w) { return _mm512_madd_epi16(a, w); }
  static T dot(T sum, T a, T w) { return _mm512_dpwssd_epi32(sum, a, w); }
};

#include "cpu/isa/shared/winograd.inl"
// Behind which its products come.
#include "cpu/isa/shared/winograd_multiply.inl"

}  // namespace

const WinogradKernels kWinograd = kernels_named("avx512vnni");

}  // namespace adalayer::cpu::avx512vnni

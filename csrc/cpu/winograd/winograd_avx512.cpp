// Winograd with AVX-512 F and BW, for machines older than VNNI.
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/winograd/kernels.hpp"

namespace adalayer::cpu {
namespace {

#include "cpu/winograd/vec512.inl"

struct Vec : Vec512 {
  static T product(T a, T w) { return _mm512_madd_epi16(a, w); }
  static T dot(T sum, T a, T w) { return add32(sum, product(a, w)); }
};

#include "cpu/winograd/winograd.inl"

}  // namespace

const WinogradKernels kWinogradAvx512 = kernels_named("avx512");

}  // namespace adalayer::cpu

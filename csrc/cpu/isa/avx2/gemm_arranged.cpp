// Matrix product of the AVX2 row with eight-bit weights in the order of arrange.hpp.
#include "cpu/isa/avx2/arrange.hpp"
#include "cpu/isa/avx2/gemm.hpp"
#include "cpu/isa/avx2/passes.hpp"
#include "cpu/isa/avx2/vector.hpp"

namespace adalayer::cpu {
namespace {

#include "cpu/isa/shared/gemm_arranged.inl"

}  // namespace

void gemm_arranged_avx2(const GemmArgs& g) {
  Arranged<Vector256> form(g);
  gemm(g, form);
}

void gemm_requantize_arranged_avx2(const GemmArgs& g, const RequantizeArgs& q,
                                   Requantize requantize) {
  Arranged<Vector256> form(g);
  gemm_requantize(g, q, requantize, form);
}

}  // namespace adalayer::cpu

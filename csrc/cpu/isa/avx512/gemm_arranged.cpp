// Matrix product with AVX-512 without VNNI of eight-bit weights in the order of
// shared/arranged.hpp: the form of AVX2, twice as wide.
#include "cpu/isa/avx2/passes.hpp"
#include "cpu/isa/avx512/avx512.hpp"
#include "cpu/isa/avx512/vector.hpp"
#include "cpu/isa/shared/arranged.hpp"

namespace adalayer::cpu {
namespace {

#include "cpu/isa/shared/gemm_arranged.inl"

}  // namespace

void avx512::gemm_arranged(const GemmArgs& g) {
  Arranged<Vector512> form(g);
  gemm(g, form);
}

}  // namespace adalayer::cpu

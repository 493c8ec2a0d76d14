// The row of AVX2 with FMA; its matrix product is in gemm.cpp.
//
// There is no exact u8 x s8 dot product here: vpmaddubsw adds pairs of products in int16, where two
// products of 8-bit weights may saturate. Narrower weights leave room instead, so that several
// pairs are added before they are widened to int32.
#include <immintrin.h>

#include <cstring>

#include "cpu/isa/shared/unrolled.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace avx2 {
namespace {

#include "cpu/isa/avx2/bytes256.inl"

struct Dot256 : Bytes256 {
  /// As many as an int16 holds, but no more than the vectors of a tile.
  template <int kBits>
  static constexpr int kRun = kBits >= 7   ? 1
                              : kBits == 2 ? 16
                                           : 1 << (7 - kBits);
  static T product(T a, T w) { return _mm256_maddubs_epi16(a, w); }
  static T add_products(T p, T q) { return _mm256_add_epi16(p, q); }
  static T add_to(T sum, T products) {
    return add(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
  static T dot(T sum, T a, T w) { return add_to(sum, product(a, w)); }
};

// Weights that need eight bits are arranged, and gemm has them: bytes are unpacked narrower ones.
void gemv(const GemvArgs& g) { gemv_planar<Dot256>(g); }

}  // namespace
}  // namespace avx2

const KernelRow kAvx2Row{.name = "avx2",
                         .isa = Isa::Avx2,
                         .quantize_row = avx2::quantize_row,
                         .quantize_planar = avx2::quantize_planar,
                         .fake_quantize = avx2::fake_quantize,
                         .unpack_tiles = avx2::unpack_tiles,
                         .gemm = gemm_avx2,
                         .gemm_requantize = gemm_requantize_avx2,
                         .gemm_rows = kGemmRows,
                         .gemv = avx2::gemv,
                         .arrangement = &kAvx2Arrangement,
                         .store = avx2::store,
                         .requantize = requantize_avx2,
                         .grouped = &avx2::kGrouped,
                         .winograd = &avx2::kWinograd,
                         .image = &kAvx2Image};

}  // namespace adalayer::cpu

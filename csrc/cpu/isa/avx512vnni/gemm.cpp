// Matrix products with AVX-512-VNNI.
#include <immintrin.h>

#include <cstring>

#include "cpu/isa/avx512vnni/avx512vnni.hpp"
#include "cpu/isa/shared/unrolled.hpp"

namespace adalayer::cpu::avx512vnni {
namespace {

#include "cpu/isa/avx512/bytes512.inl"
#include "cpu/isa/shared/planar.inl"
#include "cpu/isa/shared/vnni_gemm.inl"

struct Vnni512 : Bytes512 {
  static constexpr int kSums = 28;
  template <int kBits>
  static constexpr int kRun = 1;
  static T dot(T sum, T a, T w) { return _mm512_dpbusd_epi32(sum, a, w); }
};

// 14 rows x 2 tiles of sums, two vectors of weights and one of activations: 31 of 32 registers.
constexpr int kPassRows = 14;
struct Lookup {
  explicit Lookup(const uint8_t*) {}
  __m512i operator()(__m512i q) const { return q; }
};

}  // namespace

#include "cpu/isa/avx512/requantize.inl"

namespace {

/// Whole rows of two tiles, the common case: no row is asked whether it is kept.
template <int kFlags>
void gemm_requantize_whole(const GemmArgs& g, const RequantizeArgs& args) {
  const int8_t* weights[2] = {g.tile0, g.tile1};
  alignas(64) int32_t sums[kPassRows * kBlockCols];
  RequantizeArgs q = args;
  q.sums = sums;
  q.tiles = 2;
  const Lookup no_table(nullptr);
  const Rows<2, kFlags | kEvery> pass(q, no_table);
  for_passes<kPassRows>(g.rows, [&](int row, int rows) {
    gemm_rows<Vnni512, kPassRows, 2>(g, weights, row, rows, sums, kBlockCols);
    q.rows = rows;
    q.out_offset = args.out_offset + row;
    if constexpr ((kFlags & kResidual) != 0) q.residual_offset = args.residual_offset + row;
    pass.all();
  });
}

}  // namespace

void gemm(const GemmArgs& g) {
  const int8_t* tiles[2] = {g.tile0, g.tile1};
  if (g.tile1 != nullptr)
    gemm_passes<Vnni512, kPassRows, 2>(g, tiles, g.sums);
  else
    gemm_passes<Vnni512, kPassRows, 1>(g, tiles, g.sums);
}

void gemm_requantize(const GemmArgs& g, const RequantizeArgs& q, Requantize requantize) {
  const ConvEpilogue& e = *q.epilogue;
  const int8_t* tiles[2] = {g.tile0, g.tile1};
  if (g.tile1 == nullptr)
    return gemm_requantize_passes<Vnni512, kPassRows, 1>(g, tiles, q, requantize);
  if ((!q.whole && q.cols < kBlockCols) || e.finish.table != nullptr || !e.bounded)
    return gemm_requantize_passes<Vnni512, kPassRows, 2>(g, tiles, q, requantize);
  const U8Finish& f = e.finish;
  const bool plain = e.correction == nullptr && f.zero_point == 0 && f.lo == 0.0f && f.hi == 255.0f;
  constexpr int kFull = kCorrection | kLevels;
  if (q.residual != nullptr)
    plain ? gemm_requantize_whole<kResidual>(g, q) : gemm_requantize_whole<kResidual | kFull>(g, q);
  else
    plain ? gemm_requantize_whole<0>(g, q) : gemm_requantize_whole<kFull>(g, q);
}

void gemv(const GemvArgs& g) { gemv_planar<Vnni512>(g); }

}  // namespace adalayer::cpu::avx512vnni

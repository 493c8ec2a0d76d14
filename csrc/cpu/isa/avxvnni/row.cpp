// AVX2 with VNNI in 256-bit encoding, on client processors without AVX-512: vpdpbusd sums four
// u8 x s8 products into int32 exactly, 32 of them at once.
#include <immintrin.h>

#include <cstring>

#include "cpu/isa/shared/unrolled.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace avxvnni {
namespace {

#include "cpu/isa/avx2/bytes256.inl"
#include "cpu/isa/shared/vnni_gemm.inl"

struct Vnni256 : Bytes256 {
  static constexpr int kSums = 12;
  template <int kBits>
  static constexpr int kRun = 1;
  static T dot(T sum, T a, T w) { return _mm256_dpbusd_avx_epi32(sum, a, w); }
};

// 6 rows x one tile (two vectors of sums): 15 of 16 registers.
constexpr int kPassRows = 6;

void gemm(const GemmArgs& g) {
  for (int c = 0; c < 2; ++c) {
    const int8_t* tile = c == 0 ? g.tile0 : g.tile1;
    if (tile == nullptr) continue;
    const int8_t* halves[2] = {tile, tile + Vnni256::kBytes};
    gemm_passes<Vnni256, kPassRows, 2>(g, halves, g.sums + c * formats::kTileWidth);
  }
}

void gemm_requantize(const GemmArgs& g, const RequantizeArgs& q, Requantize requantize) {
  for (int c = 0; c < 2; ++c) {
    const int8_t* tile = c == 0 ? g.tile0 : g.tile1;
    const int first = c * formats::kTileWidth;
    if (tile == nullptr) continue;
    const int8_t* halves[2] = {tile, tile + Vnni256::kBytes};
    RequantizeArgs half = q;
    half.cols = q.cols - first < formats::kTileWidth ? q.cols - first : formats::kTileWidth;
    half.channel += first;
    half.out += first;
    if (q.residual != nullptr) half.residual += first;
    gemm_requantize_passes<Vnni256, kPassRows, 2>(g, halves, half, requantize);
  }
}

void gemv(const GemvArgs& g) { gemv_planar<Vnni256>(g); }

}  // namespace
}  // namespace avxvnni

const KernelRow kAvxVnniRow{.name = "avxvnni",
                            .isa = Isa::AvxVnni,
                            .quantize_row = avxvnni::quantize_row,
                            .quantize_planar = avxvnni::quantize_planar,
                            .fake_quantize = avxvnni::fake_quantize,
                            .unpack_tiles = avxvnni::unpack_tiles,
                            .gemm = avxvnni::gemm,
                            .gemm_requantize = avxvnni::gemm_requantize,
                            .gemv = avxvnni::gemv,
                            .store = avxvnni::store,
                            .requantize = requantize_avx2,
                            .grouped = &avx2::kGrouped,
                            .winograd = &avxvnni::kWinograd,
                            .image = &kAvx2Image};

}  // namespace adalayer::cpu

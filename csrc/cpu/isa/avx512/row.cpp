// AVX-512 without VNNI (Skylake-X): the products are those of AVX2, twice as wide.
#include "cpu/isa/avx512/avx512.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {

const KernelRow kAvx512Row{
    .name = "avx512",
    .isa = Isa::Avx512,
    .quantize_row = avx512::quantize_row,
    .quantize_planar = avx512::quantize_planar,
    .fake_quantize = avx512::fake_quantize,
    .unpack_tiles = avx512::unpack_tiles,
    .gemm = avx512::gemm,
    .gemm_rows = 48,  // several passes of the most
    .gemv = avx512::gemv,
    .arrangement = &kAvx512Arrangement,
    .store = avx512::store,
    .requantize = avx512::requantize,
    .stem = {avx512::quantize_quads, avx512::interleave_pairs, avx512::interleave_fours},
    .grouped = &avx512::kGrouped,
    .winograd = &avx512::kWinograd,
    .image = &kAvx512Image};

}  // namespace adalayer::cpu

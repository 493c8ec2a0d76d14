// AVX-512 with VNNI: vpdpbusd sums four u8 x s8 products into int32 exactly, 64 of them at once.
#include "cpu/isa/avx512/avx512.hpp"
#include "cpu/isa/avx512vnni/avx512vnni.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {

const KernelRow kAvx512VnniRow{
    .name = "avx512vnni",
    .isa = Isa::Avx512Vnni,
    .quantize_row = avx512::quantize_row,
    .quantize_planar = avx512::quantize_planar,
    .fake_quantize = avx512::fake_quantize,
    .unpack_tiles = avx512::unpack_tiles,
    .gemm = avx512vnni::gemm,
    .gemm_requantize = avx512vnni::gemm_requantize,
    .gemv = avx512vnni::gemv,
    .store = avx512::store,
    .requantize = avx512::requantize,
    .stem = {avx512::quantize_quads, avx512::interleave_pairs, avx512::interleave_fours},
    .grouped = &avx512vnni::kGrouped,
    .winograd = &avx512vnni::kWinograd,
    .image = &kAvx512Image};

}  // namespace adalayer::cpu

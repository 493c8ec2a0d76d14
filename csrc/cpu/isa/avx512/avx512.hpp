// Kernels of the AVX-512 row, most of which the rows of AVX-512-VNNI and AMX share.
#pragma once

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu::avx512 {

void quantize_row(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q);
void quantize_planar(const float* x, int64_t channel_stride, int64_t channels, int64_t w,
                     const ActivationGrid& grid, uint8_t* q);
void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y);
void unpack_tiles(const uint8_t* packed, int bits, int64_t count, int8_t* out);
void gemm(const GemmArgs& g);
/// Of eight-bit weights in the order of kAvx512Arrangement.
void gemm_arranged(const GemmArgs& g);
void gemv(const GemvArgs& g);
void store(const StoreArgs& s);
void requantize(const RequantizeArgs& args);
void quantize_quads(const float* x, int64_t channel_stride, int64_t channels, int64_t w,
                    const ActivationGrid& grid, uint32_t* quads);
void interleave_pairs(const uint32_t* first, const uint32_t* second, int64_t n, uint8_t* out);
void interleave_fours(const uint32_t* const* lines, int64_t n, uint8_t* out);

}  // namespace adalayer::cpu::avx512

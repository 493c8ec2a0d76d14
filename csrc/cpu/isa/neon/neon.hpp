// What the ARM rows have in common: everything but the products of bytes, and of those a matrix
// times a vector from dotprod on.
#pragma once

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu::neon {

void quantize_row(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q);
void quantize_planar(const float* x, int64_t channel_stride, int64_t channels, int64_t w,
                     const ActivationGrid& grid, uint8_t* q);
void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y);
void unpack_tiles(const uint8_t* packed, int bits, int64_t count, int8_t* out);
void store(const StoreArgs& s);
void requantize(const RequantizeArgs& args);

void gemm(const GemmArgs& g);
void gemv(const GemvArgs& g);

// WinogradByteKernels::input of cells that lie behind each other, and of those of 8 channels of two
// tiles beside each other.
void winograd_byte_input(const WinogradByteInputArgs& a);
void winograd_byte_input_of_two(const WinogradByteInputArgs& a);

}  // namespace adalayer::cpu::neon

namespace adalayer::cpu::dotprod {

void gemv(const GemvArgs& g);

}  // namespace adalayer::cpu::dotprod

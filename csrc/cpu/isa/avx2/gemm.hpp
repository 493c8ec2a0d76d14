// The forms of the AVX2 row's matrix product.
#pragma once

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {

/// KernelRow::gemm and gemm_requantize of eight-bit weights in the order of arrange.hpp.
void gemm_arranged_avx2(const GemmArgs& g);
void gemm_requantize_arranged_avx2(const GemmArgs& g, const RequantizeArgs& q,
                                   Requantize requantize);

/// The same for few steps, with sums that never leave their registers. Returns false, and does
/// nothing, where the tiles have no such weights (ArrangedTable::plain_form).
bool gemm_requantize_short_avx2(const GemmArgs& g, const RequantizeArgs& q, Requantize requantize);

}  // namespace adalayer::cpu

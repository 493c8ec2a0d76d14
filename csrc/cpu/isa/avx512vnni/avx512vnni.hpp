// Kernels of the AVX-512-VNNI row that the AMX row shares: every AMX machine has AVX-512-VNNI.
#pragma once

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu::avx512vnni {

void gemm(const GemmArgs& g);
void gemm_requantize(const GemmArgs& g, const RequantizeArgs& q, Requantize requantize);
void gemv(const GemvArgs& g);

}  // namespace adalayer::cpu::avx512vnni

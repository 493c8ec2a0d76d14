// Packed weights of linear layers with float activations, made on the host.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cuda/kernels.hpp"

namespace adalayer::cuda {

struct LinearWeights {
  int bits = 0;
  int64_t out_features = 0, in_features = 0;
  int32_t units = 0;            // along the input features
  std::vector<uint8_t> packed;  // [out / 16][units][linear_unit_bytes(bits)]
};

/// From canonical weights of a linear layer (a 1 x 1 kernel). Throws CorruptData, InvalidArgument.
LinearWeights pack_linear(std::span<const uint8_t> canonical);

/// columns: of 8 rows of x that a block multiplies at once, 1 or 4.
KernelInfo linear_kernel(int bits, bool bfloat, int columns);

}  // namespace adalayer::cuda

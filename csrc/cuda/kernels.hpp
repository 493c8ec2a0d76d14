// The kernels as launches see them: an address, and what a launch of it needs.
#pragma once

#include <cstdint>

#include "cuda/tiles.hpp"

namespace adalayer::cuda {

/// Kernels with one form.
enum class Kernel : int {
  Quantize,
  Dequantize,
  OnGrid,
  Lookup,
  Pair,
  Affine,
  Move,
  Pool,
  PoolLarge,
  Bilinear,
  LayerNorm,
  Attention,
  AverageFloats,
  ResizeFloats,
  Softmax,
  FunctionFloats,
  CombineFloats,
  AffineImage,
  GroupNorm,
  Depthwise,
  Direct,
};

struct KernelInfo {
  const void* function = nullptr;  // null: there is no such form
  int threads = 0;
  int shared_bytes = 0;
};
KernelInfo kernel_info(Kernel kernel);

/// bits: of the packed weights. piece: 16, or 8 and 4 (TileShape::has_small_pieces). The function
/// is null where the tile has no such form.
KernelInfo conv_kernel(int bits, Tile tile, int piece, Form form);

}  // namespace adalayer::cuda

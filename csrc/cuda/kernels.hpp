// The kernels as launches see them: an address, and what a launch of it needs.
#pragma once

#include <cstdint>

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

/// How the weights of a convolution on tensor cores lie.
enum class Form : int {
  Dense,
  Blocks,      // cells of 16 channels x 64 values that are all zero are left out
  Structured,  // two of four neighbours in the reduction, for sparse tensor cores
};
constexpr int kForms = 3;

/// Kernels of the convolution on tensor cores: channels x positions of a block.
constexpr int kTiles = 8;
struct TileSize {
  const char* name;
  int channels, positions, threads;
  int blocks;  // that the registers of a multiprocessor hold
  bool group;  // instructions of four warps (conv_group.cuh): Machine::group_products alone
};
constexpr TileSize kTileSizes[kTiles] = {
    {"mma 128x128", 128, 128, 128, 2, false},  {"mma 128x256", 128, 256, 256, 1, false},
    {"mma 64x128", 64, 128, 128, 3, false},    {"mma 64x64", 64, 64, 128, 4, false},
    {"mma 256x16", 256, 16, 128, 4, false},    {"mma 64x256", 64, 256, 256, 2, false},
    {"wgmma 128x256", 128, 256, 256, 1, true}, {"wgmma 128x128", 128, 128, 256, 2, true},
};

/// bits: of the packed weights. piece: 16, or 8 and 4 (then 8 bits, dense and the tile of 64 x 128
/// only). Not every form has every tile.
KernelInfo conv_kernel(int bits, int tile, int piece, Form form);

}  // namespace adalayer::cuda

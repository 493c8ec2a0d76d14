// The tiles of the convolution on tensor cores, in one table: kernels are instances of it, and
// plans choose in it.
#pragma once

#include "cuda/packing.hpp"

namespace adalayer::cuda {

/// How the weights of a convolution on tensor cores lie.
enum class Form : int {
  Dense,
  Blocks,      // cells of 16 channels x 64 values that are all zero are left out
  Structured,  // two of four neighbours in the reduction, for sparse tensor cores
};
constexpr int kForms = 3;

/// Channels x positions that a block of threads computes. The order is that of kTileShapes.
enum class Tile : int {
  Mma128x128,
  Mma128x256,
  Mma64x128,
  Mma64x64,
  Mma256x16,
  Mma64x256,
  Wgmma128x256,
  Wgmma128x128,
};

struct TileShape {
  const char* name;
  int warps_m, warps_n;  // warps of 64 channels x 8 * columns positions each
  int columns;
  int stages;  // of the pipeline that fills shared memory
  int blocks;  // that the registers of a multiprocessor hold
  bool group;  // instructions of four warps (conv_group.cuh): Machine::group_products alone
  // Forms beside the dense one. Skipped cells need tiles of one warp's channels: the steps of those
  // are a list of their own.
  bool has_blocks, has_structured;
  bool has_small_pieces;  // inputs of 4 and 8 bytes per pixel; with weights of 8 bits

  constexpr int channels() const { return kBlockChannels * warps_m; }
  constexpr int positions() const { return 8 * columns * warps_n; }
  constexpr int threads() const { return 32 * warps_m * warps_n; }
};

// clang-format off
inline constexpr TileShape kTileShapes[] = {
    //              warps_m, _n, columns, stages, blocks, group, has_blocks, _structured, _small_pieces
    {"mma 128x128",       2,  2,       8,      3,      2, false,      false,        true,         false},
    {"mma 128x256",       2,  4,       8,      3,      1, false,      false,       false,         false},
    {"mma 64x128",        1,  4,       4,      4,      3, false,       true,        true,          true},
    {"mma 64x64",         1,  4,       2,      4,      4, false,       true,       false,         false},
    {"mma 256x16",        4,  1,       2,      4,      4, false,      false,       false,         false},
    {"mma 64x256",        1,  8,       4,      3,      2, false,      false,       false,         false},
    {"wgmma 128x256",     2,  4,       8,      4,      1,  true,      false,       false,         false},
    {"wgmma 128x128",     2,  4,       4,      4,      2,  true,      false,       false,         false},
};
// clang-format on
constexpr int kTiles = sizeof kTileShapes / sizeof *kTileShapes;
static_assert(kTiles == static_cast<int>(Tile::Wgmma128x128) + 1);

constexpr const TileShape& shape_of(Tile tile) { return kTileShapes[static_cast<int>(tile)]; }

}  // namespace adalayer::cuda

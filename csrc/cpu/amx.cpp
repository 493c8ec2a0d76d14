// AMX int8: tdpbusd multiplies a 16 x 64 tile of u8 by a 64 x 16 tile of s8 into 16 x 16 int32.
#include <immintrin.h>

#include "cpu/avx512.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace amx {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

/// All eight tiles are full (16 rows of 64 bytes): a product costs the same whatever its row count.
constexpr TileConfig full_tiles() {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = 16;
  }
  return config;
}
// A constant in memory: the intrinsic tells g++ 12 about eight of its 64 bytes only, so stores to a
// local would be dropped.
constinit const TileConfig kFullTiles = full_tiles();

void begin() { _tile_loadconfig(&kFullTiles); }

/// Released before returning to the caller: oneDNN shares the thread and wants its own.
void end() { _tile_release(); }

// The tile intrinsics of g++ 12 carry no memory clobber; without the barriers a load could move
// above the stores that fill the unpacked weights.
inline void compiler_barrier() { __asm__ volatile("" ::: "memory"); }

// Tiles: 0..3 sums, 4..5 activations, 6..7 weights.
void gemm(const GemmArgs& g) {
  const bool two_rows = g.rows > 16, two_cols = g.tile1 != nullptr;
  const int64_t stride = g.row_stride;
  compiler_barrier();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (two_rows && two_cols) {
    for (int64_t s = 0; s < g.steps; ++s) {
      const uint8_t* a = g.activations + g.step_offsets[s];
      _tile_loadd(4, a, stride);
      _tile_loadd(6, g.tile0 + s * formats::kTileBytes, 64);
      _tile_loadd(7, g.tile1 + s * formats::kTileBytes, 64);
      _tile_loadd(5, a + 16 * stride, stride);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  } else if (two_cols) {
    for (int64_t s = 0; s < g.steps; ++s) {
      _tile_loadd(4, g.activations + g.step_offsets[s], stride);
      _tile_loadd(6, g.tile0 + s * formats::kTileBytes, 64);
      _tile_loadd(7, g.tile1 + s * formats::kTileBytes, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
    }
  } else if (two_rows) {
    for (int64_t s = 0; s < g.steps; ++s) {
      const uint8_t* a = g.activations + g.step_offsets[s];
      _tile_loadd(4, a, stride);
      _tile_loadd(5, a + 16 * stride, stride);
      _tile_loadd(6, g.tile0 + s * formats::kTileBytes, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(2, 5, 6);
    }
  } else {
    for (int64_t s = 0; s < g.steps; ++s) {
      _tile_loadd(4, g.activations + g.step_offsets[s], stride);
      _tile_loadd(6, g.tile0 + s * formats::kTileBytes, 64);
      _tile_dpbusd(0, 4, 6);
    }
  }
  constexpr int64_t kRowBytes = kBlockCols * sizeof(int32_t);
  _tile_stored(0, g.sums, kRowBytes);
  if (two_cols) _tile_stored(1, g.sums + 16, kRowBytes);
  if (two_rows) _tile_stored(2, g.sums + 16 * kBlockCols, kRowBytes);
  if (two_rows && two_cols) _tile_stored(3, g.sums + 16 * kBlockCols + 16, kRowBytes);
  compiler_barrier();
}

}  // namespace
}  // namespace amx

const KernelRow kAmxRow{"amx",
                        Isa::Amx,
                        avx512::quantize_row,
                        avx512::quantize_planar,
                        avx512::fake_quantize,
                        avx512::unpack_tiles,
                        amx::begin,
                        amx::end,
                        amx::gemm,
                        avx512::gemv,
                        avx512::store,
                        avx512::depthwise};

}  // namespace adalayer::cpu

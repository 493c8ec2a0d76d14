// AMX tiles in software, for tests of the AMX kernels on machines without AMX.
//
// The intrinsics of tiles become functions here (immintrin.h includes this header). They follow
// Intel's Software Developer's Manual, volume 2, for palette 1: eight tiles per thread of up to 16
// rows of 64 bytes. Differences are on the strict side:
//
// - What faults on hardware (#UD, #GP) throws Fault, with the reason.
// - Configuring and releasing fill the tiles with a pattern, where hardware zeroes them: a kernel
//   that forgot to zero its sums has wrong ones at its first product already.
// - Configuring twice without a release in between throws: somebody's end() is missing.
// - start_row, by which an interrupted load is resumed, must be 0.
//
// What stays unseen is the compiler's business: the real intrinsics of g++ do not say that they
// read memory, so that loads could move above stores there, and here they cannot.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace amx_emulation {

struct Fault : std::logic_error {
  using std::logic_error::logic_error;
};

/// What LDTILECFG reads.
struct Config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

void load_config(const void* config);
void release();
void zero(int tile);
void load(int tile, const void* base, std::ptrdiff_t stride);
void store(int tile, void* base, std::ptrdiff_t stride);
/// sums[m][n] += the dot product of u8 levels[m][4k..] and s8 weights[k][4n..] over all k, in
/// int32.
void dot_u8_s8(int sums, int levels, int weights);

/// Tile products of all threads so far.
long long products();
/// Threads that have configured their tiles and not released them.
int configured_threads();

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig(config) ::amx_emulation::load_config(config)
#define _tile_release() ::amx_emulation::release()
#define _tile_zero(tile) ::amx_emulation::zero(tile)
#define _tile_loadd(tile, base, stride) ::amx_emulation::load(tile, base, stride)
#define _tile_stored(tile, base, stride) ::amx_emulation::store(tile, base, stride)
#define _tile_dpbusd(sums, levels, weights) ::amx_emulation::dot_u8_s8(sums, levels, weights)

// A kernel that comes to use another one does not compile until it is emulated too.
#undef _tile_stream_loadd
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbuud

// The AMX half of the probe: the inner loop of a matrix product with operands in the first cache.
// The tile loads matter: products alone keep their pace beside a busy neighbour, while loads and
// with them every real layer take two to three times as long.
#include <immintrin.h>

#include "cpu/probe.hpp"

namespace adalayer::cpu {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
// A constant in memory: the intrinsic tells g++ 12 about eight of its 64 bytes only.
constinit const TileConfig kFullTiles;

constexpr int64_t kTile = 1024;
constexpr int64_t kOperands = 16 * kTile;
alignas(4096) constinit uint8_t operands[kOperands];

}  // namespace

void probe_amx(int64_t products) {
  _tile_loadconfig(&kFullTiles);
  for (int64_t i = 0; i < products; i += 4) {
    const uint8_t* tiles = operands + i * kTile % kOperands;
    _tile_loadd(4, tiles, 64);
    _tile_loadd(5, tiles + kTile, 64);
    _tile_loadd(6, tiles + 2 * kTile, 64);
    _tile_loadd(7, tiles + 3 * kTile, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}

}  // namespace adalayer::cpu

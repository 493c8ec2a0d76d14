#include "amx.hpp"

#include <atomic>
#include <cstring>
#include <string>

namespace amx_emulation {
namespace {

constexpr int kTiles = 8;
constexpr int kRows = 16;
constexpr int kRowBytes = 64;
constexpr int kPoison = 0xA5;

std::atomic<long long> g_products{0};
std::atomic<int> g_configured{0};

struct Tile {
  int rows, row_bytes;  // as configured; 0 and 0: not in use
  alignas(64) uint8_t data[kRows][kRowBytes];
};

struct State {
  bool configured = false;
  Tile tiles[kTiles] = {};
};
constinit thread_local State state;

[[noreturn]] void fault(const std::string& what) { throw Fault("emulated AMX: " + what); }

std::string shape(const Tile& t) {
  return std::to_string(t.rows) + " x " + std::to_string(t.row_bytes) + " bytes";
}

Tile& tile_in_use(int tile) {
  if (tile < 0 || tile >= kTiles) fault("there is no tile " + std::to_string(tile));
  if (!state.configured) fault("tile " + std::to_string(tile) + " is used without configuration");
  if (state.tiles[tile].rows == 0) fault("tile " + std::to_string(tile) + " is not configured");
  return state.tiles[tile];
}

/// Rows and bytes of a row beyond the configured ones are zero after every write to a tile.
void clear(Tile& t) { std::memset(t.data, 0, sizeof t.data); }

void set_configured(bool configured) {
  if (configured != state.configured) g_configured += configured ? 1 : -1;
  state.configured = configured;
  for (Tile& t : state.tiles) {
    t.rows = t.row_bytes = 0;
    std::memset(t.data, kPoison, sizeof t.data);
  }
}

}  // namespace

void load_config(const void* memory) {
  Config c;
  std::memcpy(&c, memory, sizeof c);
  if (c.palette == 0) return set_configured(false);
  if (c.palette != 1) fault("there is no palette " + std::to_string(c.palette));
  if (c.start_row != 0) fault("start_row is " + std::to_string(c.start_row) + ", not 0");
  for (const uint8_t byte : c.reserved)
    if (byte != 0) fault("a reserved byte of the configuration is not 0");
  for (int t = 0; t < kRows; ++t) {
    const auto refuse = [t](const char* what) {
      fault("the configuration of tile " + std::to_string(t) + what);
    };
    if (t >= kTiles && (c.rows[t] != 0 || c.row_bytes[t] != 0)) refuse(" must be 0");
    if (c.rows[t] > kRows || c.row_bytes[t] > kRowBytes) refuse(" is too large");
    if ((c.rows[t] == 0) != (c.row_bytes[t] == 0)) refuse(" has rows or columns alone");
  }
  if (state.configured) fault("the tiles are configured already, and were not released");
  set_configured(true);
  for (int t = 0; t < kTiles; ++t) {
    state.tiles[t].rows = c.rows[t];
    state.tiles[t].row_bytes = c.row_bytes[t];
  }
}

void release() { set_configured(false); }

void zero(int tile) { clear(tile_in_use(tile)); }

void load(int tile, const void* base, std::ptrdiff_t stride) {
  Tile& t = tile_in_use(tile);
  clear(t);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], static_cast<const uint8_t*>(base) + r * stride,
                static_cast<size_t>(t.row_bytes));
}

void store(int tile, void* base, std::ptrdiff_t stride) {
  const Tile& t = tile_in_use(tile);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, t.data[r],
                static_cast<size_t>(t.row_bytes));
}

void dot_u8_s8(int sums, int levels, int weights) {
  Tile& c = tile_in_use(sums);
  const Tile& a = tile_in_use(levels);
  const Tile& b = tile_in_use(weights);
  if (sums == levels || sums == weights || levels == weights)
    fault("a product needs three different tiles");
  if (a.row_bytes % 4 != 0 || b.row_bytes % 4 != 0 || c.row_bytes % 4 != 0)
    fault("rows of a product must be multiples of 4 bytes");
  if (c.rows != a.rows || c.row_bytes != b.row_bytes || a.row_bytes / 4 != b.rows)
    fault("shapes do not fit: sums " + shape(c) + ", levels " + shape(a) + ", weights " + shape(b));
  const int columns = c.row_bytes / 4;
  Tile result{.rows = c.rows, .row_bytes = c.row_bytes, .data = {}};
  for (int m = 0; m < c.rows; ++m) {
    uint32_t row[kRowBytes / 4] = {};  // the instruction does not saturate: sums wrap
    std::memcpy(row, c.data[m], static_cast<size_t>(c.row_bytes));
    for (int k = 0; k < b.rows; ++k)
      for (int n = 0; n < columns; ++n) {
        int dot = 0;
        for (int i = 0; i < 4; ++i)
          dot += a.data[m][4 * k + i] * static_cast<int8_t>(b.data[k][4 * n + i]);
        row[n] += static_cast<uint32_t>(dot);
      }
    std::memcpy(result.data[m], row, static_cast<size_t>(c.row_bytes));
  }
  c = result;
  g_products.fetch_add(1, std::memory_order_relaxed);
}

long long products() { return g_products; }
int configured_threads() { return g_configured; }

}  // namespace amx_emulation

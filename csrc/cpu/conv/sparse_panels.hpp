// Panels that leave zeros out: whole tiles (blocks), or single weights behind a bitmask.
//
// Which form runs is the clock's choice (algorithms/sparse_panels.cpp says which are tried). Sums
// are the same in all of them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace adalayer::cpu {

struct ConvPlan;

enum class Panels : uint8_t {
  Dense,    // all tiles
  Blocks,   // the tiles that are not all zero; each column tile has a list of the steps it has
  Bitmask,  // tiles as mask and nonzeros (formats/panels.hpp), expanded where they are read
};

/// How the tiles of one convolution are stored where not all are dense; [group][column tile].
struct SparsePanels {
  struct List {
    int32_t first = 0, count = 0;  // in `steps`
  };
  Panels kind = Panels::Blocks;
  // [column tiles of all groups + 1] where a column tile's panel begins: Blocks in tiles, Bitmask
  // in bytes.
  std::vector<int64_t> at;
  std::vector<int64_t> extra;  // Blocks: what arranged 8-bit panels have more by then; may be empty
  std::vector<int32_t> steps;  // Blocks: step numbers, list after list
  std::vector<List> lists;     // Blocks: [column tiles of all groups]
  std::vector<uint8_t> joint;  // Blocks: [pairs] both tiles have one list and are read together
  int64_t products = 0;        // Blocks: quads of bytes times column tiles that are multiplied
  int64_t stored_tiles = 0;    // Blocks: tiles in memory
  int64_t tiles = 0;           // of the dense panels

  /// Byte where column tile `tile` begins, in panels of `bits`.
  int64_t byte(int64_t tile, int bits) const {
    if (kind == Panels::Bitmask) return at[tile];
    return at[tile] * 128 * bits + (bits == 8 && !extra.empty() ? extra[tile] : 0);
  }
  /// Of what pack_sparse() writes.
  int64_t bytes(int bits) const { return byte(static_cast<int64_t>(at.size()) - 1, bits); }
  /// Kept beside it.
  int64_t table_bytes() const {
    return static_cast<int64_t>((at.size() + extra.size()) * 8 + steps.size() * 4 +
                                lists.size() * 8 + joint.size());
  }
};

/// Quads times column tiles that the dense panels multiply.
int64_t dense_products(const ConvPlan& plan);

/// The blocks of `weights` [O][I/groups][KH][KW] that hold anything.
SparsePanels plan_blocks(const ConvPlan& plan, std::span<const int8_t> weights);

/// The same weights behind bitmasks.
SparsePanels plan_bitmask(const ConvPlan& plan, std::span<const int8_t> weights, int bits);

/// Writes what `sparse` plans, sparse.bytes(bits) of it. `bits` of a bitmask are what it was
/// planned with; those of blocks may be more than the weights need.
void pack_sparse(const ConvPlan& plan, const SparsePanels& sparse, std::span<const int8_t> weights,
                 int bits, uint8_t* out);

}  // namespace adalayer::cpu

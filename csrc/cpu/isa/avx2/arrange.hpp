// Eight-bit weights of one column tile in the order in which the AVX2 product reads them.
//
// A quad is four levels and their weights for 16 columns, in two halves of 8 columns. Whether its
// products may be added up in int16 depends on the weights and on the largest level (gemm.cpp), so
// the live quads of each half are sorted by that, once, when the weights are packed. Those of zeros
// alone are left out.
//
//   slots   [steps * 16] of 64 bytes: slot i holds the i-th quad of half 0, then that of half 1
//   tables  one for each half: the counts of each kind, then for every slot its quad's number,
//           step * 16 + quad within the step, and above it, in bits 30 and 31, the order of its
//           four levels, in which its weights lie
//   short   where there are few steps: the live quads in their own order, which are used where the
//           lists would save nothing. In bytes, 64 of them, if int16 holds the sum of each pair of
//           products; else in 16 bits, 128 bytes: weights of the levels 0 and 2 of all sixteen
//           columns, then of the levels 1 and 3.
#pragma once

#include <cstdint>

#include "formats/panels.hpp"

// For files with instruction-set flags: nothing in here may be one function for the whole program.
namespace adalayer::cpu {
namespace {

/// How a tile of few steps is multiplied.
enum class ShortForm : uint32_t { None, Bytes, Words };

/// Kinds of quads, in this order.
struct ArrangedTable {
  uint32_t four;         // four in a row have sums that int16 holds together; a multiple of 4
  uint32_t paired;       // the same of two; an even number
  uint32_t mixed;        // as paired, but the second one's levels have another order
  uint32_t whole;        // int16 holds the sum of each pair of products
  uint32_t ordered;      // as whole, in another order
  uint32_t wide;         // neither: the weights are multiplied in 16 bits
  ShortForm short_form;  // of the tile, in both halves' tables
  uint32_t unused[9];

  const uint32_t* quads() const { return reinterpret_cast<const uint32_t*>(this + 1); }
  uint32_t* quads() { return reinterpret_cast<uint32_t*>(this + 1); }
};
static_assert(sizeof(ArrangedTable) == 64);

constexpr int kQuadsPerStep = 16;
constexpr int kOrderBit = 30;
constexpr uint32_t kQuadMask = (1u << kOrderBit) - 1;

/// How the four levels of a quad become pairs: 0 1 and 2 3, or 0 2 and 1 3, or 0 3 and 1 2.
constexpr int kOrders = 3;
/// vpshufb controls of one 128-bit lane.
alignas(16) constexpr uint8_t kOrder[kOrders][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15},
    {0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10, 12, 15, 13, 14}};

constexpr int64_t arranged_table_bytes(int64_t steps) {
  return static_cast<int64_t>(sizeof(ArrangedTable)) + steps * kQuadsPerStep * 4;
}

// A reduction of at most so many steps may have a short form: there a quad more or less in int16
// matters less than to have neither lists nor the sums in memory.
constexpr int64_t kMostShortSteps = 2;
constexpr int kWideQuadBytes = 2 * formats::kTileWidth * 4;

/// What follows the slots.
constexpr int64_t arranged_extra_bytes(int64_t steps) {
  const int64_t quads = steps <= kMostShortSteps ? steps * kQuadsPerStep : 0;
  return 2 * arranged_table_bytes(steps) + quads * kWideQuadBytes;
}

inline ArrangedTable& arranged_table(int8_t* tile, int64_t steps, int half) {
  return *reinterpret_cast<ArrangedTable*>(tile + steps * formats::kTileBytes +
                                           half * arranged_table_bytes(steps));
}
inline const ArrangedTable& arranged_table(const int8_t* tile, int64_t steps, int half) {
  return *reinterpret_cast<const ArrangedTable*>(tile + steps * formats::kTileBytes +
                                                 half * arranged_table_bytes(steps));
}

inline int8_t* short_weights(int8_t* tile, int64_t steps) {
  return tile + steps * formats::kTileBytes + 2 * arranged_table_bytes(steps);
}
inline const int8_t* short_weights(const int8_t* tile, int64_t steps) {
  return tile + steps * formats::kTileBytes + 2 * arranged_table_bytes(steps);
}

}  // namespace
}  // namespace adalayer::cpu

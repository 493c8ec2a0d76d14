// Eight-bit weights of one column tile in the order in which products without VNNI read them.
//
// A quad is four levels and their weights for 16 columns: a vector of 512 bits, or two halves of 8
// columns. Whether its products may be added up in int16 depends on the weights and on the largest
// level (avx2/gemm.cpp), so the live quads of a vector's columns are sorted by that, once, when the
// weights are packed. Those of zeros alone are left out.
//
//   slots   [steps * 16] of 64 bytes: slot i holds the i-th quad of the list, or of each half's
//   tables  one for each list: the counts of each kind, then for every slot its quad's number,
//           step * 16 + quad within the step, and above it, in bits 30 and 31, the order of its
//           four levels, in which its weights lie
#pragma once

#include <cstdint>

#include "formats/panels.hpp"

// For files with instruction-set flags: nothing in here may be one function for the whole program.
namespace adalayer::cpu {
namespace {

/// How a tile is multiplied in its own order, where the lists would save nothing: in bytes, if
/// int16 holds the sum of each pair of products, else in 16 bits.
enum class PlainForm : uint32_t { None, Bytes, Words };

/// Kinds of quads, in this order.
struct ArrangedTable {
  uint32_t four;         // four in a row have sums that int16 holds together; a multiple of 4
  uint32_t paired;       // the same of two; an even number
  uint32_t mixed;        // as paired, but the second one's levels have another order
  uint32_t whole;        // int16 holds the sum of each pair of products
  uint32_t ordered;      // as whole, in another order
  uint32_t wide;         // neither: the weights are multiplied in 16 bits
  PlainForm plain_form;  // of the tile, in all its tables
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

inline ArrangedTable& arranged_table(int8_t* tile, int64_t steps, int list) {
  return *reinterpret_cast<ArrangedTable*>(tile + steps * formats::kTileBytes +
                                           list * arranged_table_bytes(steps));
}
inline const ArrangedTable& arranged_table(const int8_t* tile, int64_t steps, int list) {
  return *reinterpret_cast<const ArrangedTable*>(tile + steps * formats::kTileBytes +
                                                 list * arranged_table_bytes(steps));
}

}  // namespace
}  // namespace adalayer::cpu

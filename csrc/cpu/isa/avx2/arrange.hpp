// The order of eight-bit weights of the AVX2 row (shared/arranged.hpp), and what follows its
// tables:
//
//   short   where there are few steps: the live quads in their own order, which are used where the
//           lists would save nothing. In bytes, 64 of them, if int16 holds the sum of each pair of
//           products; else in 16 bits, 128 bytes: weights of the levels 0 and 2 of all sixteen
//           columns, then of the levels 1 and 3.
#pragma once

#include "cpu/isa/shared/arranged.hpp"

// For files with instruction-set flags: nothing in here may be one function for the whole program.
namespace adalayer::cpu {
namespace {

// A reduction of at most so many steps may have a short form: there a quad more or less in int16
// matters less than to have neither lists nor the sums in memory.
constexpr int64_t kMostShortSteps = 2;
constexpr int kWideQuadBytes = 2 * formats::kTileWidth * 4;

/// What follows the slots.
constexpr int64_t arranged_extra_bytes(int64_t steps) {
  const int64_t quads = steps <= kMostShortSteps ? steps * kQuadsPerStep : 0;
  return 2 * arranged_table_bytes(steps) + quads * kWideQuadBytes;
}

inline int8_t* short_weights(int8_t* tile, int64_t steps) {
  return tile + steps * formats::kTileBytes + 2 * arranged_table_bytes(steps);
}
inline const int8_t* short_weights(const int8_t* tile, int64_t steps) {
  return tile + steps * formats::kTileBytes + 2 * arranged_table_bytes(steps);
}

}  // namespace
}  // namespace adalayer::cpu

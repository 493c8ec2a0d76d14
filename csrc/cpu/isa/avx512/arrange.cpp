// The order of eight-bit weights of the AVX-512 row without VNNI (shared/arranged.hpp): a list for
// all sixteen columns of a tile, or, where that saves nothing, their live quads in their own order.
#include <algorithm>
#include <cstring>

#include "cpu/isa/avx512/vector.hpp"
#include "cpu/isa/shared/arranged.hpp"

namespace adalayer::cpu {
namespace {

#include "cpu/isa/shared/arrange.inl"

/// What a row takes by a quad, on average, in additions, multiplications and shuffles. Lists go
/// over one tile at a time, and their sums to memory, which takes a tenth longer; wide quads have
/// their weights and levels widened in memory.
double operations(const ArrangedTable& t, uint32_t quads) {
  constexpr double kOfList = 12, kLonger = 1.1;
  const double all =
      2.25 * t.four + 2.5 * t.paired + 3 * (t.mixed + t.whole) + 4 * t.ordered + 5 * t.wide;
  return (kOfList + kLonger * all) / quads;
}

void arrange(int8_t* tile, int64_t steps, const uint8_t* live_quads, int qmax, uint8_t* scratch) {
  const int8_t* original = Arranger<Vector512>::arrange(tile, steps, live_quads, qmax, scratch);
  ArrangedTable& table = arranged_table(tile, steps, 0);
  uint32_t quads = 0;
  for (int64_t s = 0; s < steps; ++s)
    quads += live_quads[s];
  if (quads == 0) return;
  const bool bytes = table.mixed + table.ordered + table.wide == 0;
  if (operations(table, quads) <= (bytes ? 3.0 : 5.0)) return;
  // All of one kind, so that the lists are right, too, beside a tile that has them.
  table = {};
  table.plain_form = bytes ? PlainForm::Bytes : PlainForm::Words;
  (bytes ? table.whole : table.wide) = quads;
  uint32_t slot = 0;
  for (int64_t s = 0; s < steps; ++s)
    for (int q = 0; q < live_quads[s]; ++q, ++slot) {
      const auto number = static_cast<uint32_t>(s * kQuadsPerStep + q);
      table.quads()[slot] = number;
      std::memcpy(tile + int64_t{slot} * kQuadBytes, original + int64_t{number} * kQuadBytes,
                  kQuadBytes);
    }
}

}  // namespace

const TileArrangement kAvx512Arrangement{arranged_table_bytes, Arranger<Vector512>::scratch_bytes,
                                         arrange};

}  // namespace adalayer::cpu

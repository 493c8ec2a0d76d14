#include "cpu/isa/avx2/arrange.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/isa/avx2/products.hpp"
#include "cpu/isa/avx2/vector.hpp"

namespace adalayer::cpu {
namespace {

#include "cpu/isa/shared/arrange.inl"

/// Additions and multiplications of a row by a half tile, as gemm_arranged.cpp does them.
double operations(const ArrangedTable& t) {
  constexpr double kOfList = 16;  // sums to and from memory, loops that end
  return kOfList + 2.25 * t.four + 2.5 * t.paired + 3 * (t.mixed + t.whole) +
         4 * (t.ordered + t.wide);
}

/// The cheapest of a tile.
PlainForm plain_form(const ArrangedTable& a, const ArrangedTable& b, int quads) {
  const bool bytes = a.mixed + a.ordered + a.wide + b.mixed + b.ordered + b.wide == 0;
  if (operations(a) + operations(b) <= (bytes ? 6.0 : 8.0) * quads) return PlainForm::None;
  return bytes ? PlainForm::Bytes : PlainForm::Words;
}

/// Writes the live quads in bytes or in 16 bits.
void put_short(const int8_t* original, int64_t steps, const uint8_t* live_quads, PlainForm form,
               int8_t* to) {
  for (int64_t s = 0; s < steps; ++s) {
    const int8_t* quad = original + s * formats::kTileBytes;
    if (form == PlainForm::Bytes) {
      std::memcpy(to, quad, static_cast<size_t>(live_quads[s]) * kQuadBytes);
      to += live_quads[s] * kQuadBytes;
      continue;
    }
    for (int q = 0; q < live_quads[s]; ++q, quad += kQuadBytes, to += kWideQuadBytes)
      for (int half = 0; half < 2; ++half) {
        const __m256i w = load(quad + half * kVectorBytes);
        store(to + half * kVectorBytes, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
        store(to + (2 + half) * kVectorBytes, _mm256_srai_epi16(w, 8));
      }
  }
}

void arrange(int8_t* tile, int64_t steps, const uint8_t* live_quads, int qmax, uint8_t* scratch) {
  const int8_t* original = Arranger<Vector256>::arrange(tile, steps, live_quads, qmax, scratch);
  if (steps > kMostShortSteps) return;
  ArrangedTable& first = arranged_table(tile, steps, 0);
  ArrangedTable& second = arranged_table(tile, steps, 1);
  int8_t* const weights = short_weights(tile, steps);
  std::memset(weights, 0, static_cast<size_t>(steps * kQuadsPerStep * kWideQuadBytes));
  const int quads = std::accumulate(live_quads, live_quads + steps, 0);
  first.plain_form = second.plain_form = plain_form(first, second, quads);
  if (first.plain_form != PlainForm::None)
    put_short(original, steps, live_quads, first.plain_form, weights);
}

}  // namespace

const TileArrangement kAvx2Arrangement{arranged_extra_bytes, Arranger<Vector256>::scratch_bytes,
                                       arrange};

}  // namespace adalayer::cpu

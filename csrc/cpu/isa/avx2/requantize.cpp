// Requantization with AVX2.
#include <cstring>

#include "cpu/isa/avx2/finish.hpp"

namespace adalayer::cpu {
namespace {

/// One column tile: the constants of its sixteen channels stay in registers for all rows.
template <bool kResidual, bool kBounded>
void requantize_tile(const RequantizeArgs& a, int t) {
  const int width = (a.whole ? 16 * a.tiles : a.cols) - 16 * t;
  if (width <= 0) return;
  const auto count = static_cast<size_t>(width < 16 ? width : 16);
  const FinishColumns finish(*a.epilogue, a.channel + 16 * t);
  const int32_t* sums = a.sums + 16 * t;
  for (int r = 0; r < a.rows; ++r, sums += 16 * a.tiles) {
    if (a.out_offset[r] < 0) continue;
    const uint8_t* residual = kResidual ? a.residual + a.residual_offset[r] + 16 * t : nullptr;
    const __m128i q = finish.levels<kResidual, kBounded>(finish.corrected(sums, 0),
                                                         finish.corrected(sums, 1), residual);
    uint8_t* const out = a.out + a.out_offset[r] + 16 * t;
    if (count == 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), q);
      continue;
    }
    alignas(16) uint8_t levels[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(levels), q);
    std::memcpy(out, levels, count);
  }
}

template <bool kResidual>
void requantize_tiles(const RequantizeArgs& a) {
  for (int t = 0; t < a.tiles; ++t)
    if (a.epilogue->bounded)
      requantize_tile<kResidual, true>(a, t);
    else
      requantize_tile<kResidual, false>(a, t);
}

}  // namespace

void look_up_avx2(const RequantizeArgs& a) {
  const int64_t bytes = a.whole ? 16 * a.tiles : a.cols;
  for (int r = 0, end = 0; r < a.rows; r = end) {
    end = r + 1;
    if (a.out_offset[r] < 0) continue;
    const int32_t step = end < a.rows ? a.out_offset[end] - a.out_offset[r] : 0;
    while (end < a.rows && a.out_offset[end] >= 0 &&
           a.out_offset[end] - a.out_offset[end - 1] == step)
      ++end;
    uint8_t* const first = a.out + a.out_offset[r];
    kAvx2Image.lookup(a.epilogue->finish.table, {first, step, first, step, bytes, end - r});
  }
}

void requantize_avx2(const RequantizeArgs& a) {
  if (a.epilogue->finish.table != nullptr)
    return with_table_behind(a, [](const RequantizeArgs& plain) { requantize_avx2(plain); });
  if (a.residual != nullptr)
    requantize_tiles<true>(a);
  else
    requantize_tiles<false>(a);
}

}  // namespace adalayer::cpu

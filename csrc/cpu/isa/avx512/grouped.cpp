// Depthwise and grouped convolutions with AVX-512: products of int16 pairs (vpmaddwd), since
// vpmaddubsw would saturate at eight-bit weights.
#include <immintrin.h>

#include "cpu/grouped_kernels.hpp"

namespace adalayer::cpu::avx512 {
namespace {

#include "cpu/isa/shared/grouped.inl"

#include "cpu/isa/avx512/grouped512.inl"

struct Words512 : Grouped512 {
  static constexpr int kRows = 2, kHalves = 2;

  /// Two rows of bytes to int16 pairs of vertical neighbours: 4 channels of each 128-bit piece in
  /// every vector, in order.
  static void interleave(const I* row, uint8_t* to) {
    const I low = _mm512_unpacklo_epi8(row[0], row[1]), high = _mm512_unpackhi_epi8(row[0], row[1]);
    store(to, _mm512_unpacklo_epi8(low, zero()));
    store(to + 64, _mm512_unpackhi_epi8(low, zero()));
    store(to + 128, _mm512_unpacklo_epi8(high, zero()));
    store(to + 192, _mm512_unpackhi_epi8(high, zero()));
  }
  static I dot(I sum, I data, I w) { return add_dwords(sum, _mm512_madd_epi16(data, w)); }
  static I dot_column(I sum, I data, I w) { return dot(sum, data, w); }
  /// Bytes 0, 2 or 1, 3 of each dword as int16.
  static I half(I v, int which) {
    return which == 0 ? _mm512_and_si512(v, set1_words(0x00FF)) : _mm512_srli_epi16(v, 8);
  }
};

}  // namespace

const GroupedKernels kGrouped{Words512::kLanes,    Words512::kRows,   Words512::kHalves,
                              depthwise<Words512>, in_lane<Words512>, broadcast<Words512>};

}  // namespace adalayer::cpu::avx512

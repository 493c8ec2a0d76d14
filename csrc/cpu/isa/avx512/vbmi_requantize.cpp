// Requantization with AVX512-VBMI: the 256-entry table lies in four registers.
#include <immintrin.h>

#include <utility>

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

struct Lookup {
  __m512i part[4];
  explicit Lookup(const uint8_t* table) {
    for (int i = 0; i < 4; ++i)
      part[i] = table == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(table + 64 * i);
  }
  /// vpermi2b looks at seven bits of the index; the eighth chooses between the two halves.
  __m512i operator()(__m512i q) const {
    const __m512i low = _mm512_permutex2var_epi8(part[0], q, part[1]);
    const __m512i high = _mm512_permutex2var_epi8(part[2], q, part[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(q), low, high);
  }
};

}  // namespace

#include "cpu/isa/avx512/requantize.inl"

#include "cpu/isa/avx512/requantize_variants.inl"

void requantize_vbmi(const RequantizeArgs& args) { requantize_any(args); }

}  // namespace adalayer::cpu

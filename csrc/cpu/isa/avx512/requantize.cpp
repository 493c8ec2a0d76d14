// Requantization with AVX-512; the table, where there is one, is read value by value.
#include <immintrin.h>

#include <utility>

#include "cpu/isa/avx512/avx512.hpp"

namespace adalayer::cpu::avx512 {
namespace {

struct Lookup {
  const uint8_t* table;
  explicit Lookup(const uint8_t* t) : table(t) {}
  __m512i operator()(__m512i q) const {
    alignas(64) uint8_t levels[64];
    _mm512_store_si512(levels, q);
    for (uint8_t& level : levels)
      level = table[level];
    return _mm512_load_si512(levels);
  }
};

}  // namespace

#include "cpu/isa/avx512/requantize.inl"

#include "cpu/isa/avx512/requantize_variants.inl"

void requantize(const RequantizeArgs& args) { requantize_any(args); }

}  // namespace adalayer::cpu::avx512

// What shared/arrange.inl and shared/gemm_arranged.inl do with vectors of 512 bits.
#pragma once

#include "cpu/isa/avx2/products.hpp"

// For files with instruction-set flags: nothing in here may be one function for the whole program.
namespace adalayer::cpu {
namespace {

struct Vector512 {
  using T = __m512i;
  static constexpr int kBytes = 64, kRows = 16, kMostSteps = 8;

  static T load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, T v) { _mm512_storeu_si512(p, v); }
  static T set1(int16_t v) { return _mm512_set1_epi16(v); }
  static T broadcast(const uint8_t* quad) {
    int32_t four;
    std::memcpy(&four, quad, 4);
    return _mm512_set1_epi32(four);
  }
  static T control(const uint8_t* order) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(order)));
  }
  static T shuffle(T v, T control) { return _mm512_shuffle_epi8(v, control); }

  static T multiply_bytes(T levels, T weights) { return _mm512_maddubs_epi16(levels, weights); }
  static T multiply_words(T a, T b) { return _mm512_madd_epi16(a, b); }
  static void add16(T& sum, T v) { sum = _mm512_add_epi16(sum, v); }
  static void add32(T& sum, T v) { sum = _mm512_add_epi32(sum, v); }
  static T low_bytes(T v) { return _mm512_and_si512(v, set1(255)); }
  static T high_bytes(T v) { return _mm512_srli_epi16(v, 8); }
  static T signed_low_bytes(T v) { return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8); }
  static T signed_high_bytes(T v) { return _mm512_srai_epi16(v, 8); }

  static T add(T a, T b) { return _mm512_add_epi16(a, b); }
  static T positive(T w) {
    return multiply_bytes(_mm512_max_epi8(w, set1(0)), _mm512_set1_epi8(1));
  }
  /// (Absolute values up to 128 are u8, which is the first operand.)
  static T negative(T w) {
    return multiply_bytes(_mm512_abs_epi8(_mm512_min_epi8(w, set1(0))), _mm512_set1_epi8(1));
  }
  static bool beyond(T a, T bound) { return _mm512_cmpgt_epi16_mask(a, bound) != 0; }
  static bool is_zero(T v) { return _mm512_test_epi32_mask(v, v) == 0; }
};

}  // namespace
}  // namespace adalayer::cpu

// What shared/arrange.inl and shared/gemm_arranged.inl do with vectors of 256 bits.
#pragma once

#include "cpu/isa/avx2/products.hpp"

// For files with instruction-set flags: nothing in here may be one function for the whole program.
namespace adalayer::cpu {
namespace {

struct Vector256 {
  using T = __m256i;
  static constexpr int kBytes = kVectorBytes, kRows = 8, kMostSteps = 16;

  static T load(const void* p) { return cpu::load(p); }
  static void store(void* p, T v) { cpu::store(p, v); }
  static T set1(int16_t v) { return _mm256_set1_epi16(v); }
  static T broadcast(const uint8_t* quad) { return cpu::broadcast(quad); }
  static T control(const uint8_t* order) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(order)));
  }
  static T shuffle(T v, T control) { return _mm256_shuffle_epi8(v, control); }

  static T multiply_bytes(T levels, T weights) { return _mm256_maddubs_epi16(levels, weights); }
  static T multiply_words(T a, T b) { return _mm256_madd_epi16(a, b); }
  [[gnu::always_inline]] static void add16(T& sum, T v) { cpu::add16(sum, v); }
  [[gnu::always_inline]] static void add32(T& sum, T v) { cpu::add32(sum, v); }
  static T low_bytes(T v) { return _mm256_and_si256(v, set1(255)); }
  static T high_bytes(T v) { return _mm256_srli_epi16(v, 8); }
  static T signed_low_bytes(T v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
  static T signed_high_bytes(T v) { return _mm256_srai_epi16(v, 8); }

  static T add(T a, T b) { return _mm256_add_epi16(a, b); }
  static T positive(T w) {
    return multiply_bytes(_mm256_max_epi8(w, set1(0)), _mm256_set1_epi8(1));
  }
  /// (Absolute values up to 128 are u8, which is the first operand.)
  static T negative(T w) {
    return multiply_bytes(_mm256_abs_epi8(_mm256_min_epi8(w, set1(0))), _mm256_set1_epi8(1));
  }
  static bool beyond(T a, T bound) { return !is_zero(_mm256_cmpgt_epi16(a, bound)); }
  static bool is_zero(T v) { return _mm256_testz_si256(v, v) != 0; }
};

}  // namespace
}  // namespace adalayer::cpu

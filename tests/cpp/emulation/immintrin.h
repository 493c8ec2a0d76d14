// AVX-512, AVX-VNNI and AMX (amx.hpp) in software, for tests of their kernels on every machine that
// has AVX2.
//
// Sources that are compiled with this folder in front of the compiler's own headers find here what
// they call, over vectors that are two of 256 bits. Instructions that stay within 128 bits are
// AVX2's on both halves; those that cross, and all masks, are written out element by element as
// Intel's Software Developer's Manual, volume 2, describes them. Differences are on the strict
// side: bytes that a mask leaves out are never touched, and an aligned access that is not aligned
// ends the test.
//
// An instruction that is missing here is an error of the compiler: a vector of this header fits no
// other function. test_emulation.cpp compares all of them with the processor's, where there is one.
#pragma once

#include_next <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {

struct I512 {
  __m256i low, high;
};
struct F512 {
  __m256 low, high;
};
struct D512 {
  __m256d low, high;
};

#define EMULATED [[gnu::always_inline]] static inline
// Loops over elements: once in a file, or compiling takes minutes.
#define EMULATED_LOOP [[gnu::noinline, maybe_unused]] static

[[noreturn, gnu::noinline, gnu::cold]] static inline void fault(const char* what) {
  std::fprintf(stderr, "emulated AVX-512: %s\n", what);
  std::abort();
}

/// The elements of a vector in memory.
template <class Element, class Vector>
struct Lanes {
  static constexpr int kCount = sizeof(Vector) / sizeof(Element);
  Element lane[kCount];

  Lanes() : lane{} {}
  explicit Lanes(const Vector& v) { std::memcpy(lane, &v, sizeof lane); }
  Vector vector() const {
    Vector v;
    std::memcpy(&v, lane, sizeof lane);
    return v;
  }
};
template <class Element>
using Ints = Lanes<Element, I512>;

// ---- loads and stores
// ----------------------------------------------------------------------------

template <class Vector>
EMULATED Vector loaded(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class Vector>
EMULATED void stored(void* p, const Vector& v) {
  std::memcpy(p, &v, sizeof v);
}
EMULATED void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) fault("an aligned access is not aligned");
}
EMULATED I512 load_aligned(const void* p) {
  check_aligned(p);
  return loaded<I512>(p);
}
EMULATED void store_aligned(void* p, I512 v) {
  check_aligned(p);
  stored(p, v);
}

template <class Element, class Vector>
EMULATED_LOOP Vector masked_load(Vector other, uint64_t mask, const void* p) {
  Lanes<Element, Vector> r(other);
  for (int i = 0; i < r.kCount; ++i)
    if ((mask >> i & 1) != 0)
      std::memcpy(&r.lane[i], static_cast<const Element*>(p) + i, sizeof(Element));
  return r.vector();
}
template <class Element, class Vector>
EMULATED_LOOP void masked_store(void* p, uint64_t mask, Vector v) {
  const Lanes<Element, Vector> r(v);
  for (int i = 0; i < r.kCount; ++i)
    if ((mask >> i & 1) != 0)
      std::memcpy(static_cast<Element*>(p) + i, &r.lane[i], sizeof(Element));
}

// ---- the halves as AVX2 has them
// -----------------------------------------------------------------

#define EMULATED_UNARY(name, To, From, half) \
  EMULATED To name(From a) { return {half(a.low), half(a.high)}; }
#define EMULATED_BINARY(name, Vector, half) \
  EMULATED Vector name(Vector a, Vector b) { return {half(a.low, b.low), half(a.high, b.high)}; }
#define EMULATED_SHIFT(name, half)                                                \
  EMULATED I512 name(I512 a, unsigned n) {                                        \
    return {half(a.low, static_cast<int>(n)), half(a.high, static_cast<int>(n))}; \
  }
// From 256 bits to elements twice as wide, and back.
#define EMULATED_WIDEN(name, To, From, half, low_part, high_part) \
  EMULATED To name(From a) { return {half(low_part(a)), half(high_part(a))}; }

EMULATED __m128i low128(__m256i v) { return _mm256_castsi256_si128(v); }
EMULATED __m128i high128(__m256i v) { return _mm256_extracti128_si256(v, 1); }
EMULATED __m128 low128(__m256 v) { return _mm256_castps256_ps128(v); }
EMULATED __m128 high128(__m256 v) { return _mm256_extractf128_ps(v, 1); }

EMULATED_BINARY(add_epi16, I512, _mm256_add_epi16)
EMULATED_BINARY(add_epi32, I512, _mm256_add_epi32)
EMULATED_BINARY(add_epi64, I512, _mm256_add_epi64)
EMULATED_BINARY(add_pd, D512, _mm256_add_pd)
EMULATED_BINARY(add_ps, F512, _mm256_add_ps)
EMULATED_BINARY(adds_epi16, I512, _mm256_adds_epi16)
EMULATED_BINARY(and_si512, I512, _mm256_and_si256)
EMULATED_BINARY(div_pd, D512, _mm256_div_pd)
EMULATED_BINARY(div_ps, F512, _mm256_div_ps)
EMULATED_BINARY(madd_epi16, I512, _mm256_madd_epi16)
EMULATED_BINARY(maddubs_epi16, I512, _mm256_maddubs_epi16)
EMULATED_BINARY(max_epi32, I512, _mm256_max_epi32)
EMULATED_BINARY(max_epi8, I512, _mm256_max_epi8)
EMULATED_BINARY(max_epu8, I512, _mm256_max_epu8)
EMULATED_BINARY(max_ps, F512, _mm256_max_ps)
EMULATED_BINARY(min_epi32, I512, _mm256_min_epi32)
EMULATED_BINARY(min_epi8, I512, _mm256_min_epi8)
EMULATED_BINARY(min_epu8, I512, _mm256_min_epu8)
EMULATED_BINARY(min_ps, F512, _mm256_min_ps)
EMULATED_BINARY(mul_ps, F512, _mm256_mul_ps)
EMULATED_BINARY(mullo_epi32, I512, _mm256_mullo_epi32)
EMULATED_BINARY(or_si512, I512, _mm256_or_si256)
EMULATED_BINARY(packs_epi32, I512, _mm256_packs_epi32)
EMULATED_BINARY(packus_epi16, I512, _mm256_packus_epi16)
EMULATED_BINARY(sad_epu8, I512, _mm256_sad_epu8)
EMULATED_BINARY(shuffle_epi8, I512, _mm256_shuffle_epi8)
EMULATED_BINARY(sub_epi16, I512, _mm256_sub_epi16)
EMULATED_BINARY(sub_epi32, I512, _mm256_sub_epi32)
EMULATED_BINARY(sub_epi8, I512, _mm256_sub_epi8)
EMULATED_BINARY(sub_pd, D512, _mm256_sub_pd)
EMULATED_BINARY(sub_ps, F512, _mm256_sub_ps)
EMULATED_BINARY(unpackhi_epi16, I512, _mm256_unpackhi_epi16)
EMULATED_BINARY(unpackhi_epi32, I512, _mm256_unpackhi_epi32)
EMULATED_BINARY(unpackhi_epi64, I512, _mm256_unpackhi_epi64)
EMULATED_BINARY(unpackhi_epi8, I512, _mm256_unpackhi_epi8)
EMULATED_BINARY(unpacklo_epi16, I512, _mm256_unpacklo_epi16)
EMULATED_BINARY(unpacklo_epi32, I512, _mm256_unpacklo_epi32)
EMULATED_BINARY(unpacklo_epi64, I512, _mm256_unpacklo_epi64)
EMULATED_BINARY(unpacklo_epi8, I512, _mm256_unpacklo_epi8)
EMULATED_BINARY(xor_si512, I512, _mm256_xor_si256)

EMULATED_SHIFT(slli_epi16, _mm256_slli_epi16)
EMULATED_SHIFT(slli_epi32, _mm256_slli_epi32)
EMULATED_SHIFT(srai_epi16, _mm256_srai_epi16)
EMULATED_SHIFT(srai_epi32, _mm256_srai_epi32)
EMULATED_SHIFT(srli_epi16, _mm256_srli_epi16)
EMULATED_SHIFT(srli_epi32, _mm256_srli_epi32)

EMULATED_UNARY(abs_epi8, I512, I512, _mm256_abs_epi8)
EMULATED_UNARY(castsi512_ps, F512, I512, _mm256_castsi256_ps)
EMULATED_UNARY(cvtepi32_ps, F512, I512, _mm256_cvtepi32_ps)
EMULATED_UNARY(cvtps_epi32, I512, F512, _mm256_cvtps_epi32)

EMULATED_WIDEN(cvtepi32_epi64, I512, __m256i, _mm256_cvtepi32_epi64, low128, high128)
EMULATED_WIDEN(cvtepi32_pd, D512, __m256i, _mm256_cvtepi32_pd, low128, high128)
EMULATED_WIDEN(cvtepi8_epi16, I512, __m256i, _mm256_cvtepi8_epi16, low128, high128)
EMULATED_WIDEN(cvtepu8_epi16, I512, __m256i, _mm256_cvtepu8_epi16, low128, high128)
EMULATED_WIDEN(cvtps_pd, D512, __m256, _mm256_cvtps_pd, low128, high128)

#undef EMULATED_UNARY
#undef EMULATED_BINARY
#undef EMULATED_SHIFT
#undef EMULATED_WIDEN

EMULATED I512 cvtepu8_epi32(__m128i a) {
  return {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))};
}
EMULATED __m256 cvtpd_ps(D512 a) {
  return _mm256_set_m128(_mm256_cvtpd_ps(a.high), _mm256_cvtpd_ps(a.low));
}
EMULATED F512 fmadd_ps(F512 a, F512 b, F512 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
EMULATED F512 roundscale_ps(F512 a, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) fault("another rounding");
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kNearest), _mm256_round_ps(a.high, kNearest)};
}
EMULATED_LOOP I512 shuffle_epi32(I512 a, int control) {
  const Ints<int32_t> from(a);
  Ints<int32_t> r;
  for (int i = 0; i < 16; ++i)
    r.lane[i] = from.lane[i / 4 * 4 + (control >> 2 * (i % 4) & 3)];
  return r.vector();
}

// ---- products
// ------------------------------------------------------------------------------------

/// vpdpbusd: four products of u8 and s8 each, added without saturation.
EMULATED __m256i dpbusd_half(__m256i sum, __m256i a, __m256i b) {
  // In 16 bits: levels 0 and 2 of every dword, then 1 and 3.
  const __m256i low_byte = _mm256_set1_epi16(255);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, low_byte),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
EMULATED __m256i dpwssd_half(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
EMULATED I512 dpbusd_epi32(I512 sum, I512 a, I512 b) {
  return {dpbusd_half(sum.low, a.low, b.low), dpbusd_half(sum.high, a.high, b.high)};
}
EMULATED I512 dpwssd_epi32(I512 sum, I512 a, I512 b) {
  return {dpwssd_half(sum.low, a.low, b.low), dpwssd_half(sum.high, a.high, b.high)};
}

/// gf2p8affineqb: bit i of a byte is the parity of it and of byte 7 - i of its quadword's matrix.
EMULATED_LOOP I512 gf2p8affine_epi64_epi8(I512 x, I512 matrix, int constant) {
  // Matrices are the same for all bytes of a quadword: one bit of all 64 bytes at a time.
  const Ints<uint64_t> from(x), rows(matrix);
  Ints<uint64_t> r;
  for (int q = 0; q < 8; ++q) {
    uint64_t result = 0;
    for (int i = 0; i < 8; ++i) {
      const uint64_t row = rows.lane[q] >> 8 * (7 - i) & 255;
      uint64_t bits = from.lane[q] & row * 0x0101010101010101;
      bits ^= bits >> 4;  // within each byte: what crosses into it lands above its lowest bit
      bits ^= bits >> 2;
      bits ^= bits >> 1;
      result |= (bits & 0x0101010101010101) << i;
    }
    r.lane[q] = result ^ static_cast<uint64_t>(constant & 255) * 0x0101010101010101;
  }
  return r.vector();
}

// ---- constants, casts, parts
// ---------------------------------------------------------------------

EMULATED I512 both(__m256i v) { return {v, v}; }
EMULATED I512 set1_epi8(char v) { return both(_mm256_set1_epi8(v)); }
EMULATED I512 set1_epi16(short v) { return both(_mm256_set1_epi16(v)); }
EMULATED I512 set1_epi32(int v) { return both(_mm256_set1_epi32(v)); }
EMULATED I512 set1_epi64(long long v) { return both(_mm256_set1_epi64x(v)); }
EMULATED F512 set1_ps(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
EMULATED D512 set1_pd(double v) { return {_mm256_set1_pd(v), _mm256_set1_pd(v)}; }
EMULATED I512 setzero_si512() { return both(_mm256_setzero_si256()); }
EMULATED D512 setzero_pd() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
EMULATED I512 set_epi32(int e15, int e14, int e13, int e12, int e11, int e10, int e9, int e8,
                        int e7, int e6, int e5, int e4, int e3, int e2, int e1, int e0) {
  return {_mm256_set_epi32(e7, e6, e5, e4, e3, e2, e1, e0),
          _mm256_set_epi32(e15, e14, e13, e12, e11, e10, e9, e8)};
}
EMULATED I512 broadcast_i32x4(__m128i v) { return both(_mm256_broadcastsi128_si256(v)); }

// What a widening cast leaves undefined is a pattern here, so that nobody relies on zeros.
EMULATED __m256i undefined_half() { return _mm256_set1_epi8(static_cast<char>(0xA5)); }
EMULATED I512 castsi128_si512(__m128i v) {
  return {_mm256_inserti128_si256(undefined_half(), v, 0), undefined_half()};
}
EMULATED I512 castsi256_si512(__m256i v) { return {v, undefined_half()}; }
EMULATED F512 castps256_ps512(__m256 v) { return {v, _mm256_castsi256_ps(undefined_half())}; }
EMULATED __m128i castsi512_si128(I512 v) { return low128(v.low); }
EMULATED __m256i castsi512_si256(I512 v) { return v.low; }
EMULATED __m256 castps512_ps256(F512 v) { return v.low; }

EMULATED __m256i extracti64x4_epi64(I512 v, int part) { return part == 0 ? v.low : v.high; }
EMULATED __m256 extractf32x8_ps(F512 v, int part) { return part == 0 ? v.low : v.high; }
EMULATED __m128i extracti32x4_epi32(I512 v, int part) {
  const __m256i half = part < 2 ? v.low : v.high;
  return part % 2 == 0 ? low128(half) : high128(half);
}
EMULATED I512 inserti64x4(I512 v, __m256i half, int part) {
  return part == 0 ? I512{half, v.high} : I512{v.low, half};
}
EMULATED F512 insertf32x8(F512 v, __m256 half, int part) {
  return part == 0 ? F512{half, v.high} : F512{v.low, half};
}
EMULATED I512 inserti32x4(I512 v, __m128i quarter, int part) {
  std::memcpy(reinterpret_cast<char*>(&v) + 16 * part, &quarter, 16);
  return v;
}
EMULATED_LOOP long long reduce_add_epi64(I512 v) {
  const Ints<uint64_t> r(v);
  uint64_t sum = 0;
  for (const uint64_t lane : r.lane)
    sum += lane;
  return static_cast<long long>(sum);
}

// ---- across the vector
// ---------------------------------------------------------------------------

EMULATED_LOOP I512 permutexvar_epi32(I512 index, I512 a) {
  const Ints<uint32_t> from(a), at(index);
  Ints<uint32_t> r;
  for (int i = 0; i < 16; ++i)
    r.lane[i] = from.lane[at.lane[i] % 16];
  return r.vector();
}
EMULATED_LOOP I512 mask_permutexvar_epi8(I512 other, __mmask64 mask, I512 index, I512 a) {
  const Ints<uint8_t> from(a), at(index);
  Ints<uint8_t> r(other);
  for (int i = 0; i < 64; ++i)
    if ((mask >> i & 1) != 0) r.lane[i] = from.lane[at.lane[i] % 64];
  return r.vector();
}
template <class Element>
EMULATED_LOOP I512 permute_two(I512 a, I512 index, I512 b) {
  constexpr int kCount = Ints<Element>::kCount;
  const Ints<Element> first(a), second(b), at(index);
  Ints<Element> r;
  for (int i = 0; i < kCount; ++i) {
    const int from = static_cast<int>(at.lane[i] % (2 * kCount));
    r.lane[i] = from < kCount ? first.lane[from] : second.lane[from - kCount];
  }
  return r.vector();
}
EMULATED_LOOP I512 mask_expand_epi8(I512 other, __mmask64 mask, I512 a) {
  const Ints<uint8_t> from(a);
  Ints<uint8_t> r(other);
  for (int i = 0, next = 0; i < 64; ++i)
    if ((mask >> i & 1) != 0) r.lane[i] = from.lane[next++];
  return r.vector();
}
EMULATED_LOOP I512 maskz_compress_epi32(__mmask16 mask, I512 a) {
  const Ints<int32_t> from(a);
  Ints<int32_t> r;
  for (int i = 0, next = 0; i < 16; ++i)
    if ((mask >> i & 1) != 0) r.lane[next++] = from.lane[i];
  return r.vector();
}
EMULATED_LOOP void mask_compressstoreu_ps(void* p, __mmask16 mask, F512 a) {
  const Lanes<float, F512> from(a);
  auto* to = static_cast<char*>(p);
  for (int i = 0; i < 16; ++i)
    if ((mask >> i & 1) != 0) {
      std::memcpy(to, &from.lane[i], sizeof(float));
      to += sizeof(float);
    }
}
EMULATED_LOOP F512 maskz_expandloadu_ps(__mmask16 mask, const void* p) {
  Lanes<float, F512> r;
  const auto* from = static_cast<const char*>(p);
  for (int i = 0; i < 16; ++i)
    if ((mask >> i & 1) != 0) {
      std::memcpy(&r.lane[i], from, sizeof(float));
      from += sizeof(float);
    }
  return r.vector();
}

template <class Element, class Vector>
EMULATED_LOOP Vector gathered(Vector other, uint64_t mask, I512 index, const void* p, int scale) {
  const Ints<int32_t> at(index);
  Lanes<Element, Vector> r(other);
  for (int i = 0; i < 16; ++i)
    if ((mask >> i & 1) != 0)
      std::memcpy(&r.lane[i], static_cast<const char*>(p) + int64_t{at.lane[i]} * scale, 4);
  return r.vector();
}
EMULATED I512 i32gather_epi32(I512 index, const void* p, int scale) {
  return gathered<int32_t>(setzero_si512(), 0xFFFF, index, p, scale);
}
EMULATED F512 i32gather_ps(I512 index, const void* p, int scale) {
  return gathered<float>(castsi512_ps(setzero_si512()), 0xFFFF, index, p, scale);
}
EMULATED I512 mask_i32gather_epi32(I512 other, __mmask16 mask, I512 index, const void* p,
                                   int scale) {
  return gathered<int32_t>(other, mask, index, p, scale);
}

// ---- masks
// ---------------------------------------------------------------------------------------

EMULATED __mmask64 movepi8_mask(I512 v) {
  const auto half = [](__m256i h) { return static_cast<uint32_t>(_mm256_movemask_epi8(h)); };
  return half(v.low) | uint64_t{half(v.high)} << 32;
}
EMULATED_LOOP __mmask32 cmpgt_epi16_mask(I512 a, I512 b) {
  const Ints<int16_t> x(a), y(b);
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i)
    mask |= static_cast<__mmask32>(x.lane[i] > y.lane[i]) << i;
  return mask;
}
EMULATED_LOOP __mmask16 test_epi32_mask(I512 a, I512 b) {
  const Ints<int32_t> x(and_si512(a, b));
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i)
    mask |= static_cast<unsigned>(x.lane[i] != 0) << i;
  return static_cast<__mmask16>(mask);
}
EMULATED_LOOP __mmask16 cmpge_epi32_mask(I512 a, I512 b) {
  const Ints<int32_t> x(a), y(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i)
    mask |= static_cast<unsigned>(x.lane[i] >= y.lane[i]) << i;
  return static_cast<__mmask16>(mask);
}
EMULATED_LOOP I512 mask_blend_epi8(__mmask64 mask, I512 a, I512 b) {
  const Ints<uint8_t> chosen(b);
  Ints<uint8_t> r(a);
  for (int i = 0; i < 64; ++i)
    if ((mask >> i & 1) != 0) r.lane[i] = chosen.lane[i];
  return r.vector();
}
EMULATED_LOOP __m256i cvtepi16_epi8(I512 a) {
  const Ints<uint16_t> from(a);
  uint8_t bytes[32];
  for (int i = 0; i < 32; ++i)
    bytes[i] = static_cast<uint8_t>(from.lane[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
}
EMULATED_LOOP __m256i cvtepi32_epi16(I512 a) {
  const Ints<uint32_t> from(a);
  uint16_t words[16];
  for (int i = 0; i < 16; ++i)
    words[i] = static_cast<uint16_t>(from.lane[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}
EMULATED_LOOP __m128i cvtepi32_epi8(I512 a) {
  const Ints<uint32_t> from(a);
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i)
    bytes[i] = static_cast<uint8_t>(from.lane[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

EMULATED I512 mask_loadu_epi32(I512 other, __mmask16 mask, const void* p) {
  return masked_load<int32_t>(other, mask, p);
}
EMULATED I512 maskz_loadu_epi32(__mmask16 mask, const void* p) {
  return masked_load<int32_t>(setzero_si512(), mask, p);
}
EMULATED I512 maskz_loadu_epi8(__mmask64 mask, const void* p) {
  return masked_load<uint8_t>(setzero_si512(), mask, p);
}
EMULATED F512 maskz_loadu_ps(__mmask16 mask, const void* p) {
  return masked_load<float>(castsi512_ps(setzero_si512()), mask, p);
}
EMULATED __m128i maskz_loadu_epi8_128(__mmask16 mask, const void* p) {
  return masked_load<uint8_t>(_mm_setzero_si128(), mask, p);
}
EMULATED void mask_storeu_epi32(void* p, __mmask16 mask, I512 v) {
  masked_store<int32_t>(p, mask, v);
}
EMULATED void mask_storeu_epi8(void* p, __mmask64 mask, I512 v) {
  masked_store<uint8_t>(p, mask, v);
}
EMULATED void mask_storeu_ps(void* p, __mmask16 mask, F512 v) { masked_store<float>(p, mask, v); }
EMULATED void mask_storeu_epi8_256(void* p, __mmask32 mask, __m256i v) {
  masked_store<uint8_t>(p, mask, v);
}
EMULATED void mask_storeu_epi8_128(void* p, __mmask16 mask, __m128i v) {
  masked_store<uint8_t>(p, mask, v);
}
EMULATED void mask_cvtepi32_storeu_epi8(void* p, __mmask16 mask, I512 v) {
  masked_store<uint8_t>(p, mask, cvtepi32_epi8(v));
}

#undef EMULATED
#undef EMULATED_LOOP

}  // namespace emulation

#include "amx.hpp"

#define __m512i ::emulation::I512
#define __m512 ::emulation::F512
#define __m512d ::emulation::D512

// Some of these are macros in the compiler's headers, without optimisation all with immediates.
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 ::emulation::dpbusd_half
#undef _mm256_dpwssd_avx_epi32
#define _mm256_dpwssd_avx_epi32 ::emulation::dpwssd_half
#undef _mm256_mask_storeu_epi8
#define _mm256_mask_storeu_epi8 ::emulation::mask_storeu_epi8_256
#undef _mm512_abs_epi8
#define _mm512_abs_epi8 ::emulation::abs_epi8
#undef _mm512_add_epi16
#define _mm512_add_epi16 ::emulation::add_epi16
#undef _mm512_add_epi32
#define _mm512_add_epi32 ::emulation::add_epi32
#undef _mm512_add_epi64
#define _mm512_add_epi64 ::emulation::add_epi64
#undef _mm512_add_pd
#define _mm512_add_pd ::emulation::add_pd
#undef _mm512_add_ps
#define _mm512_add_ps ::emulation::add_ps
#undef _mm512_adds_epi16
#define _mm512_adds_epi16 ::emulation::adds_epi16
#undef _mm512_and_si512
#define _mm512_and_si512 ::emulation::and_si512
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 ::emulation::broadcast_i32x4
#undef _mm512_castps256_ps512
#define _mm512_castps256_ps512 ::emulation::castps256_ps512
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 ::emulation::castps512_ps256
#undef _mm512_castsi128_si512
#define _mm512_castsi128_si512 ::emulation::castsi128_si512
#undef _mm512_castsi256_si512
#define _mm512_castsi256_si512 ::emulation::castsi256_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps ::emulation::castsi512_ps
#undef _mm512_castsi512_si128
#define _mm512_castsi512_si128 ::emulation::castsi512_si128
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 ::emulation::castsi512_si256
#undef _mm512_cmpge_epi32_mask
#define _mm512_cmpge_epi32_mask ::emulation::cmpge_epi32_mask
#undef _mm512_cmpgt_epi16_mask
#define _mm512_cmpgt_epi16_mask ::emulation::cmpgt_epi16_mask
#undef _mm512_cvtepi16_epi8
#define _mm512_cvtepi16_epi8 ::emulation::cvtepi16_epi8
#undef _mm512_cvtepi32_epi64
#define _mm512_cvtepi32_epi64 ::emulation::cvtepi32_epi64
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 ::emulation::cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 ::emulation::cvtepi32_epi8
#undef _mm512_cvtepi32_pd
#define _mm512_cvtepi32_pd ::emulation::cvtepi32_pd
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps ::emulation::cvtepi32_ps
#undef _mm512_cvtepi8_epi16
#define _mm512_cvtepi8_epi16 ::emulation::cvtepi8_epi16
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16 ::emulation::cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 ::emulation::cvtepu8_epi32
#undef _mm512_cvtpd_ps
#define _mm512_cvtpd_ps ::emulation::cvtpd_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 ::emulation::cvtps_epi32
#undef _mm512_cvtps_pd
#define _mm512_cvtps_pd ::emulation::cvtps_pd
#undef _mm512_div_pd
#define _mm512_div_pd ::emulation::div_pd
#undef _mm512_div_ps
#define _mm512_div_ps ::emulation::div_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 ::emulation::dpbusd_epi32
#undef _mm512_dpwssd_epi32
#define _mm512_dpwssd_epi32 ::emulation::dpwssd_epi32
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps ::emulation::extractf32x8_ps
#undef _mm512_extracti32x4_epi32
#define _mm512_extracti32x4_epi32 ::emulation::extracti32x4_epi32
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 ::emulation::extracti64x4_epi64
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps ::emulation::fmadd_ps
#undef _mm512_gf2p8affine_epi64_epi8
#define _mm512_gf2p8affine_epi64_epi8 ::emulation::gf2p8affine_epi64_epi8
#undef _mm512_i32gather_epi32
#define _mm512_i32gather_epi32 ::emulation::i32gather_epi32
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps ::emulation::i32gather_ps
#undef _mm512_insertf32x8
#define _mm512_insertf32x8 ::emulation::insertf32x8
#undef _mm512_inserti32x4
#define _mm512_inserti32x4 ::emulation::inserti32x4
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 ::emulation::inserti64x4
#undef _mm512_load_si512
#define _mm512_load_si512 ::emulation::load_aligned
#undef _mm512_loadu_ps
#define _mm512_loadu_ps ::emulation::loaded<::emulation::F512>
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 ::emulation::loaded<::emulation::I512>
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 ::emulation::madd_epi16
#undef _mm512_maddubs_epi16
#define _mm512_maddubs_epi16 ::emulation::maddubs_epi16
#undef _mm512_mask_blend_epi8
#define _mm512_mask_blend_epi8 ::emulation::mask_blend_epi8
#undef _mm512_mask_compressstoreu_ps
#define _mm512_mask_compressstoreu_ps ::emulation::mask_compressstoreu_ps
#undef _mm512_mask_cvtepi32_storeu_epi8
#define _mm512_mask_cvtepi32_storeu_epi8 ::emulation::mask_cvtepi32_storeu_epi8
#undef _mm512_mask_expand_epi8
#define _mm512_mask_expand_epi8 ::emulation::mask_expand_epi8
#undef _mm512_mask_i32gather_epi32
#define _mm512_mask_i32gather_epi32 ::emulation::mask_i32gather_epi32
#undef _mm512_mask_loadu_epi32
#define _mm512_mask_loadu_epi32 ::emulation::mask_loadu_epi32
#undef _mm512_mask_permutexvar_epi8
#define _mm512_mask_permutexvar_epi8 ::emulation::mask_permutexvar_epi8
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 ::emulation::mask_storeu_epi32
#undef _mm512_mask_storeu_epi8
#define _mm512_mask_storeu_epi8 ::emulation::mask_storeu_epi8
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps ::emulation::mask_storeu_ps
#undef _mm512_maskz_compress_epi32
#define _mm512_maskz_compress_epi32 ::emulation::maskz_compress_epi32
#undef _mm512_maskz_expandloadu_ps
#define _mm512_maskz_expandloadu_ps ::emulation::maskz_expandloadu_ps
#undef _mm512_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi32 ::emulation::maskz_loadu_epi32
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 ::emulation::maskz_loadu_epi8
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps ::emulation::maskz_loadu_ps
#undef _mm512_max_epi32
#define _mm512_max_epi32 ::emulation::max_epi32
#undef _mm512_max_epi8
#define _mm512_max_epi8 ::emulation::max_epi8
#undef _mm512_max_epu8
#define _mm512_max_epu8 ::emulation::max_epu8
#undef _mm512_max_ps
#define _mm512_max_ps ::emulation::max_ps
#undef _mm512_min_epi32
#define _mm512_min_epi32 ::emulation::min_epi32
#undef _mm512_min_epi8
#define _mm512_min_epi8 ::emulation::min_epi8
#undef _mm512_min_epu8
#define _mm512_min_epu8 ::emulation::min_epu8
#undef _mm512_min_ps
#define _mm512_min_ps ::emulation::min_ps
#undef _mm512_movepi8_mask
#define _mm512_movepi8_mask ::emulation::movepi8_mask
#undef _mm512_mul_ps
#define _mm512_mul_ps ::emulation::mul_ps
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 ::emulation::mullo_epi32
#undef _mm512_or_si512
#define _mm512_or_si512 ::emulation::or_si512
#undef _mm512_packs_epi32
#define _mm512_packs_epi32 ::emulation::packs_epi32
#undef _mm512_packus_epi16
#define _mm512_packus_epi16 ::emulation::packus_epi16
#undef _mm512_permutex2var_epi32
#define _mm512_permutex2var_epi32 ::emulation::permute_two<uint32_t>
#undef _mm512_permutex2var_epi8
#define _mm512_permutex2var_epi8 ::emulation::permute_two<uint8_t>
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32 ::emulation::permutexvar_epi32
#undef _mm512_reduce_add_epi64
#define _mm512_reduce_add_epi64 ::emulation::reduce_add_epi64
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps ::emulation::roundscale_ps
#undef _mm512_sad_epu8
#define _mm512_sad_epu8 ::emulation::sad_epu8
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 ::emulation::set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 ::emulation::set1_epi32
#undef _mm512_set1_epi64
#define _mm512_set1_epi64 ::emulation::set1_epi64
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 ::emulation::set1_epi8
#undef _mm512_set1_pd
#define _mm512_set1_pd ::emulation::set1_pd
#undef _mm512_set1_ps
#define _mm512_set1_ps ::emulation::set1_ps
#undef _mm512_set_epi32
#define _mm512_set_epi32 ::emulation::set_epi32
#undef _mm512_setzero_pd
#define _mm512_setzero_pd ::emulation::setzero_pd
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 ::emulation::setzero_si512
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32 ::emulation::shuffle_epi32
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 ::emulation::shuffle_epi8
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 ::emulation::slli_epi16
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 ::emulation::slli_epi32
#undef _mm512_srai_epi16
#define _mm512_srai_epi16 ::emulation::srai_epi16
#undef _mm512_srai_epi32
#define _mm512_srai_epi32 ::emulation::srai_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 ::emulation::srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 ::emulation::srli_epi32
#undef _mm512_store_si512
#define _mm512_store_si512 ::emulation::store_aligned
#undef _mm512_storeu_ps
#define _mm512_storeu_ps ::emulation::stored<::emulation::F512>
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 ::emulation::stored<::emulation::I512>
#undef _mm512_sub_epi16
#define _mm512_sub_epi16 ::emulation::sub_epi16
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 ::emulation::sub_epi32
#undef _mm512_sub_epi8
#define _mm512_sub_epi8 ::emulation::sub_epi8
#undef _mm512_sub_pd
#define _mm512_sub_pd ::emulation::sub_pd
#undef _mm512_sub_ps
#define _mm512_sub_ps ::emulation::sub_ps
#undef _mm512_test_epi32_mask
#define _mm512_test_epi32_mask ::emulation::test_epi32_mask
#undef _mm512_unpackhi_epi16
#define _mm512_unpackhi_epi16 ::emulation::unpackhi_epi16
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 ::emulation::unpackhi_epi32
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 ::emulation::unpackhi_epi64
#undef _mm512_unpackhi_epi8
#define _mm512_unpackhi_epi8 ::emulation::unpackhi_epi8
#undef _mm512_unpacklo_epi16
#define _mm512_unpacklo_epi16 ::emulation::unpacklo_epi16
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 ::emulation::unpacklo_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 ::emulation::unpacklo_epi64
#undef _mm512_unpacklo_epi8
#define _mm512_unpacklo_epi8 ::emulation::unpacklo_epi8
#undef _mm512_xor_si512
#define _mm512_xor_si512 ::emulation::xor_si512
#undef _mm_mask_storeu_epi8
#define _mm_mask_storeu_epi8 ::emulation::mask_storeu_epi8_128
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 ::emulation::maskz_loadu_epi8_128

// AVX-512 with VBMI2: vpexpandb puts the nonzero weights of a bitmask tile where they belong, 64 at
// once (formats/FORMATS.md, "Panels").
#include <immintrin.h>

#include <cstring>

#include "cpu/isa/shared/unrolled.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

#include "cpu/isa/avx512vnni/gfni512.inl"
#include "cpu/isa/shared/planar.inl"

// How far ahead of their use bytes are fetched; weights that are used once come from memory.
constexpr int64_t kFetchAhead = 6144;
// Lines for each tile: of one that is half zeros, and one more, because tiles begin anywhere.
template <int kBits>
constexpr int kFetchLines = kBits + 3;

/// One stream of a tile: the fields of the nonzeros that lie kAt bits up in a weight.
template <int kBits, int kWidth, int kAt>
struct Stream {
  static constexpr int kSections = 8 / kWidth;
  const uint8_t* begin;
  const uint8_t* at;  // the next nonzero of the section

  explicit Stream(const uint8_t* p) : begin(p), at(p) {}

  template <int kVector>
  [[gnu::always_inline]] __m512i fields() {
    constexpr int kSection = kVector / (2 * kWidth);
    if constexpr (kVector % (2 * kWidth) == 0) at = begin;
    const __m512i chunk = _mm512_loadu_si512(at);
    if constexpr (kWidth == 8)
      return chunk;
    else
      return Gfni512::field<kBits, kWidth, kSection, kAt>(chunk);
  }
};

/// The vectors of one bitmask tile, to be taken in order.
template <int kBits>
struct Tile {
  static constexpr bool k8 = kBits == 8, k4 = !k8 && (kBits & 4) != 0;
  static constexpr bool k2 = !k8 && (kBits & 2) != 0, k1 = !k8 && (kBits & 1) != 0;
  static constexpr int kStreams = k8 + k4 + k2 + k1;
  static constexpr int kFirst = k8 ? 8 : k4 ? 4 : 2;  // widths of the streams
  static constexpr int kSecond = k4 && k2 ? 2 : 1;
  static constexpr int kMaskAt = 2 * kStreams;

  const uint8_t* const mask;
  Stream<kBits, kFirst, 0> first;
  Stream<kBits, kSecond, kFirst % 8> second;
  Stream<kBits, 1, (kFirst + kSecond) % 8> third;
  const uint8_t* const end;
  // What a vector is expanded into. Zen 5 lets vpexpandb wait for the register that it overwrites,
  // even where it zeroes the rest; a copy of zeros, which takes no time, has nothing to wait for.
  // (The compiler must not see that they are zeros: it would leave the copy out.)
  __m512i zeros = _mm512_setzero_si512();

  static int64_t length(const uint8_t* tile, int stream) {
    uint16_t bytes;
    std::memcpy(&bytes, tile + 2 * stream, 2);
    return bytes;
  }
  explicit Tile(const uint8_t* tile)
      : mask(tile + kMaskAt),
        first(mask + formats::kTileBytes / 8),
        second(first.begin + length(tile, 0)),
        third(second.begin + (kStreams > 1 ? length(tile, 1) : 0)),
        end(third.begin + (kStreams > 2 ? length(tile, 2) : 0)) {
#ifdef __AVX512F__  // not in tests, over instructions in software
    asm("" : "+v"(zeros));
#endif
  }

  template <int kVector>
  [[gnu::always_inline]] __m512i vector() {
    uint64_t bits;
    std::memcpy(&bits, mask + kVector * 8, 8);
    __m512i packed = first.template fields<kVector>();
    if constexpr (kStreams > 1) packed = _mm512_or_si512(packed, second.template fields<kVector>());
    if constexpr (kStreams > 2) packed = _mm512_or_si512(packed, third.template fields<kVector>());
    const int count = static_cast<int>(_mm_popcnt_u64(bits));
    first.at += count;
    if constexpr (kStreams > 1) second.at += count;
    if constexpr (kStreams > 2) third.at += count;
    return _mm512_mask_expand_epi8(zeros, bits, packed);
  }
};

template <int kVector>
[[gnu::always_inline]] inline void fetch_line(const uint8_t* tile) {
  _mm_prefetch(reinterpret_cast<const char*>(tile + kFetchAhead + kVector * 64), _MM_HINT_T0);
}

template <int kBits>
void expand(const uint8_t* packed, int64_t count, int8_t* out) {
  for (int64_t i = 0; i < count; ++i, out += formats::kTileBytes) {
    Tile<kBits> tile(packed);
    unrolled<0, kTileVectors>([&](auto v) __attribute__((always_inline)) {
      if constexpr (v.value < kFetchLines<kBits>) fetch_line<v.value>(packed);
      _mm512_storeu_si512(out + v.value * 64, tile.template vector<v.value>());
    });
    packed = tile.end;
  }
}

template <int kBits, int kRows>
void multiply(const GemvArgs& g) {
  constexpr int kSplit = kRows >= 4 ? 1 : kRows >= 2 ? 2 : 4;  // a product waits for none before it
  const uint8_t* packed = g.packed;
  for (int64_t t = 0; t < g.column_tiles; ++t) {
    __m512i sums[kSplit][kRows];
    unrolled<0, kSplit * kRows>([&](auto i) __attribute__((always_inline)) {
      sums[i.value / kRows][i.value % kRows] = _mm512_setzero_si512();
    });
    for (int64_t s = 0; s < g.steps; ++s) {
      Tile<kBits> tile(packed);
      const int64_t step = g.step_offsets[s];
      unrolled<0, kTileVectors>([&](auto v) __attribute__((always_inline)) {
        if constexpr (v.value < kFetchLines<kBits>) fetch_line<v.value>(packed);
        const __m512i w = tile.template vector<v.value>();
        unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
          __m512i& sum = sums[v.value % kSplit][r.value];
          sum = _mm512_dpbusd_epi32(
              sum, Gfni512::broadcast(g.activations[r.value] + step + v.value * 4), w);
        });
      });
      packed = tile.end;
    }
    unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
      __m512i sum = sums[0][r.value];
      unrolled<1, kSplit>([&](auto k) __attribute__((always_inline)) {
        sum = _mm512_add_epi32(sum, sums[k.value][r.value]);
      });
      _mm512_storeu_si512(g.sums + r.value * g.sums_stride + t * formats::kTileWidth, sum);
    });
  }
}

template <int kBits>
void multiply_rows(const GemvArgs& g) {
  switch (g.rows) {
    case 1:
      return multiply<kBits, 1>(g);
    case 2:
      return multiply<kBits, 2>(g);
    case 3:
      return multiply<kBits, 3>(g);
    default:
      return multiply<kBits, 4>(g);
  }
}

}  // namespace

void expand_tiles_vbmi2(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  switch (bits) {
    case 2:
      return expand<2>(packed, count, out);
    case 3:
      return expand<3>(packed, count, out);
    case 4:
      return expand<4>(packed, count, out);
    case 5:
      return expand<5>(packed, count, out);
    case 6:
      return expand<6>(packed, count, out);
    case 7:
      return expand<7>(packed, count, out);
    default:
      return expand<8>(packed, count, out);
  }
}

void gemv_vbmi2(const GemvArgs& g) {
  switch (g.bits) {
    case 2:
      return multiply_rows<2>(g);
    case 3:
      return multiply_rows<3>(g);
    case 4:
      return multiply_rows<4>(g);
    case 5:
      return multiply_rows<5>(g);
    case 6:
      return multiply_rows<6>(g);
    case 7:
      return multiply_rows<7>(g);
    default:
      return multiply_rows<8>(g);
  }
}

}  // namespace adalayer::cpu

// Unpacking with GFNI: gf2p8affineqb moves any bit of a byte to any other, so one instruction
// extracts a field of 64 weights, puts it in place and extends its sign.
#include <immintrin.h>

#include <cstring>

#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

struct Matrices {
  int streams = 0;
  int width[3] = {};
  __m512i matrix[3][8];
};

/// Row i of an affine matrix (byte 7 - i of the quadword) selects the input bits of output bit i.
Matrices make_matrices(int bits) {
  Matrices m;
  int shift = 0;
  for (int left = bits; left > 0;) {
    const int width = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const bool top = left == width;
    for (int t = 0; t < 8 / width; ++t) {
      uint64_t q = 0;
      for (int i = shift; i < 8; ++i) {
        int from = i - shift;
        if (from >= width) {
          if (!top) break;
          from = width - 1;  // sign extension copies the top bit upwards
        }
        q |= uint64_t{1} << ((7 - i) * 8 + t * width + from);
      }
      m.matrix[m.streams][t] = _mm512_set1_epi64(static_cast<long long>(q));
    }
    m.width[m.streams++] = width;
    shift += width;
    left -= width;
  }
  return m;
}

template <int kStreams>
void unpack(const uint8_t* packed, const Matrices& m, int bits, int64_t count, int8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    for (int v = 0; v < formats::kTileBytes / 64; ++v) {
      __m512i value = _mm512_setzero_si512();
      const uint8_t* stream = packed;
      for (int k = 0; k < kStreams; ++k) {
        const int per_chunk = 8 / m.width[k];
        const __m512i chunk = _mm512_loadu_si512(stream + v / per_chunk * 64);
        value = _mm512_or_si512(
            value, _mm512_gf2p8affine_epi64_epi8(chunk, m.matrix[k][v % per_chunk], 0));
        stream += formats::kTileBytes / 8 * m.width[k];
      }
      _mm512_storeu_si512(out + v * 64, value);
    }
    packed += formats::kTileBytes / 8 * bits;
    out += formats::kTileBytes;
  }
}

/// One stream (4 or 2 bits): every chunk is loaded once and feeds all its vectors.
template <int kWidth>
void unpack_single(const uint8_t* packed, const Matrices& m, int64_t count, int8_t* out) {
  constexpr int kPerChunk = 8 / kWidth;
  const int64_t chunks = count * formats::kTileBytes / 64 / kPerChunk;
  __m512i matrix[kPerChunk];
  for (int t = 0; t < kPerChunk; ++t)
    matrix[t] = m.matrix[0][t];
  for (int64_t i = 0; i < chunks; ++i) {
    const __m512i chunk = _mm512_loadu_si512(packed + i * 64);
#pragma GCC unroll 4
    for (int t = 0; t < kPerChunk; ++t)
      _mm512_storeu_si512(out + (i * kPerChunk + t) * 64,
                          _mm512_gf2p8affine_epi64_epi8(chunk, matrix[t], 0));
  }
}

}  // namespace

void unpack_tiles_gfni(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  if (bits == 8) {
    std::memcpy(out, packed, static_cast<size_t>(count) * formats::kTileBytes);
    return;
  }
  const Matrices m = make_matrices(bits);
  if (bits == 4) return unpack_single<4>(packed, m, count, out);
  if (bits == 2) return unpack_single<2>(packed, m, count, out);
  if (m.streams == 2) return unpack<2>(packed, m, bits, count, out);
  return unpack<3>(packed, m, bits, count, out);
}

}  // namespace adalayer::cpu

// AMX int8: tdpbusd multiplies a 16 x 64 tile of u8 by a 64 x 16 tile of s8 into 16 x 16 int32.
#include <immintrin.h>

#include "cpu/isa/avx512/avx512.hpp"
#include "cpu/isa/avx512vnni/avx512vnni.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace amx {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

/// All eight tiles are full (16 rows of 64 bytes): a product costs the same whatever its row count.
constexpr TileConfig full_tiles() {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = 16;
  }
  return config;
}
// A constant in memory: the intrinsic tells g++ 12 about eight of its 64 bytes only, so stores to a
// local would be dropped.
constinit const TileConfig kFullTiles = full_tiles();

void begin() { _tile_loadconfig(&kFullTiles); }

/// Released before returning to the caller: oneDNN shares the thread and wants its own.
void end() { _tile_release(); }

// The tile intrinsics of g++ 12 carry no memory clobber; without the barriers a load could move
// above the stores that fill the unpacked weights.
inline void compiler_barrier() { __asm__ volatile("" ::: "memory"); }

// ------------------------------------------------------------------------------- packed weights

/// gf2p8affineqb matrices that extract field t of a stream of `width` bits, put it at bit `shift`
/// and, for the topmost stream, extend its sign. Row i (byte 7 - i) selects output bit i's input.
constexpr uint64_t field_matrix(int width, int t, int shift, bool top) {
  uint64_t matrix = 0;
  for (int i = shift; i < 8; ++i) {
    int from = i - shift;
    if (from >= width) {
      if (!top) break;
      from = width - 1;
    }
    matrix |= uint64_t{1} << ((7 - i) * 8 + t * width + from);
  }
  return matrix;
}

/// One stream of one tile: vector v of the tile is field v % (8 / width) of chunk v / (8 / width).
template <int kWidth, int kShift, bool kTop>
inline __m512i field(const uint8_t* stream, int v) {
  constexpr int kPerChunk = 8 / kWidth;
  const __m512i chunk = _mm512_loadu_si512(stream + v / kPerChunk * 64);
  const auto matrix = static_cast<long long>(field_matrix(kWidth, v % kPerChunk, kShift, kTop));
  return _mm512_gf2p8affine_epi64_epi8(chunk, _mm512_set1_epi64(matrix), 0);
}

template <int kBits>
inline __attribute__((always_inline)) void unpack_tile(const uint8_t* packed, int8_t* out) {
#pragma GCC unroll 16
  for (int v = 0; v < 16; ++v) {
    __m512i value;
    if constexpr (kBits == 2) {
      value = field<2, 0, true>(packed, v);
    } else if constexpr (kBits == 3) {
      value = _mm512_or_si512(field<2, 0, false>(packed, v), field<1, 2, true>(packed + 256, v));
    } else if constexpr (kBits == 4) {
      value = field<4, 0, true>(packed, v);
    } else if constexpr (kBits == 5) {
      value = _mm512_or_si512(field<4, 0, false>(packed, v), field<1, 4, true>(packed + 512, v));
    } else if constexpr (kBits == 6) {
      value = _mm512_or_si512(field<4, 0, false>(packed, v), field<2, 4, true>(packed + 512, v));
    } else {
      static_assert(kBits == 7);
      value = _mm512_or_si512(
          _mm512_or_si512(field<4, 0, false>(packed, v), field<2, 4, false>(packed + 512, v)),
          field<1, 6, true>(packed + 768, v));
    }
    _mm512_store_si512(out + v * 64, value);
  }
}

/// Steps between unpacking a tile and multiplying it: its stores have left the store buffer by
/// then.
constexpr int64_t kLag = 3;

/// kBits: 2..7 unpacks each step's tiles `kLag` steps ahead; 8 multiplies tiles as they are.
template <int kBits, int kRowTiles, int kCols>
void block_loop(const BlockArgs& b) {
  const int64_t stride = b.row_stride, steps = b.steps;
  const int8_t* tiles[kCols];
  for (int c = 0; c < kCols; ++c)
    tiles[c] =
        kBits == 8 && b.bits == 8 ? reinterpret_cast<const int8_t*>(b.packed[c]) : b.unpacked[c];
  [[maybe_unused]] const auto unpack_step = [&](int64_t s) {
    if constexpr (kBits < 8) {
      for (int c = 0; c < kCols; ++c)
        unpack_tile<kBits>(b.packed[c] + s * 128 * kBits, b.unpacked[c] + s * formats::kTileBytes);
    }
  };
  if constexpr (kBits < 8) {
    for (int64_t s = 0; s < kLag && s < steps; ++s)
      unpack_step(s);
  }
  const uint8_t* prefetch = b.prefetch;
  const uint8_t* const prefetch_end = b.prefetch + b.prefetch_bytes;
  _tile_zero(0);
  if constexpr (kRowTiles * kCols > 1) _tile_zero(1);
  if constexpr (kRowTiles * kCols > 2) _tile_zero(2);
  if constexpr (kRowTiles * kCols > 3) _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (kBits < 8) {
      if (s + kLag < steps) unpack_step(s + kLag);
      compiler_barrier();
    }
    const uint8_t* a = b.activations + b.step_offsets[s];
    const int64_t w = s * formats::kTileBytes;
    if constexpr (kCols == 2) {
      _tile_loadd(4, a, stride);
      _tile_loadd(6, tiles[0] + w, 64);
      _tile_loadd(7, tiles[1] + w, 64);
      if constexpr (kRowTiles == 2) _tile_loadd(5, a + 16 * stride, stride);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      if constexpr (kRowTiles == 2) {
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
    } else {
      _tile_loadd(4, tiles[0] + w, 64);
      _tile_loadd(5, a, stride);
      if constexpr (kRowTiles > 1) _tile_loadd(6, a + 16 * stride, stride);
      if constexpr (kRowTiles > 2) _tile_loadd(7, a + 32 * stride, stride);
      _tile_dpbusd(0, 5, 4);
      if constexpr (kRowTiles > 3) _tile_loadd(5, a + 48 * stride, stride);
      if constexpr (kRowTiles > 1) _tile_dpbusd(1, 6, 4);
      if constexpr (kRowTiles > 2) _tile_dpbusd(2, 7, 4);
      if constexpr (kRowTiles > 3) _tile_dpbusd(3, 5, 4);
    }
    for (int i = 0; i < 4 && prefetch < prefetch_end; ++i, prefetch += 64)
      _mm_prefetch(prefetch, _MM_HINT_T1);
  }
  constexpr int64_t kRowBytes = 64 * kCols;
  constexpr int kTile = 16 * 16 * kCols;
  _tile_stored(0, b.sums, kRowBytes);
  if constexpr (kCols == 2) {
    _tile_stored(1, b.sums + 16, kRowBytes);
    if constexpr (kRowTiles == 2) {
      _tile_stored(2, b.sums + kTile, kRowBytes);
      _tile_stored(3, b.sums + kTile + 16, kRowBytes);
    }
  } else {
    if constexpr (kRowTiles > 1) _tile_stored(1, b.sums + kTile, kRowBytes);
    if constexpr (kRowTiles > 2) _tile_stored(2, b.sums + 2 * kTile, kRowBytes);
    if constexpr (kRowTiles > 3) _tile_stored(3, b.sums + 3 * kTile, kRowBytes);
  }
  compiler_barrier();
}

template <int kBits>
void block_shape(const BlockArgs& b) {
  const int row_tiles = (b.rows + 15) / 16;
  if (b.packed[1] != nullptr) {
    row_tiles == 1 ? block_loop<kBits, 1, 2>(b) : block_loop<kBits, 2, 2>(b);
    return;
  }
  switch (row_tiles) {
    case 1:
      return block_loop<kBits, 1, 1>(b);
    case 2:
      return block_loop<kBits, 2, 1>(b);
    case 3:
      return block_loop<kBits, 3, 1>(b);
    default:
      return block_loop<kBits, 4, 1>(b);
  }
}

void block(const BlockArgs& b) {
  compiler_barrier();
  switch (b.unpack ? b.bits : 8) {
    case 2:
      return block_shape<2>(b);
    case 3:
      return block_shape<3>(b);
    case 4:
      return block_shape<4>(b);
    case 5:
      return block_shape<5>(b);
    case 6:
      return block_shape<6>(b);
    case 7:
      return block_shape<7>(b);
    default:
      return block_shape<8>(b);
  }
}

}  // namespace
}  // namespace amx

const KernelRow kAmxRow{
    .name = "amx",
    .isa = Isa::Amx,
    .quantize_row = avx512::quantize_row,
    .quantize_planar = avx512::quantize_planar,
    .fake_quantize = avx512::fake_quantize,
    .unpack_tiles = avx512::unpack_tiles,
    .begin = amx::begin,
    .end = amx::end,
    .positions = Positions::Flattened,
    .gemm = avx512vnni::gemm,
    .gemm_requantize = avx512vnni::gemm_requantize,
    .gemv = avx512vnni::gemv,
    .store = avx512::store,
    .requantize = avx512::requantize,
    .block = amx::block,
    .stem = {avx512::quantize_quads, avx512::interleave_pairs, avx512::interleave_fours},
    .grouped = &avx512vnni::kGrouped,
    .winograd = &avx512vnni::kWinograd,
    .image = &kAvx512Image};

}  // namespace adalayer::cpu

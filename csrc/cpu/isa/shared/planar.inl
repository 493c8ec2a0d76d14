// Planar tiles (FORMATS.md, "Panels") over any vector type: unpacking, and matrix times vector.
// Included inside the unnamed namespace of one ISA file only, so that no instruction of it can
// reach another machine through the linker; that file includes cpu/isa/shared/unrolled.hpp.
//
// V offers:
//   T, kBytes, load, store, bit_or
//   field<kBits, kWidth, kT, kAt>(chunk)  the kWidth-bit field kT of every byte, at bit kAt
//   finish<kBits>(u)                      sign extension, where `field` has not done it
// and for gemv_planar:
//   broadcast(p)      the four bytes at p in every dword
//   kRun<kBits>       how many partial products are added before they go into a sum of int32
//   product(a, w)     partial dot products of u8 and s8, and add_products(p, q), add_to(sum, p);
//   dot(sum, a, w)    in place of those where kRun is 1: sum + products of four u8 and s8 each
//   add(a, b), store_sums(p, v), zero()

constexpr int kTileVectors = formats::kTileBytes / 64;  // vectors of 64 weights in a tile

/// One field of vector kVector; kStream is where its stream starts, in units of one bit per weight.
template <class V, int kBits, int kVector, int kWidth, int kStream>
inline __attribute__((always_inline)) typename V::T decode_field(const uint8_t* tile, int part) {
  constexpr int kPerChunk = 8 / kWidth;
  constexpr int kChunk = formats::kTileBytes / 8 * kStream + kVector / kPerChunk * 64;
  return V::template field<kBits, kWidth, kVector % kPerChunk, kStream>(
      V::load(tile + kChunk + part));
}

/// Weights 64 * kVector + part ... of a packed tile as signed bytes.
template <class V, int kBits, int kVector>
inline __attribute__((always_inline)) typename V::T decode(const uint8_t* tile, int part) {
  if constexpr (kBits == 8) {
    return V::load(tile + kVector * 64 + part);
  } else {
    // Streams of 4, 2 and 1 bits, the lowest bits of a weight first.
    constexpr bool k4 = (kBits & 4) != 0, k2 = (kBits & 2) != 0, k1 = (kBits & 1) != 0;
    constexpr int kAt2 = k4 ? 4 : 0, kAt1 = kAt2 + (k2 ? 2 : 0);
    typename V::T u;
    if constexpr (k4)
      u = decode_field<V, kBits, kVector, 4, 0>(tile, part);
    else
      u = decode_field<V, kBits, kVector, 2, 0>(tile, part);
    if constexpr (k4 && k2) u = V::bit_or(u, decode_field<V, kBits, kVector, 2, kAt2>(tile, part));
    if constexpr (k1) u = V::bit_or(u, decode_field<V, kBits, kVector, 1, kAt1>(tile, part));
    return V::template finish<kBits>(u);
  }
}

// How far ahead of their use packed weights are fetched. They come from memory, once, and the
// hardware's own prefetcher stops at every page.
constexpr int64_t kPrefetchAhead = 4096;

/// Fetches the lines of the tile that lies kPrefetchAhead further, spread over the vectors of this
/// one. Past the end of the weights it touches nothing: a prefetch cannot fault.
template <int kBits, int kVector>
inline __attribute__((always_inline)) void prefetch_line(const uint8_t* tile) {
  if constexpr (kVector < 2 * kBits) __builtin_prefetch(tile + kPrefetchAhead + kVector * 64);
}

template <class V, int kBits>
void unpack_tiles_bits(const uint8_t* packed, int64_t count, int8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    unrolled<0, kTileVectors>([&](auto v) __attribute__((always_inline)) {
      prefetch_line<kBits, v.value>(packed);
      for (int part = 0; part < 64; part += V::kBytes)
        V::store(out + v.value * 64 + part, decode<V, kBits, v.value>(packed, part));
    });
    packed += formats::kTileBytes / 8 * kBits;
    out += formats::kTileBytes;
  }
}

template <class V>
void unpack_planar(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  switch (bits) {
    case 2:
      return unpack_tiles_bits<V, 2>(packed, count, out);
    case 3:
      return unpack_tiles_bits<V, 3>(packed, count, out);
    case 4:
      return unpack_tiles_bits<V, 4>(packed, count, out);
    case 5:
      return unpack_tiles_bits<V, 5>(packed, count, out);
    case 6:
      return unpack_tiles_bits<V, 6>(packed, count, out);
    case 7:
      return unpack_tiles_bits<V, 7>(packed, count, out);
    default:
      std::memcpy(out, packed, static_cast<size_t>(count) * formats::kTileBytes);
  }
}

/// Matrix times 1 to 4 vectors: the weights go from memory through registers into the sums. Steps
/// are multiplied whole: the weights of bytes that do not count are zero.
template <class V, int kBits, int kRows>
void gemv_rows(const GemvArgs& g) {
  constexpr int kParts = 64 / V::kBytes;
  // Partial sums, so that a product need not wait for the one before it.
  constexpr int kSplit = kRows * kParts >= 8 ? 1 : kRows * kParts >= 4 ? 2 : 4;
  constexpr int kRun = V::template kRun<kBits>;
  const uint8_t* tile = g.packed;
  for (int64_t t = 0; t < g.column_tiles; ++t) {
    typename V::T sums[kSplit][kRows * kParts];
#pragma GCC unroll 4
    for (int k = 0; k < kSplit; ++k)
#pragma GCC unroll 8
      for (int i = 0; i < kRows * kParts; ++i)
        sums[k][i] = V::zero();
    for (int64_t s = 0; s < g.steps; ++s, tile += formats::kTileBytes / 8 * kBits) {
      const int64_t step = g.step_offsets[s];
      [[maybe_unused]] typename V::T run[kRows * kParts];
      unrolled<0, kTileVectors>([&](auto v) __attribute__((always_inline)) {
        prefetch_line<kBits, v.value>(tile);
        typename V::T w[kParts];
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p)
          w[p] = decode<V, kBits, v.value>(tile, p * V::kBytes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const typename V::T levels = V::broadcast(g.activations[r] + step + v.value * 4);
#pragma GCC unroll 2
          for (int p = 0; p < kParts; ++p) {
            auto& sum = sums[v.value % kSplit][r * kParts + p];
            if constexpr (kRun == 1) {
              sum = V::dot(sum, levels, w[p]);
            } else {
              auto& products = run[r * kParts + p];
              const typename V::T product = V::product(levels, w[p]);
              products = v.value % kRun == 0 ? product : V::add_products(products, product);
              if constexpr (v.value % kRun == kRun - 1) sum = V::add_to(sum, products);
            }
          }
        }
      });
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        typename V::T sum = sums[0][r * kParts + p];
#pragma GCC unroll 4
        for (int k = 1; k < kSplit; ++k)
          sum = V::add(sum, sums[k][r * kParts + p]);
        V::store_sums(g.sums + r * g.sums_stride + t * formats::kTileWidth + p * V::kBytes / 4,
                      sum);
      }
  }
}

template <class V, int kBits>
void gemv_bits(const GemvArgs& g) {
  switch (g.rows) {
    case 1:
      return gemv_rows<V, kBits, 1>(g);
    case 2:
      return gemv_rows<V, kBits, 2>(g);
    case 3:
      return gemv_rows<V, kBits, 3>(g);
    default:
      return gemv_rows<V, kBits, 4>(g);
  }
}

/// Widths below 8.
template <class V>
void gemv_narrow(const GemvArgs& g) {
  switch (g.bits) {
    case 2:
      return gemv_bits<V, 2>(g);
    case 3:
      return gemv_bits<V, 3>(g);
    case 4:
      return gemv_bits<V, 4>(g);
    case 5:
      return gemv_bits<V, 5>(g);
    case 6:
      return gemv_bits<V, 6>(g);
    default:
      return gemv_bits<V, 7>(g);
  }
}

template <class V>
void gemv_planar(const GemvArgs& g) {
  if (g.bits == 8)
    gemv_bits<V, 8>(g);
  else
    gemv_narrow<V>(g);
}

// Planar tile unpacking over any vector type. Included inside the namespace of one ISA file only,
// so that no instruction of it can reach another machine through the linker.
//
// V offers: kBytes, load, store, shr<n> (16-bit lanes), shl<n>, bit_and, bit_or, bit_xor, sub,
// set1.

template <class V, int kWidth, int kShift>
inline typename V::T extract_field(typename V::T chunk, int t) {
  // Shifts work on 16-bit lanes, so bits of the neighbouring byte come in; the mask drops them.
  typename V::T field = chunk;
  if constexpr (kWidth == 4) {
    field = t == 0 ? chunk : V::template shr<4>(chunk);
  } else if constexpr (kWidth == 2) {
    field = t == 0   ? chunk
            : t == 1 ? V::template shr<2>(chunk)
            : t == 2 ? V::template shr<4>(chunk)
                     : V::template shr<6>(chunk);
  } else {
    switch (t) {
      case 0:
        break;
      case 1:
        field = V::template shr<1>(chunk);
        break;
      case 2:
        field = V::template shr<2>(chunk);
        break;
      case 3:
        field = V::template shr<3>(chunk);
        break;
      case 4:
        field = V::template shr<4>(chunk);
        break;
      case 5:
        field = V::template shr<5>(chunk);
        break;
      case 6:
        field = V::template shr<6>(chunk);
        break;
      default:
        field = V::template shr<7>(chunk);
    }
  }
  field = V::bit_and(field, V::set1((1 << kWidth) - 1));
  if constexpr (kShift > 0) field = V::template shl<kShift>(field);
  return field;
}

template <class V, int kBits>
void unpack_tiles_bits(const uint8_t* packed, int64_t count, int8_t* out) {
  constexpr int kVectors = formats::kTileBytes / 64;
  constexpr bool k4 = kBits >= 4, k2 = kBits == 2 || kBits == 3 || kBits == 6 || kBits == 7;
  constexpr bool k1 = kBits % 2 == 1;
  constexpr int kAt2 = k4 ? 4 : 0, kAt1 = kAt2 + (k2 ? 2 : 0);
  constexpr int kBase2 = k4 ? 512 : 0, kBase1 = kBase2 + (k2 ? 256 : 0);
  const typename V::T sign = V::set1(1 << (kBits - 1));
  for (int64_t i = 0; i < count; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      for (int part = 0; part < 64; part += V::kBytes) {
        typename V::T u = V::set1(0);
        if constexpr (k4) u = extract_field<V, 4, 0>(V::load(packed + v / 2 * 64 + part), v % 2);
        if constexpr (k2)
          u = V::bit_or(
              u, extract_field<V, 2, kAt2>(V::load(packed + kBase2 + v / 4 * 64 + part), v % 4));
        if constexpr (k1)
          u = V::bit_or(
              u, extract_field<V, 1, kAt1>(V::load(packed + kBase1 + v / 8 * 64 + part), v % 8));
        V::store(out + v * 64 + part, V::sub(V::bit_xor(u, sign), sign));
      }
    }
    packed += formats::kTileBytes / 8 * kBits;
    out += formats::kTileBytes;
  }
}

template <class V>
void unpack_tiles_any(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
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

// Canonical dense bit-planes in device code: csrc/formats/FORMATS.md, section "Canonical".
#pragma once

#include <cstdint>

namespace adalayer::cuda {

/// Weight `i` of `count`. Its fields (4 bits, then 2, then 1; 8 is 4 + 4) lie in consecutive
/// streams, each padded to a whole byte.
template <int kBits>
__device__ __forceinline__ int8_t unpack_dense(const uint8_t* planes, int64_t count, int64_t i) {
  uint32_t value = 0;
  const uint8_t* stream = planes;
#pragma unroll
  for (int shift = 0; shift < kBits;) {
    const int left = kBits - shift;
    const int width = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const int64_t bit = i * width;
    const uint32_t field = (stream[bit >> 3] >> (bit & 7)) & ((1u << width) - 1);
    value |= field << shift;
    stream += (count * width + 7) / 8;
    shift += width;
  }
  constexpr int kSign = 1 << (kBits - 1);
  return static_cast<int8_t>((static_cast<int>(value) ^ kSign) - kSign);
}

}  // namespace adalayer::cuda

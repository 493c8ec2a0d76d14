// AVX-512-VNNI with GFNI: gf2p8affineqb moves any bit of a byte to any other, so one instruction
// extracts a field of 64 weights, puts it in place and extends its sign.
#include <immintrin.h>

#include <cstring>

#include "cpu/isa/shared/unrolled.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

#include "cpu/isa/avx512vnni/gfni512.inl"
#include "cpu/isa/shared/planar.inl"

}  // namespace

void unpack_tiles_gfni(const uint8_t* packed, int bits, int64_t count, int8_t* out) {
  unpack_planar<Gfni512>(packed, bits, count, out);
}

void gemv_gfni(const GemvArgs& g) { gemv_planar<Gfni512>(g); }

}  // namespace adalayer::cpu

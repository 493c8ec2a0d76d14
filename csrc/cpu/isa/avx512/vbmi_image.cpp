// Bytes through tables with AVX-512 VBMI: vpermb picks any of 64 bytes for each of 64 lanes,
// vpermi2b any of 128.
#include <immintrin.h>

#include "cpu/image_kernels.hpp"

namespace adalayer::cpu {
namespace {

__mmask64 mask64(int64_t left) { return left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1; }

/// One block of output lanes, all pixels; kSources input blocks in registers' worth of masks.
template <int kSources>
void gather_block(const GatherSource* sources, __m512i low, __mmask64 wanted, const Pixels& p,
                  const uint8_t* in, uint8_t* out) {
  for (int64_t i = 0; i < p.count; ++i, in += p.in_step, out += p.out_step) {
    __m512i v = _mm512_setzero_si512();
    for (int s = 0; s < kSources; ++s)
      v = _mm512_mask_permutexvar_epi8(
          v, sources[s].lanes, low,
          _mm512_maskz_loadu_epi8(sources[s].readable, in + sources[s].offset));
    _mm512_mask_storeu_epi8(out, wanted, v);
  }
}

void gather_many(const GatherSource* sources, int64_t count, __m512i low, __mmask64 wanted,
                 const Pixels& p, const uint8_t* in, uint8_t* out) {
  for (int64_t i = 0; i < p.count; ++i, in += p.in_step, out += p.out_step) {
    __m512i v = _mm512_setzero_si512();
    for (int64_t s = 0; s < count; ++s)
      v = _mm512_mask_permutexvar_epi8(
          v, sources[s].lanes, low,
          _mm512_maskz_loadu_epi8(sources[s].readable, in + sources[s].offset));
    _mm512_mask_storeu_epi8(out, wanted, v);
  }
}

}  // namespace

void lookup_vbmi(const uint8_t* table, const Pixels& p) {
  const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64);
  const __m512i t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192);
  const auto levels = [&](__m512i index) {
    // Bit 7 of the index chooses between the halves of the table.
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index),
                                  _mm512_permutex2var_epi8(t0, index, t1),
                                  _mm512_permutex2var_epi8(t2, index, t3));
  };
  for (int64_t i = 0; i < p.count; ++i) {
    const uint8_t* in = p.in + i * p.in_step;
    uint8_t* out = p.out + i * p.out_step;
    int64_t c = 0;
    for (; c + 64 <= p.bytes; c += 64)
      _mm512_storeu_si512(out + c, levels(_mm512_loadu_si512(in + c)));
    if (c < p.bytes) {
      const __mmask64 m = mask64(p.bytes - c);
      _mm512_mask_storeu_epi8(out + c, m, levels(_mm512_maskz_loadu_epi8(m, in + c)));
    }
  }
}

void gather_vbmi(const GatherPlan& plan, const Pixels& p) {
  const GatherSource* sources = plan.sources;
  for (int64_t c = 0, b = 0; c < p.bytes; c += 64, ++b) {
    const __m512i low = _mm512_loadu_si512(plan.low + c);
    const __mmask64 wanted = mask64(p.bytes - c);
    const GatherSource* end = plan.sources + plan.ends[b];
    switch (end - sources) {
      case 1:
        gather_block<1>(sources, low, wanted, p, p.in, p.out + c);
        break;
      case 2:
        gather_block<2>(sources, low, wanted, p, p.in, p.out + c);
        break;
      case 3:
        gather_block<3>(sources, low, wanted, p, p.in, p.out + c);
        break;
      case 4:
        gather_block<4>(sources, low, wanted, p, p.in, p.out + c);
        break;
      default:
        gather_many(sources, end - sources, low, wanted, p, p.in, p.out + c);
    }
    sources = end;
  }
}

}  // namespace adalayer::cpu

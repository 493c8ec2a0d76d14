#include "cpu/kernel_table.hpp"

#include <algorithm>
#include <array>
#include <bit>

namespace adalayer::cpu {

void do_nothing() {}

std::span<const KernelRow* const> kernel_rows() {
  static const std::array rows{
#ifdef ADALAYER_HAVE_AMX
      &kAmxRow,
#endif
#ifdef ADALAYER_HAVE_AVX512VNNI
      &kAvx512VnniRow,
#endif
#ifdef ADALAYER_HAVE_AVX512
      &kAvx512Row,
#endif
#ifdef ADALAYER_HAVE_AVXVNNI
      &kAvxVnniRow,
#endif
#ifdef ADALAYER_HAVE_AVX2
      &kAvx2Row,
#endif
#ifdef ADALAYER_HAVE_I8MM
      &kI8mmRow,
#endif
#ifdef ADALAYER_HAVE_DOTPROD
      &kDotprodRow,
#endif
#ifdef ADALAYER_HAVE_NEON
      &kNeonRow,
#endif
      static_cast<const KernelRow*>(nullptr),  // keeps the array non-empty on other machines
  };
  return {rows.data(), rows.size() - 1};
}

const KernelRow* active_kernels() {
  const Isa isa = active_isa();
  for (const KernelRow* row : kernel_rows())
    if (row->isa == isa) return row;
  return nullptr;
}

namespace {

/// The rows of AVX-512-VNNI, with which the kernels for its sub-features are compiled.
[[maybe_unused]] bool vnni512(const KernelRow& row) {
  return row.isa == Isa::Avx512Vnni || row.isa == Isa::Amx;
}
/// The rows that may use 512-bit registers.
[[maybe_unused]] bool wide(const KernelRow& row) { return row.isa == Isa::Avx512 || vnni512(row); }

}  // namespace

UnpackTiles unpacker(const KernelRow& row) {
#ifdef ADALAYER_HAVE_GFNI
  if (vnni512(row) && cpu_features().gfni) return unpack_tiles_gfni;
#endif
  return row.unpack_tiles;
}

Gemv gemv(const KernelRow& row) {
#ifdef ADALAYER_HAVE_GFNI
  if (vnni512(row) && cpu_features().gfni) return gemv_gfni;
#endif
  return row.gemv;
}

BitmaskKernels bitmask_kernels([[maybe_unused]] const KernelRow& row) {
#ifdef ADALAYER_HAVE_AVX512VBMI2
  if (vnni512(row) && cpu_features().avx512vbmi2 && cpu_features().gfni)
    return {expand_tiles_vbmi2, gemv_vbmi2};
#endif
  return {};
}

const ImageKernels& image_kernels() {
  const KernelRow* row = active_kernels();
  if (row == nullptr) return kScalarImage;
#ifdef ADALAYER_HAVE_AVX512VBMI
  if (wide(*row) && cpu_features().avx512vbmi) {
    static const ImageKernels with_vbmi = [&] {
      ImageKernels kernels = *row->image;  // the wide rows have the same ones
      kernels.lookup = lookup_vbmi;
      kernels.gather = gather_vbmi;
      return kernels;
    }();
    return with_vbmi;
  }
#endif
  return *row->image;
}

int product_bits(const KernelRow& row, int bits, int qmax) {
  if (row.isa != Isa::Avx2 && row.isa != Isa::Avx512) return bits;
  const int lacking = 8 - std::bit_width(static_cast<unsigned>(qmax));
  return std::max(2, bits - lacking);
}

Requantize requantizer(const KernelRow& row) {
#ifdef ADALAYER_HAVE_AVX512VBMI
  if (wide(row) && cpu_features().avx512vbmi) return requantize_vbmi;
#endif
  return row.requantize;
}

}  // namespace adalayer::cpu

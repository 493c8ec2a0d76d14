#include "cpu/kernel_table.hpp"

#include <array>

namespace adalayer::cpu {

std::span<const KernelRow* const> kernel_rows() {
  static const std::array rows{
#ifdef ADALAYER_HAVE_AMX
      &kAmxRow,
#endif
#ifdef ADALAYER_HAVE_AVX512VNNI
      &kAvx512VnniRow,
#endif
#ifdef ADALAYER_HAVE_AVX2
      &kAvx2Row,
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

UnpackTiles unpacker(const KernelRow& row) {
#ifdef ADALAYER_HAVE_GFNI
  if (row.isa != Isa::Avx2 && cpu_features().gfni) return unpack_tiles_gfni;
#endif
  return row.unpack_tiles;
}

Requantize requantizer(const KernelRow& row) {
#ifdef ADALAYER_HAVE_AVX512VBMI
  if (row.isa != Isa::Avx2 && cpu_features().avx512vbmi) return requantize_vbmi;
#endif
  return row.requantize;
}

}  // namespace adalayer::cpu

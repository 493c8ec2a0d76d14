#include "cpu/image_kernels.hpp"

#include "core/cpu_features.hpp"

namespace adalayer::cpu {
namespace {

#ifdef ADALAYER_HAVE_AVX512VNNI
const ImageKernels& avx512_kernels() {
#ifdef ADALAYER_HAVE_AVX512VBMI
  static const ImageKernels with_vbmi = [] {
    ImageKernels kernels = kAvx512Image;
    kernels.lookup = lookup_vbmi;
    kernels.gather = gather_vbmi;
    return kernels;
  }();
  if (cpu_features().avx512vbmi) return with_vbmi;
#endif
  return kAvx512Image;
}
#endif

}  // namespace

const ImageKernels& image_kernels() {
  switch (active_isa()) {
#ifdef ADALAYER_HAVE_AVX512VNNI
    case Isa::Amx:
    case Isa::Avx512Vnni:
      return avx512_kernels();
#endif
#ifdef ADALAYER_HAVE_AVX2
    case Isa::AvxVnni:
    case Isa::Avx2:
      return kAvx2Image;
#endif
    default:
      return kScalarImage;
  }
}

}  // namespace adalayer::cpu

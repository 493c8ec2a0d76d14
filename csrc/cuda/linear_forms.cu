// All forms of linear_small.
#include "cuda/linear_kernel.cuh"
#include "cuda/linear_plan.hpp"

namespace adalayer::cuda {

namespace {

template <bool kBfloat, int kBits, int kColumns>
KernelInfo form() {
  return {ADALAYER_KERNEL_ADDRESS((linear_small<kBfloat, kBits, kColumns>), LinearParams),
          32 * kLinearWarps, kLinearWarps * kColumns * 4 * 32 * 4};
}

template <bool kBfloat, int kColumns>
KernelInfo form_of(int bits) {
  switch (bits) {
    case 2:
      return form<kBfloat, 2, kColumns>();
    case 3:
      return form<kBfloat, 3, kColumns>();
    case 4:
      return form<kBfloat, 4, kColumns>();
    case 5:
      return form<kBfloat, 5, kColumns>();
    case 6:
      return form<kBfloat, 6, kColumns>();
    case 7:
      return form<kBfloat, 7, kColumns>();
    case 8:
      return form<kBfloat, 8, kColumns>();
    default:
      return {};
  }
}

}  // namespace

KernelInfo linear_kernel(int bits, bool bfloat, int columns) {
  if (bfloat) return columns == 1 ? form_of<true, 1>(bits) : form_of<true, 4>(bits);
  return columns == 1 ? form_of<false, 1>(bits) : form_of<false, 4>(bits);
}

}  // namespace adalayer::cuda

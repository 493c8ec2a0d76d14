// Convolution kernels for weights of 2 bits: a file each, so that they compile side by side.
#include "cuda/conv_forms.cuh"

namespace adalayer::cuda {
KernelInfo conv_kernel_b2(Tile tile, int piece) { return conv_form<2>(tile, piece); }
}  // namespace adalayer::cuda

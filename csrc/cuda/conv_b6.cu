// Convolution kernels for weights of 6 bits: a file each, so that they compile side by side.
#include "cuda/conv_forms.cuh"

namespace adalayer::cuda {
KernelInfo conv_kernel_b6(Tile tile, int piece) { return conv_form<6>(tile, piece); }
}  // namespace adalayer::cuda

// Convolution kernels for sparse weights of 2 bits: a file each, so that they compile side by side.
#include "cuda/conv_forms.cuh"

namespace adalayer::cuda {
KernelInfo sparse_kernel_b2(Tile tile, Form form) { return sparse_form<2>(tile, form); }
}  // namespace adalayer::cuda

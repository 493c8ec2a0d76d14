// Convolution kernels for sparse weights of 4 bits: a file each, so that they compile side by side.
#include "cuda/conv_forms.cuh"

namespace adalayer::cuda {
KernelInfo sparse_kernel_b4(Tile tile, Form form) { return sparse_form<4>(tile, form); }
}  // namespace adalayer::cuda

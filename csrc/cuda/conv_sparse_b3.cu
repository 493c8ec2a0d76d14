// Convolution kernels for sparse weights of 3 bits: a file each, so that they compile side by side.
#include "cuda/conv_forms.cuh"

namespace adalayer::cuda {
KernelInfo sparse_kernel_b3(Tile tile, Form form) { return sparse_form<3>(tile, form); }
}  // namespace adalayer::cuda

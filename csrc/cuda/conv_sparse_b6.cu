// Convolution kernels for sparse weights of 6 bits: a file each, so that they compile side by side.
#include "cuda/conv_forms.cuh"

namespace adalayer::cuda {
KernelInfo sparse_kernel_b6(Tile tile, Form form) { return sparse_form<6>(tile, form); }
}  // namespace adalayer::cuda

// Convolution kernels for sparse weights of 7 bits: a file each, so that they compile side by side.
#include "cuda/conv_forms.cuh"

namespace adalayer::cuda {
KernelInfo sparse_kernel_b7(Tile tile, Form form) { return sparse_form<7>(tile, form); }
}  // namespace adalayer::cuda

// Convolution kernels for sparse weights of 8 bits: a file each, so that they compile side by side.
#include "cuda/conv_forms.cuh"

namespace adalayer::cuda {
KernelInfo sparse_kernel_b8(Tile tile, Form form) { return sparse_form<8>(tile, form); }
}  // namespace adalayer::cuda

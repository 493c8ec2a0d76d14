// The table of kernels.
#include "cuda/kernels.hpp"

#include "cuda/attention.cuh"
#include "cuda/conv_simple.cuh"
#include "cuda/image_kernels.cuh"

namespace adalayer::cuda {

KernelInfo conv_kernel_b2(Tile tile, int piece);
KernelInfo sparse_kernel_b2(Tile tile, Form form);
KernelInfo conv_kernel_b3(Tile tile, int piece);
KernelInfo sparse_kernel_b3(Tile tile, Form form);
KernelInfo conv_kernel_b4(Tile tile, int piece);
KernelInfo sparse_kernel_b4(Tile tile, Form form);
KernelInfo conv_kernel_b5(Tile tile, int piece);
KernelInfo sparse_kernel_b5(Tile tile, Form form);
KernelInfo conv_kernel_b6(Tile tile, int piece);
KernelInfo sparse_kernel_b6(Tile tile, Form form);
KernelInfo conv_kernel_b7(Tile tile, int piece);
KernelInfo sparse_kernel_b7(Tile tile, Form form);
KernelInfo conv_kernel_b8(Tile tile, int piece);
KernelInfo sparse_kernel_b8(Tile tile, Form form);

KernelInfo conv_kernel(int bits, Tile tile, int piece, Form form) {
  constexpr KernelInfo (*kDense[])(Tile, int) = {conv_kernel_b2, conv_kernel_b3, conv_kernel_b4,
                                                 conv_kernel_b5, conv_kernel_b6, conv_kernel_b7,
                                                 conv_kernel_b8};
  constexpr KernelInfo (*kSparse[])(Tile, Form) = {
      sparse_kernel_b2, sparse_kernel_b3, sparse_kernel_b4, sparse_kernel_b5,
      sparse_kernel_b6, sparse_kernel_b7, sparse_kernel_b8};
  if (bits < 2 || bits > 8) return {};
  if (form == Form::Dense) return kDense[bits - 2](tile, piece);
  return piece == 16 ? kSparse[bits - 2](tile, form) : KernelInfo{};
}

KernelInfo kernel_info(Kernel kernel) {
  switch (kernel) {
    case Kernel::Quantize:
      return {ADALAYER_KERNEL_ADDRESS(quantize, QuantizeParams), 256, 0};
    case Kernel::Dequantize:
      return {ADALAYER_KERNEL_ADDRESS(dequantize, DequantizeParams), 256, 0};
    case Kernel::OnGrid:
      return {ADALAYER_KERNEL_ADDRESS(on_grid, GridParams), 256, 0};
    case Kernel::Lookup:
      return {ADALAYER_KERNEL_ADDRESS(lookup, LookupParams), 256, 256};
    case Kernel::Pair:
      return {ADALAYER_KERNEL_ADDRESS(pair, PairParams), 256, 0};
    case Kernel::AffineImage:
      return {ADALAYER_KERNEL_ADDRESS(affine_image, AffineImageParams), 256, 0};
    case Kernel::GroupNorm:
      return {ADALAYER_KERNEL_ADDRESS(group_norm, GroupNormParams), 32 * kNormWarps,
              16 * kNormWarps};
    case Kernel::Affine:
      return {ADALAYER_KERNEL_ADDRESS(affine, AffineParams), 256, 0};
    case Kernel::Move:
      return {ADALAYER_KERNEL_ADDRESS(move, MoveParams), 256, 0};
    case Kernel::Pool:
      return {ADALAYER_KERNEL_ADDRESS(pool, PoolParams), 256, 0};
    case Kernel::PoolLarge:
      return {ADALAYER_KERNEL_ADDRESS(pool_large, PoolParams), 32 * kPoolWarps,
              kPoolWarps * 4 * 32 * 4};
    case Kernel::Bilinear:
      return {ADALAYER_KERNEL_ADDRESS(bilinear, BilinearParams), 256, 0};
    case Kernel::LayerNorm:
      return {ADALAYER_KERNEL_ADDRESS(layer_norm, LayerNormParams), 128, 0};
    case Kernel::Attention:
      return {ADALAYER_KERNEL_ADDRESS(attention, AttentionParams), kAttentionThreads,
              4 * kAttentionThreads};
    case Kernel::AverageFloats:
      return {ADALAYER_KERNEL_ADDRESS(average_floats, FloatAverageParams), 256, 0};
    case Kernel::ResizeFloats:
      return {ADALAYER_KERNEL_ADDRESS(resize_floats, FloatResizeParams), 256, 0};
    case Kernel::Softmax:
      return {ADALAYER_KERNEL_ADDRESS(softmax, SoftmaxParams), 256, 256 * 4};
    case Kernel::FunctionFloats:
      return {ADALAYER_KERNEL_ADDRESS(function_floats, FloatFunctionParams), 256, 0};
    case Kernel::CombineFloats:
      return {ADALAYER_KERNEL_ADDRESS(combine_floats, FloatPairParams), 256, 0};
    case Kernel::Depthwise:
      return {ADALAYER_KERNEL_ADDRESS(conv_depthwise, DepthwiseParams), 128, 0};
    case Kernel::Direct:
      return {ADALAYER_KERNEL_ADDRESS(conv_direct, DirectParams), 128, 0};
  }
  return {};
}

}  // namespace adalayer::cuda

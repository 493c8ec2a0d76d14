// Direct convolution, one thread per output: plain enough to be compared with the scalar reference
// line by line. Kernels that are meant to be fast come beside it, not instead of it.
#include "cuda/adalayer_cuda.h"
#include "cuda/law.cuh"
#include "cuda/status.hpp"

namespace adalayer::cuda {
namespace {

/// Element strides of an image tensor.
struct Strides {
  int64_t n, c, y, x;
};

Strides strides_of(int32_t layout, int64_t channels, int64_t h, int64_t w) {
  if (layout == ADALAYER_CUDA_NHWC) return {h * w * channels, 1, w * channels, channels};
  return {channels * h * w, h * w, w, 1};
}

struct Launch {
  AdalayerCudaConv conv;
  Strides in, out;
  int64_t out_h, out_w, total;
};

__device__ int32_t accumulate(const Launch& l, int64_t n, int64_t o, int64_t oy, int64_t ox) {
  const AdalayerCudaConv& c = l.conv;
  const int64_t group_in = c.in_channels / c.groups, group_out = c.out_channels / c.groups;
  const uint8_t* image = c.input_device + n * l.in.n + o / group_out * group_in * l.in.c;
  const int8_t* weight = c.weights_device + o * group_in * c.kernel_h * c.kernel_w;
  int32_t acc = 0;
  for (int64_t i = 0; i < group_in; ++i) {
    for (int64_t ky = 0; ky < c.kernel_h; ++ky) {
      const int64_t y = oy * c.stride_h + ky * c.dilation_h - c.pad_top;
      for (int64_t kx = 0; kx < c.kernel_w; ++kx) {
        const int64_t x = ox * c.stride_w + kx * c.dilation_w - c.pad_left;
        // Outside lies the zero point, which contributes nothing.
        if (y < 0 || y >= c.in_h || x < 0 || x >= c.in_w) continue;
        const int32_t a = image[i * l.in.c + y * l.in.y + x * l.in.x];
        const int32_t w = weight[(i * c.kernel_h + ky) * c.kernel_w + kx];
        acc += w * (a - c.input_zero_point);
      }
    }
  }
  return acc;
}

// __grid_constant__: read in place; a copy per thread would spill to local memory.
__global__ void conv2d_kernel(const __grid_constant__ Launch l) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= l.total) return;
  const AdalayerCudaConv& c = l.conv;
  // Neighbouring threads write neighbouring elements in either layout.
  int64_t n, o, oy, ox, rest = index;
  if (c.output_layout == ADALAYER_CUDA_NHWC) {
    o = rest % c.out_channels;
    rest /= c.out_channels;
    ox = rest % l.out_w;
    rest /= l.out_w;
    oy = rest % l.out_h;
    n = rest / l.out_h;
  } else {
    ox = rest % l.out_w;
    rest /= l.out_w;
    oy = rest % l.out_h;
    rest /= l.out_h;
    o = rest % c.out_channels;
    n = rest / c.out_channels;
  }
  const int32_t acc = accumulate(l, n, o, oy, ox);
  const float scale = c.scale_device[o], bias = c.bias_device[o];
  const int64_t at = n * l.out.n + o * l.out.c + oy * l.out.y + ox * l.out.x;
  if (c.output_type == ADALAYER_CUDA_U8) {
    static_cast<uint8_t*>(c.output_device)[at] =
        requantize_u8(acc, scale, bias, c.lo, c.hi, c.output_zero_point);
  } else {
    static_cast<float*>(c.output_device)[at] = requantize_float(acc, scale, bias, c.lo, c.hi);
  }
}

bool within(int64_t value, int64_t low) { return value >= low && value < (int64_t{1} << 31); }

/// a * b unless that leaves [0, limit]; -1 then and for operands that are negative already.
int64_t product(int64_t a, int64_t b, int64_t limit) {
  if (a < 0 || b < 0) return -1;
  return a != 0 && b > limit / a ? -1 : a * b;
}

int check(const AdalayerCudaConv& c) {
  if (!within(c.batch, 0) || !within(c.in_h, 0) || !within(c.in_w, 0) ||
      !within(c.in_channels, 1) || !within(c.out_channels, 1) || !within(c.kernel_h, 1) ||
      !within(c.kernel_w, 1) || !within(c.stride_h, 1) || !within(c.stride_w, 1) ||
      !within(c.dilation_h, 1) || !within(c.dilation_w, 1) || !within(c.groups, 1) ||
      !within(c.pad_top, 0) || !within(c.pad_left, 0) || !within(c.pad_bottom, 0) ||
      !within(c.pad_right, 0))
    return ADALAYER_CUDA_BAD_SHAPE;
  if (c.in_channels % c.groups != 0 || c.out_channels % c.groups != 0)
    return ADALAYER_CUDA_BAD_GROUPS;
  if (c.in_h + c.pad_top + c.pad_bottom < c.dilation_h * (c.kernel_h - 1) + 1 ||
      c.in_w + c.pad_left + c.pad_right < c.dilation_w * (c.kernel_w - 1) + 1)
    return ADALAYER_CUDA_BAD_SHAPE;
  if (c.bits < 2 || c.bits > 8) return ADALAYER_CUDA_BAD_BITS;
  const int64_t bound = ((int64_t{1} << 31) - 1) / (int64_t{255} << (c.bits - 1));
  if (product(product(c.in_channels / c.groups, c.kernel_h, bound), c.kernel_w, bound) < 0)
    return ADALAYER_CUDA_OVERFLOW;
  for (const int32_t layout : {c.input_layout, c.output_layout})
    if (layout != ADALAYER_CUDA_NCHW && layout != ADALAYER_CUDA_NHWC) return ADALAYER_CUDA_BAD_ENUM;
  if (c.output_type != ADALAYER_CUDA_F32 && c.output_type != ADALAYER_CUDA_U8)
    return ADALAYER_CUDA_BAD_ENUM;
  if (c.input_zero_point < 0 || c.input_zero_point > 255 || !(c.lo <= c.hi))
    return ADALAYER_CUDA_BAD_GRID;
  if (c.output_type == ADALAYER_CUDA_U8) {
    const int32_t z = c.output_zero_point;
    if (z < 0 || z > 255 || c.lo < static_cast<float>(-z) || c.hi > static_cast<float>(255 - z))
      return ADALAYER_CUDA_BAD_GRID;
  }
  return ADALAYER_CUDA_OK;
}

int conv2d(const AdalayerCudaConv& c, uint64_t stream) {
  if (const int code = check(c); code != ADALAYER_CUDA_OK) return code;
  Launch l;
  l.conv = c;
  l.out_h =
      (c.in_h + c.pad_top + c.pad_bottom - c.dilation_h * (c.kernel_h - 1) - 1) / c.stride_h + 1;
  l.out_w =
      (c.in_w + c.pad_left + c.pad_right - c.dilation_w * (c.kernel_w - 1) - 1) / c.stride_w + 1;
  constexpr int64_t kLargest = kMaxBlocks * kThreadsPerBlock;
  const int64_t area = product(l.out_h, l.out_w, kLargest);
  l.total = product(product(area, c.out_channels, kLargest), c.batch, kLargest);
  const int64_t in_area = product(c.in_h, c.in_w, int64_t{1} << 62);
  const int64_t in_total =
      product(product(in_area, c.in_channels, int64_t{1} << 62), c.batch, int64_t{1} << 62);
  if (l.total < 0 || in_total < 0) return ADALAYER_CUDA_TOO_LARGE;
  if (l.total == 0) return ADALAYER_CUDA_OK;
  // An image without pixels has no memory, padding alone makes the output.
  if ((c.input_device == nullptr && in_total > 0) || c.weights_device == nullptr ||
      c.scale_device == nullptr || c.bias_device == nullptr || c.output_device == nullptr)
    return ADALAYER_CUDA_NULL_POINTER;
  l.in = strides_of(c.input_layout, c.in_channels, c.in_h, c.in_w);
  l.out = strides_of(c.output_layout, c.out_channels, l.out_h, l.out_w);
  const int64_t blocks = (l.total + kThreadsPerBlock - 1) / kThreadsPerBlock;
  conv2d_kernel<<<static_cast<unsigned>(blocks), kThreadsPerBlock, 0, stream_of(stream)>>>(l);
  return launch_result();
}

}  // namespace
}  // namespace adalayer::cuda

extern "C" int adalayer_cuda_conv2d(const AdalayerCudaConv* conv, uint64_t stream) {
  if (conv == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  if (conv->struct_size != sizeof(AdalayerCudaConv)) return ADALAYER_CUDA_BAD_STRUCT_SIZE;
  return adalayer::cuda::conv2d(*conv, stream);
}

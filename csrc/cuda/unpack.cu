// Canonical dense bit-planes to int8 weights, one thread per weight.
#include "cuda/adalayer_cuda.h"
#include "cuda/status.hpp"
#include "cuda/unpack.cuh"

namespace adalayer::cuda {
namespace {

template <int kBits>
__global__ void unpack_kernel(const uint8_t* planes, int64_t count, int8_t* weights) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) weights[i] = unpack_dense<kBits>(planes, count, i);
}

template <int kBits>
int launch(const void* planes, int64_t count, void* weights, uint64_t stream) {
  const int64_t blocks = (count + kThreadsPerBlock - 1) / kThreadsPerBlock;
  if (blocks > kMaxBlocks) return ADALAYER_CUDA_TOO_LARGE;
  unpack_kernel<kBits><<<static_cast<unsigned>(blocks), kThreadsPerBlock, 0, stream_of(stream)>>>(
      static_cast<const uint8_t*>(planes), count, static_cast<int8_t*>(weights));
  return launch_result();
}

}  // namespace
}  // namespace adalayer::cuda

extern "C" int adalayer_cuda_unpack_dense(const void* planes_device, int64_t count, int bits,
                                          void* weights_device, uint64_t stream) {
  using adalayer::cuda::launch;
  // Above 2^36 weights (the canonical format's own limit) the bit positions could leave int64.
  if (count < 0 || count > (int64_t{1} << 36)) return ADALAYER_CUDA_BAD_SHAPE;
  if (bits < 2 || bits > 8) return ADALAYER_CUDA_BAD_BITS;
  if (count == 0) return ADALAYER_CUDA_OK;
  if (planes_device == nullptr || weights_device == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  switch (bits) {
    case 2:
      return launch<2>(planes_device, count, weights_device, stream);
    case 3:
      return launch<3>(planes_device, count, weights_device, stream);
    case 4:
      return launch<4>(planes_device, count, weights_device, stream);
    case 5:
      return launch<5>(planes_device, count, weights_device, stream);
    case 6:
      return launch<6>(planes_device, count, weights_device, stream);
    case 7:
      return launch<7>(planes_device, count, weights_device, stream);
    default:
      return launch<8>(planes_device, count, weights_device, stream);
  }
}

// Device query and messages.
#include <algorithm>
#include <cstring>

#include "cuda/adalayer_cuda.h"
#include "cuda/status.hpp"

extern "C" {

const char* adalayer_cuda_message(int code) {
  switch (code) {
    case ADALAYER_CUDA_OK:
      return "no error";
    case ADALAYER_CUDA_NULL_POINTER:
      return "a required pointer is null";
    case ADALAYER_CUDA_BAD_BITS:
      return "weight bits must be 2 to 8";
    case ADALAYER_CUDA_BAD_SHAPE:
      return "an extent is out of range, or the dilated kernel is larger than the padded image";
    case ADALAYER_CUDA_BAD_GROUPS:
      return "input and output channels must be divisible by groups";
    case ADALAYER_CUDA_OVERFLOW:
      return "the reduction could overflow the int32 accumulator";
    case ADALAYER_CUDA_BAD_GRID:
      return "zero points and clamps must lie within 0 to 255, with lo <= hi";
    case ADALAYER_CUDA_TOO_LARGE:
      return "the output has more elements than one launch can cover";
    case ADALAYER_CUDA_BAD_ENUM:
      return "unknown layout or output type";
    case ADALAYER_CUDA_BAD_STRUCT_SIZE:
      return "struct_size does not match: the caller was built against another version";
    default:
      break;
  }
  if (code < 0) return "unknown error code";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int adalayer_cuda_device_count(int* count) {
  if (count == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  *count = 0;
  return static_cast<int>(cudaGetDeviceCount(count));
}

int adalayer_cuda_device_info(int device, AdalayerCudaDevice* info) {
  if (info == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  if (info->struct_size != sizeof(AdalayerCudaDevice)) return ADALAYER_CUDA_BAD_STRUCT_SIZE;
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return static_cast<int>(error);
  const size_t length = std::min(std::strlen(properties.name), sizeof info->name - 1);
  std::memcpy(info->name, properties.name, length);
  info->name[length] = '\0';
  info->compute_major = properties.major;
  info->compute_minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->memory_bytes = properties.totalGlobalMem;
  return ADALAYER_CUDA_OK;
}

}  // extern "C"

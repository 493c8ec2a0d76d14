// Errors, devices, memory, launches.
#include "cuda/runtime.hpp"

#include <algorithm>
#include <cstring>
#include <new>

namespace adalayer::cuda {

namespace {
thread_local std::string last_error;
}

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // errors that do not stay are taken away
  throw CudaError(std::string(what) + ": " + cudaGetErrorString(code), code);
}

int report_current_exception() {
  int code = ADALAYER_CUDA_FAILED;
  try {
    throw;
  } catch (const CudaError& e) {
    last_error = e.what();
    code = e.code() == cudaErrorMemoryAllocation ? ADALAYER_CUDA_OUT_OF_MEMORY
                                                 : static_cast<int>(e.code());
  } catch (const Unsupported& e) {
    last_error = e.what();
    code = ADALAYER_CUDA_UNSUPPORTED;
  } catch (const InvalidArgument& e) {
    last_error = e.what();
    code = ADALAYER_CUDA_INVALID;
  } catch (const CorruptData& e) {
    last_error = e.what();
    code = ADALAYER_CUDA_CORRUPT;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory on the host";
    code = ADALAYER_CUDA_OUT_OF_MEMORY;
  } catch (const std::exception& e) {
    last_error = e.what();
  } catch (...) {
    last_error = "an unknown exception";
  }
  return code;
}

DeviceScope::DeviceScope(int device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ == device)
    before_ = -1;
  else
    check(cudaSetDevice(device), "cudaSetDevice");
}
DeviceScope::~DeviceScope() {
  if (before_ >= 0) cudaSetDevice(before_);
}

DeviceMemory::DeviceMemory(int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* data = nullptr;
  const cudaError_t code = cudaMalloc(&data, static_cast<size_t>(bytes));
  if (code != cudaSuccess)
    check(code, ("allocating " + std::to_string(bytes) + " bytes on the device").c_str());
  data_ = static_cast<uint8_t*>(data);
}
DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) cudaFree(data_);
}

Machine machine_of(int device) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (device < 0 || device >= count)
    fail<InvalidArgument>("there is no CUDA device ", device, " (there are ", count, ")");
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor);
  if (major < 8)
    fail<Unsupported>("CUDA device ", device, " has compute capability ", major, ".", minor,
                      "; the kernels need 8.0 or newer");
  // A library that was built for other devices, without PTX that this one could compile.
  const DeviceScope scope(device);
  cudaFuncAttributes found{};
  const cudaError_t code = cudaFuncGetAttributes(&found, kernel_info(Kernel::Quantize).function);
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction ||
      code == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    fail<Unsupported>("CUDA device ", device, " has compute capability ", major, ".", minor,
                      ", which this build has no kernels for (", cudaGetErrorString(code), ")");
  }
  check(code, "cudaFuncGetAttributes");
  Machine m;
  m.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  m.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
#if defined(ADALAYER_CUDA_90A)
  m.group_products = major == 9 && minor == 0;
#else
  m.group_products = false;
#endif
  return m;
}

void allow_shared_memory(const Launch& l) {
  if (l.kernel.shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(l.kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               l.kernel.shared_bytes),
          "cudaFuncSetAttribute");
}

void enqueue(const Launch& l, cudaStream_t stream, bool overlap) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(l.grid[0], l.grid[1], l.grid[2]);
  config.blockDim = dim3(static_cast<unsigned>(l.kernel.threads));
  config.dynamicSmemBytes = static_cast<size_t>(l.kernel.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  void* arguments[] = {const_cast<uint8_t*>(l.params)};
  const cudaError_t code = cudaLaunchKernelExC(&config, l.kernel.function, arguments);
  if (code != cudaSuccess) check(code, ("launching " + l.name).c_str());
}

}  // namespace adalayer::cuda

using adalayer::cuda::check;
using adalayer::cuda::guarded;

extern "C" {

const char* adalayer_cuda_last_error(void) { return adalayer::cuda::last_error.c_str(); }

int adalayer_cuda_device_count(int* count) {
  if (count == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  *count = 0;
  return guarded([&] { check(cudaGetDeviceCount(count), "cudaGetDeviceCount"); });
}

int adalayer_cuda_device_info(int device, AdalayerCudaDevice* info) {
  if (info == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  if (info->struct_size != sizeof(AdalayerCudaDevice)) return ADALAYER_CUDA_STRUCT_SIZE;
  return guarded([&] {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    const size_t length = std::min(std::strlen(properties.name), sizeof info->name - 1);
    std::memcpy(info->name, properties.name, length);
    info->name[length] = '\0';
    info->compute_major = properties.major;
    info->compute_minor = properties.minor;
    info->multiprocessors = properties.multiProcessorCount;
    info->shared_bytes = static_cast<int32_t>(properties.sharedMemPerBlockOptin);
    info->memory_bytes = properties.totalGlobalMem;
  });
}

}  // extern "C"

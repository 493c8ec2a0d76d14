// Shared by the files that call the CUDA runtime: errors, memory, the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <utility>

#include "core/status.hpp"
#include "cuda/adalayer_cuda.h"
#include "cuda/plan.hpp"

namespace adalayer::cuda {

/// A call of the CUDA runtime that failed; `code` is its cudaError_t.
class CudaError : public Error {
 public:
  CudaError(const std::string& message, cudaError_t code) : Error(message), code_(code) {}
  cudaError_t code() const { return code_; }

 private:
  cudaError_t code_;
};

/// The device's compute capability is too low.
class Unsupported : public Error {
 public:
  using Error::Error;
};

void check(cudaError_t code, const char* what);

/// Runs `body`; whatever it throws becomes a code, and the message adalayer_cuda_last_error()'s.
template <class Body>
int guarded(Body&& body);
int report_current_exception();

template <class Body>
int guarded(Body&& body) {
  try {
    body();
    return ADALAYER_CUDA_OK;
  } catch (...) {
    return report_current_exception();
  }
}

inline cudaStream_t stream_of(uint64_t number) {
  return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(number));
}

/// Makes a device current, and the one before it at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;
};

/// Lets this thread allocate although some stream is being captured.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Device memory of the current device.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(int64_t bytes);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// Checks the device, and says what plans need to know of it. Throws Unsupported, CudaError.
Machine machine_of(int device);

/// Enqueues a launch. overlap: it may start before the kernel in front of it has ended.
void enqueue(const Launch& launch, cudaStream_t stream, bool overlap);
/// Once before the launches of a plan: lets its kernels have the shared memory that they ask for.
void allow_shared_memory(const Launch& launch);

}  // namespace adalayer::cuda

// Shared by the files of this room: the result of an enqueued launch as a return code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/adalayer_cuda.h"

namespace adalayer::cuda {

constexpr int kThreadsPerBlock = 256;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

inline cudaStream_t stream_of(uint64_t number) {
  return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(number));
}

/// Errors of running kernels show at the caller's next synchronisation, those of a launch here.
inline int launch_result() { return static_cast<int>(cudaGetLastError()); }

}  // namespace adalayer::cuda

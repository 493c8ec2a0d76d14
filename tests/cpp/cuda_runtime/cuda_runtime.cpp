#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_emulation.hpp"
#include "cuda_runtime_api.h"

// A launch as it was when it was enqueued. Parameters are copied as the runtime does; all kernels
// here have one, which lies in a buffer of this size (Launch::params).
struct FakeNode {
  const void* function;
  uint32_t grid[3];
  int threads, shared_bytes;
  alignas(16) uint8_t params[512];
};
struct FakeGraph {
  std::vector<std::unique_ptr<FakeNode>> nodes;
};
struct FakeGraphExec {
  const FakeGraph* source;
  std::vector<FakeNode> nodes;
};
struct FakeStream {
  FakeGraph* captured = nullptr;
  bool others = false;  // captured by somebody else
  cudaGraphNode_t last = nullptr;
};
struct FakeEvent {
  int not_ready = 0;
};

namespace fake_cuda {
int not_ready = 0;
int64_t launches = 0, graph_launches = 0, node_updates = 0, allocated = 0;
int64_t most_bytes = int64_t{1} << 40;
bool updates_allowed = true;
int major = 9, minor = 0;
bool has_kernels = true;
void capture(cudaStream_t stream, bool on) { stream->others = on; }
cudaStream_t stream(int number) {
  static std::map<int, FakeStream> streams;
  return &streams[number];
}
}  // namespace fake_cuda

namespace {

std::map<void*, size_t> memory;
std::map<const void*, int> allowed_shared;

void run(const FakeNode& n) {
  ++fake_cuda::launches;
  const int limit = allowed_shared.contains(n.function) ? allowed_shared[n.function] : 48 << 10;
  if (n.shared_bytes > limit)
    throw std::runtime_error("a launch asks for more shared memory than it was allowed");
  adalayer::cuda::emulation::run(n.function, n.grid, n.threads, n.shared_bytes, n.params);
}

FakeNode node_of(const void* function, dim3 grid, dim3 block, size_t shared, void** arguments) {
  FakeNode n{};
  n.function = function;
  n.grid[0] = grid.x, n.grid[1] = grid.y, n.grid[2] = grid.z;
  n.threads = static_cast<int>(block.x);
  n.shared_bytes = static_cast<int>(shared);
  std::memcpy(n.params, arguments[0], sizeof n.params);
  return n;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorMemoryAllocation ? "out of memory" : "an error";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  *p = {"a GPU in software", fake_cuda::major, fake_cuda::minor, 132, 227 << 10, size_t{1} << 34};
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int values[] = {fake_cuda::major, fake_cuda::minor, 132, 227 << 10};
  *value = values[which];
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->numRegs = 32;
  return fake_cuda::has_kernels ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaMalloc(void** data, size_t bytes) {
  // (Python tests, which see no symbol of this library, have the environment.)
  const char* limit = std::getenv("ADALAYER_FAKE_CUDA_BYTES");
  const int64_t most = limit != nullptr ? std::atoll(limit) : fake_cuda::most_bytes;
  if (static_cast<int64_t>(bytes) > most) return cudaErrorMemoryAllocation;
  *data = ::operator new(bytes, std::align_val_t{256});
  std::memset(*data, 0xCD, bytes);
  memory[*data] = bytes;
  fake_cuda::allocated += static_cast<int64_t>(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  if (data == nullptr) return cudaSuccess;
  fake_cuda::allocated -= static_cast<int64_t>(memory.at(data));
  memory.erase(data);
  ::operator delete(data, std::align_val_t{256});
  return cudaSuccess;
}
cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(data, value, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new FakeStream;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
  event->not_ready = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream != nullptr && stream->others ? cudaStreamCaptureStatusActive
                                                : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->captured = new FakeGraph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream->captured;
  stream->captured = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t*,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData**,
                                     size_t* count) {
  *status = cudaStreamCaptureStatusActive;
  stream->last = stream->captured->nodes.back().get();
  *nodes = &stream->last;
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new FakeEvent;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->not_ready = fake_cuda::not_ready;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->not_ready-- > 0 ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  event->not_ready = 0;
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  static int calls = 0;  // any order of the candidates
  *ms = static_cast<float>(++calls * 7 % 13 + 1);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  allowed_shared[function] = value;
  return value <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function,
                                void** arguments) {
  const FakeNode n = node_of(function, c->gridDim, c->blockDim, c->dynamicSmemBytes, arguments);
  if (c->stream != nullptr && c->stream->captured != nullptr)
    c->stream->captured->nodes.push_back(std::make_unique<FakeNode>(n));
  else
    run(n);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned) {
  *exec = new FakeGraphExec{graph, {}};
  for (const auto& n : graph->nodes)
    (*exec)->nodes.push_back(*n);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecKernelNodeSetParams(cudaGraphExec_t exec, cudaGraphNode_t node,
                                             const cudaKernelNodeParams* p) {
  ++fake_cuda::node_updates;
  if (!fake_cuda::updates_allowed) return cudaErrorInvalidValue;
  for (size_t k = 0; k < exec->nodes.size(); ++k)
    if (exec->source->nodes[k].get() == node) {
      exec->nodes[k] =
          node_of(p->func, p->gridDim, p->blockDim, p->sharedMemBytes, p->kernelParams);
      return cudaSuccess;
    }
  return cudaErrorInvalidValue;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  ++fake_cuda::graph_launches;
  for (const FakeNode& n : exec->nodes)
    run(n);
  return cudaSuccess;
}

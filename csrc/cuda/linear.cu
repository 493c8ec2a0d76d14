// Linear layers with float activations: the C interface.
#include <algorithm>
#include <memory>
#include <vector>

#include "cuda/linear_kernel.cuh"
#include "cuda/linear_plan.hpp"
#include "cuda/runtime.hpp"

struct AdalayerCudaLinear {
  int device = 0;
  int bits = 0;
  int64_t out_features = 0, in_features = 0;
  int32_t units = 0;
  adalayer::cuda::DeviceMemory weights, scale, bias;
  ~AdalayerCudaLinear() {
    int before = -1;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    weights = {};
    scale = {};
    bias = {};
    if (before >= 0) cudaSetDevice(before);
  }
};

namespace adalayer::cuda {
namespace {

DeviceMemory upload(const void* data, size_t bytes) {
  const RelaxedCapture relaxed;
  DeviceMemory memory(static_cast<int64_t>(bytes));
  cudaStream_t own = nullptr;
  check(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  cudaError_t code = cudaMemcpyAsync(memory.data(), data, bytes, cudaMemcpyHostToDevice, own);
  if (code == cudaSuccess) code = cudaStreamSynchronize(own);
  cudaStreamDestroy(own);
  check(code, "copying to the device");
  return memory;
}

void run(const AdalayerCudaLinear& l, const void* x, int64_t rows, bool bfloat, void* y,
         cudaStream_t stream) {
  if (rows < 0) fail<InvalidArgument>("expected 0 rows or more, got ", rows);
  if (rows == 0) return;
  if (x == nullptr || y == nullptr) fail<InvalidArgument>("input or output has no memory");
  const DeviceScope scope(l.device);
  const int columns = rows <= 8 ? 1 : 4;
  LinearParams p{};
  p.weights = l.weights.data();
  p.scale = reinterpret_cast<const float*>(l.scale.data());
  p.bias = reinterpret_cast<const float*>(l.bias.data());
  p.in_features = static_cast<int32_t>(l.in_features);
  p.out_features = static_cast<int32_t>(l.out_features);
  p.units = l.units;
  p.aligned = l.in_features % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  // Blocks are numbered in 16 bits along the rows.
  constexpr int64_t kMostRows = int64_t{65535} * 32;
  for (int64_t first = 0; first < rows; first += kMostRows) {
    p.x = static_cast<const uint16_t*>(x) + first * l.in_features;
    p.y = static_cast<uint16_t*>(y) + first * l.out_features;
    p.rows = static_cast<int32_t>(std::min(kMostRows, rows - first));
    Launch launch;
    launch.kernel = linear_kernel(l.bits, bfloat, columns);
    launch.name = "linear";
    launch.grid[0] = static_cast<uint32_t>((l.out_features + kLinearRows - 1) / kLinearRows);
    launch.grid[1] = static_cast<uint32_t>((p.rows + 8 * columns - 1) / (8 * columns));
    launch.set_params(p);
    enqueue(launch, stream, false);
  }
}

}  // namespace
}  // namespace adalayer::cuda

extern "C" {

int adalayer_cuda_linear_create(const void* packed, size_t bytes, const float* scale,
                                const float* bias, int device, AdalayerCudaLinear** linear) {
  using namespace adalayer::cuda;
  if (packed == nullptr || scale == nullptr || linear == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  *linear = nullptr;
  return guarded([&] {
    machine_of(device);
    const LinearWeights w = pack_linear({static_cast<const uint8_t*>(packed), bytes});
    const DeviceScope scope(device);
    auto l = std::make_unique<AdalayerCudaLinear>();
    l->device = device;
    l->bits = w.bits;
    l->out_features = w.out_features;
    l->in_features = w.in_features;
    l->units = w.units;
    l->weights = upload(w.packed.data(), w.packed.size());
    std::vector<float> values(static_cast<size_t>(w.out_features) + kLinearRows, 0.0f);
    std::copy_n(scale, w.out_features, values.begin());
    l->scale = upload(values.data(), values.size() * sizeof(float));
    std::fill(values.begin(), values.end(), 0.0f);
    if (bias != nullptr) std::copy_n(bias, w.out_features, values.begin());
    l->bias = upload(values.data(), values.size() * sizeof(float));
    *linear = l.release();
  });
}

void adalayer_cuda_linear_destroy(AdalayerCudaLinear* linear) { delete linear; }

int adalayer_cuda_linear_run(AdalayerCudaLinear* linear, const void* x, int64_t rows, int bfloat,
                             void* y, uint64_t stream) {
  if (linear == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  return adalayer::cuda::guarded([&] {
    adalayer::cuda::run(*linear, x, rows, bfloat != 0, y, adalayer::cuda::stream_of(stream));
  });
}

}  // extern "C"

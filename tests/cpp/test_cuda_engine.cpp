// The CUDA engine through its C interface: kernels, graphs, workspaces, parts, errors. Compiled
// twice: over a CUDA runtime in software (ADALAYER_FAKE_CUDA), and for a GPU, where it is also what
// compute-sanitizer watches.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <sstream>
#include <string>

#include "check.hpp"
#include "cuda/adalayer_cuda.h"
#include "cuda_cases.hpp"
#include "cuda_runtime_api.h"
#include "engine/container.hpp"
#include "engine/interpret.hpp"

using namespace adalayer;
using namespace cuda_cases;

namespace {

/// Device memory with a copy of host memory, and back.
class Device {
 public:
  explicit Device(const void* data, size_t bytes) : bytes_(bytes) {
    CHECK_EQ(cudaMalloc(&data_, bytes + 16), cudaSuccess);
    CHECK_EQ(cudaMemcpy(data_, data, bytes, cudaMemcpyHostToDevice), cudaSuccess);
  }
  template <class T>
  explicit Device(const std::vector<T>& v) : Device(v.data(), v.size() * sizeof(T)) {}
  ~Device() { cudaFree(data_); }
  Device(Device&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  Device& operator=(Device&&) = delete;
  void* data() const { return data_; }
  template <class T>
  void get(std::vector<T>& v) const {
    CHECK_EQ(cudaDeviceSynchronize(), cudaSuccess);
    CHECK_EQ(cudaMemcpy(v.data(), data_, bytes_, cudaMemcpyDeviceToHost), cudaSuccess);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

AdalayerCudaOptions options(uint32_t flags = 0) {
  AdalayerCudaOptions o{};
  o.struct_size = sizeof o;
  o.flags = flags;
  o.choice = -1;
  return o;
}

struct OnDevice {
  AdalayerCudaEngine* handle = nullptr;
  Program program;
  explicit OnDevice(const Program& p, const AdalayerCudaOptions& o = options()) : program(p) {
    const std::vector<uint8_t> bytes = write_program(p);
    CHECK_EQ(adalayer_cuda_engine_create(bytes.data(), bytes.size(), 0, &o, &handle), 0);
  }
  ~OnDevice() { adalayer_cuda_engine_destroy(handle); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  int run(const Floats& inputs, int64_t batch, Floats& outputs, cudaStream_t stream = nullptr) {
    std::vector<Device> in, out;
    std::vector<const void*> in_pointers;
    std::vector<void*> out_pointers;
    for (const auto& x : inputs) {
      in.emplace_back(x);
      in_pointers.push_back(in.back().data());
    }
    outputs.clear();
    for (const int32_t v : program.outputs) {
      const Value& value = program.values[v];
      const int64_t count = std::max<int64_t>(batch, 0) * value.c * value.h * value.w;
      outputs.emplace_back(static_cast<size_t>(count), -1.0f);
      out.emplace_back(outputs.back());
      out_pointers.push_back(out.back().data());
    }
    const int code =
        adalayer_cuda_engine_run(handle, in_pointers.data(), nullptr, batch, out_pointers.data(),
                                 reinterpret_cast<uint64_t>(stream));
    for (size_t k = 0; k < outputs.size(); ++k)
      out[k].get(outputs[k]);
    return code;
  }
};

void check_run(OnDevice& e, int64_t batch, uint32_t seed, cudaStream_t stream = nullptr,
               const std::string& what = "program") {
  const Floats inputs = noise(e.program, batch, seed);
  std::vector<InputTensor> tensors;
  for (const auto& x : inputs)
    tensors.push_back({x.data(), Layout::NCHW});
  const Floats expected = interpret(e.program, tensors, batch);
  Floats got;
  CHECK_EQ(e.run(inputs, batch, got, stream), 0);
  int64_t wrong = 0;
  std::ostringstream first;
  for (size_t k = 0; k < got.size(); ++k)
    for (size_t i = 0; i < got[k].size(); ++i) {
      // (The interpreter's softmax is in double.)
      if (std::fabs(got[k][i] - expected[k][i]) <= 1e-6f) continue;
      if (wrong++ == 0)
        first << "; the first: output " << k << ", element " << i << " is " << got[k][i]
              << ", expected " << expected[k][i];
    }
  std::ostringstream message;
  message << what << ", batch " << batch << ": " << wrong << " values differ" << first.str();
  check::report(wrong == 0, __FILE__, __LINE__, message.str());
}

void check_runs(const std::vector<Run>& runs) {
  uint32_t seed = 0;
  for (const Run& r : runs) {
    AdalayerCudaOptions o = options();
    o.choice = r.choice;
    OnDevice e(program_of(r.conv, ++seed), o);
    check_run(e, r.batch, seed, nullptr, show(r.conv, r.batch, r.choice));
  }
}

#if defined(ADALAYER_FAKE_CUDA)
cudaStream_t numbered_stream(int number) { return fake_cuda::stream(number); }
#else
cudaStream_t numbered_stream(int number) {
  static std::map<int, cudaStream_t> streams;
  if (!streams.contains(number))
    CHECK_EQ(cudaStreamCreateWithFlags(&streams[number], cudaStreamNonBlocking), cudaSuccess);
  return streams[number];
}
#endif

/// Levels of a convolution, and a float convolution of them.
Program small_network() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr ValueKind F32 = ValueKind::F32;
  programs::Builder b;
  const auto x = b.value("x", 3, 7, 7, F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", 3, 7, 7));
  std::vector<float> scale(20, 0.01f), bias(20, 1.0f);
  const auto conv = b.node(OpKind::Conv, {q}, b.value("conv", 20, 4, 4),
                           {3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 0, 255, 10},
                           {1.0f / b.p.values[q].scale, -kInf, kInf},
                           {b.weights(20, 3, 3, 3, 5), b.floats(scale), b.floats(bias), -1});
  const auto y = b.node(OpKind::Conv, {conv}, b.value("y", 20, 1, 1, F32),
                        {4, 4, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, {1.0f, -kInf, kInf},
                        {b.weights(20, 20, 4, 4, 3), b.floats(scale), b.floats(bias), -1});
  const auto levels = b.node(OpKind::Dequantize, {conv}, b.value("levels", 20, 4, 4, F32));
  b.p.inputs = {x};
  b.p.outputs = {y, levels};
  return b.p;
}

}  // namespace

TEST(a_device_is_there) {
  int count = 0;
  CHECK_EQ(adalayer_cuda_device_count(&count), 0);
  CHECK(count > 0);
  AdalayerCudaDevice device{};
  device.struct_size = sizeof device;
  CHECK_EQ(adalayer_cuda_device_info(0, &device), 0);
  std::printf("  %s, compute capability %d.%d\n", device.name, device.compute_major,
              device.compute_minor);
}

TEST(every_width_of_weights) { check_runs(every_width()); }
TEST(images_of_few_channels) { check_runs(few_input_channels()); }
TEST(large_kernels) { check_runs(unusual_kernels()); }
TEST(tiles_that_overflow) { check_runs(overflowing_tiles()); }
#if defined(ADALAYER_FAKE_CUDA)
// test_cuda_emulation has more of them.
TEST(random_shapes) { check_runs(random_convolutions(10, 5)); }
#else
TEST(every_choice_of_tile_and_splits) { check_runs(every_choice({2, 3, 4, 5, 6, 7, 8})); }
TEST(random_shapes) { check_runs(random_convolutions(400, 5)); }
#endif

TEST(sparse_weights) {
#if defined(ADALAYER_FAKE_CUDA)
  // test_cuda_emulation has every form; here all candidates of one layer are measured.
  const ConvCase k{.c = 128, .h = 1, .w = 3, .o = 40, .bits = 3, .zeros = Zeros::Both};
  OnDevice e(program_of(k, 7), options(ADALAYER_CUDA_TUNE));
  check_run(e, 1, 7, nullptr, show(k, 1, -1));
#else
  uint32_t seed = 100;
  for (const Run& r : sparse_weights({2, 3, 4, 5, 6, 7, 8})) {
    ++seed;
    for (int choice = 0; choice < 60; ++choice) {
      AdalayerCudaOptions o = options();
      o.choice = choice;
      OnDevice e(program_of(r.conv, seed), o);
      check_run(e, r.batch, seed, nullptr, show(r.conv, r.batch, choice));
    }
    OnDevice e(program_of(r.conv, seed), options(ADALAYER_CUDA_TUNE));
    check_run(e, r.batch, seed, nullptr, show(r.conv, r.batch, -1) + ", measured");
  }
#endif
}

TEST(every_operation_of_a_program) {
  OnDevice e(programs::every_operation());
  check_run(e, 1, 1);
  check_run(e, 3, 2);
}

TEST(a_graph_follows_its_callers_memory) {
  OnDevice e(small_network());
#if defined(ADALAYER_FAKE_CUDA)
  const int64_t graphs = fake_cuda::graph_launches;
#endif
  std::vector<Device> elsewhere;  // so that the next call's memory is not the last one's
  for (uint32_t round = 0; round < 4; ++round) {
    check_run(e, 2, round);
    elsewhere.emplace_back(std::vector<float>(1000 * (round + 1)));
  }
#if defined(ADALAYER_FAKE_CUDA)
  CHECK_EQ(fake_cuda::graph_launches - graphs, 4);
  CHECK(fake_cuda::node_updates > 0);
  // A runtime that does not take new parameters gets new graphs.
  fake_cuda::updates_allowed = false;
  for (uint32_t round = 0; round < 3; ++round) {
    check_run(e, 2, round);
    elsewhere.emplace_back(std::vector<float>(900 * (round + 1)));
  }
  fake_cuda::updates_allowed = true;
#endif
}

TEST(batches_of_many_sizes) {
  OnDevice e(small_network());
  for (const int64_t batch : {1, 5, 2, 9, 3, 4, 6, 7, 8, 10, 11, 1, 5})
    check_run(e, batch, static_cast<uint32_t>(batch));
}

TEST(every_way_to_run) {
  for (const uint32_t flags : {0u, uint32_t{ADALAYER_CUDA_NO_GRAPH},
                               uint32_t{ADALAYER_CUDA_NO_OVERLAP}, uint32_t{ADALAYER_CUDA_TUNE}}) {
    OnDevice e(small_network(), options(flags));
    check_run(e, 3, flags);
    check_run(e, 3, flags + 1);
  }
  OnDevice e(programs::every_operation(), options(ADALAYER_CUDA_TUNE));
  check_run(e, 2, 5);
}

TEST(large_batches_run_in_parts) {
  AdalayerCudaOptions o = options();
  o.images_per_pass = 3;
  OnDevice e(small_network(), o);
  check_run(e, 8, 1);
  AdalayerCudaInfo info{};
  info.struct_size = sizeof info;
  CHECK_EQ(adalayer_cuda_engine_info(e.handle, &info), 0);
  CHECK_EQ(info.most_images, 3);
  CHECK_EQ(info.nodes, 4);
  CHECK(info.weight_bytes > 0 && info.arena_bytes > 0);
}

TEST(calls_on_several_streams) {
  OnDevice e(small_network());
#if defined(ADALAYER_FAKE_CUDA)
  fake_cuda::not_ready = 3;  // other streams' work is never done in time
#endif
  for (uint32_t round = 0; round < 12; ++round)
    check_run(e, 2, round, numbered_stream(static_cast<int>(round % 7)));
#if defined(ADALAYER_FAKE_CUDA)
  fake_cuda::not_ready = 0;
#endif
}

#if defined(ADALAYER_FAKE_CUDA)
TEST(somebody_elses_capture_gets_launches_and_memory_of_its_own) {
  OnDevice e(small_network());
  const cudaStream_t stream = fake_cuda::stream(100);
  check_run(e, 2, 1, stream);
  fake_cuda::capture(stream, true);
  const int64_t graphs = fake_cuda::graph_launches, bytes = fake_cuda::allocated;
  check_run(e, 2, 2, stream);
  CHECK_EQ(fake_cuda::graph_launches, graphs);
  CHECK(fake_cuda::allocated > bytes);
  fake_cuda::capture(stream, false);
}
#endif

TEST(a_layer_with_residual_and_grid) {
  Program p = programs::small_program();  // 2 channels of 1 x 1
  AdalayerCudaOptions o = options(ADALAYER_CUDA_NO_GRAPH);
  o.on_grid = 1;
  o.grid_scale = 0.25f;
  o.grid_zero_point = 100;
  o.grid_qmax = 255;
  OnDevice e(p, o);
  OnDevice plain(p);
  const Floats inputs = noise(p, 4, 3);
  Floats bare;
  CHECK_EQ(plain.run(inputs, 4, bare), 0);
  std::vector<float> residual(8), out(8);
  for (size_t k = 0; k < 8; ++k)
    residual[k] = 0.3f * static_cast<float>(k);
  const Device x(inputs[0]), addend(residual), result(out);
  CHECK_EQ(adalayer_cuda_layer_run(e.handle, x.data(), 1, 4, addend.data(), result.data(), 1, 0),
           0);
  result.get(out);
  // The program clamps to -1 .. 1, after the residual; bare is clamped already, so only where the
  // sum was inside does it say what to expect.
  int inside = 0;
  for (size_t k = 0; k < 8; ++k) {
    if (std::fabs(bare[0][k]) >= 1.0f) continue;
    ++inside;
    const float y = std::fmin(std::fmax(bare[0][k] + residual[k], -1.0f), 1.0f);
    const float q = std::nearbyintf(y * 4.0f);
    CHECK_EQ(out[k], q * 0.25f);
  }
  for (const float y : out)
    CHECK(y >= -1.0f && y <= 1.0f && y * 4.0f == std::nearbyintf(y * 4.0f));
  CHECK(inside >= 0);
}

TEST(profiles_name_a_kernel_for_every_node) {
  OnDevice e(small_network());
  AdalayerCudaNodeProfile profiles[4] = {};
  CHECK_EQ(adalayer_cuda_engine_profile(e.handle, 2, 2, profiles), 0);
  for (const auto& p : profiles)
    CHECK(p.kernel[0] != '\0' && p.microseconds > 0.0);
}

TEST(quantizing_floats) {
  std::vector<float> x{-3.0f, -0.26f, 0.0f, 0.25f, 0.75f, 1.0f, 1000.0f, std::nanf("")};
  std::vector<uint8_t> q(x.size());
  std::vector<float> y(x.size());
  const auto count = static_cast<int64_t>(x.size());
  const Device in(x), levels(q), numbers(y);
  CHECK_EQ(adalayer_cuda_quantize(in.data(), count, 0.5f, 2, 15, 0, levels.data(), 0, 0), 0);
  CHECK_EQ(adalayer_cuda_quantize(in.data(), count, 0.5f, 2, 15, 1, numbers.data(), 0, 0), 0);
  levels.get(q);
  numbers.get(y);
  const ActivationGrid grid{2.0f, 2, 15};
  for (size_t k = 0; k < x.size(); ++k) {
    CHECK_EQ(q[k], quantize_value(x[k], grid));
    CHECK_EQ(y[k], dequantize_value(q[k], 0.5f, 2));
  }
}

TEST(memory_of_callers_begins_anywhere) {
  // Views into larger tensors begin at any number, not at what vector loads would like.
  OnDevice e(small_network());
  const Floats inputs = noise(e.program, 2, 1);
  Floats expected;
  CHECK_EQ(e.run(inputs, 2, expected), 0);
  for (const size_t shift : {1, 2, 3}) {
    std::vector<float> x(inputs[0].size() + shift), y(expected[0].size() + shift),
        levels(expected[1].size() + shift);
    std::copy(inputs[0].begin(), inputs[0].end(), x.begin() + static_cast<std::ptrdiff_t>(shift));
    const Device dx(x), dy(y), dlevels(levels);
    const void* in[] = {static_cast<float*>(dx.data()) + shift};
    void* out[] = {static_cast<float*>(dy.data()) + shift,
                   static_cast<float*>(dlevels.data()) + shift};
    CHECK_EQ(adalayer_cuda_engine_run(e.handle, in, nullptr, 2, out, 0), 0);
    dy.get(y);
    dlevels.get(levels);
    CHECK(std::equal(expected[0].begin(), expected[0].end(), y.begin() + shift));
    CHECK(std::equal(expected[1].begin(), expected[1].end(), levels.begin() + shift));
    in[0] = static_cast<const uint8_t*>(dx.data()) + shift;
    CHECK_EQ(adalayer_cuda_engine_run(e.handle, in, nullptr, 2, out, 0), ADALAYER_CUDA_INVALID);
    CHECK(std::string(adalayer_cuda_last_error()).find("not aligned") != std::string::npos);
  }
}

#if defined(ADALAYER_FAKE_CUDA)
TEST(devices_that_cannot_run_the_kernels_are_named) {
  const std::vector<uint8_t> bytes = write_program(small_network());
  const AdalayerCudaOptions o = options();
  AdalayerCudaEngine* handle = nullptr;
  const auto refused = [&](const char* named) {
    CHECK_EQ(adalayer_cuda_engine_create(bytes.data(), bytes.size(), 0, &o, &handle),
             ADALAYER_CUDA_UNSUPPORTED);
    const std::string said = adalayer_cuda_last_error();
    check::report(said.find(named) != std::string::npos, __FILE__, __LINE__, said);
    CHECK(handle == nullptr);
  };
  fake_cuda::major = 7, fake_cuda::minor = 5;
  refused("compute capability 7.5");
  fake_cuda::major = 8, fake_cuda::minor = 9;
  fake_cuda::has_kernels = false;
  refused("compute capability 8.9");
  fake_cuda::has_kernels = true;
  CHECK_EQ(adalayer_cuda_engine_create(bytes.data(), bytes.size(), 0, &o, &handle), 0);
  adalayer_cuda_engine_destroy(handle);
  fake_cuda::major = 9, fake_cuda::minor = 0;
}
#endif

TEST(errors_have_codes_and_sentences) {
  const Program p = small_network();
  const std::vector<uint8_t> bytes = write_program(p);
  AdalayerCudaEngine* handle = nullptr;
  AdalayerCudaOptions o = options();
  CHECK_EQ(adalayer_cuda_engine_create(nullptr, 0, 0, &o, &handle), ADALAYER_CUDA_NULL_POINTER);
  CHECK_EQ(adalayer_cuda_engine_create(bytes.data(), 100, 0, &o, &handle), ADALAYER_CUDA_CORRUPT);
  CHECK(std::string(adalayer_cuda_last_error()).size() > 10);
  CHECK_EQ(adalayer_cuda_engine_create(bytes.data(), bytes.size(), 7, &o, &handle),
           ADALAYER_CUDA_INVALID);
  CHECK(std::string(adalayer_cuda_last_error()).find("7") != std::string::npos);
  o.struct_size = 3;
  CHECK_EQ(adalayer_cuda_engine_create(bytes.data(), bytes.size(), 0, &o, &handle),
           ADALAYER_CUDA_STRUCT_SIZE);
  CHECK(handle == nullptr);
#if defined(ADALAYER_FAKE_CUDA)
  fake_cuda::most_bytes = 100;
  o = options();
  CHECK_EQ(adalayer_cuda_engine_create(bytes.data(), bytes.size(), 0, &o, &handle),
           ADALAYER_CUDA_OUT_OF_MEMORY);
  fake_cuda::most_bytes = int64_t{1} << 40;
#endif

  // What works on floats between layers runs on the CPU alone.
  Program floats = programs::float_program(), recurrent = programs::recurrent_program(),
          grouped = programs::grouped_program();
  Node& line = recurrent.nodes[0];  // (A line of floats would be refused, too.)
  line = {OpKind::Function, "layer.function", line.inputs, line.output, {1}, {0.5f, 0.0f}, {}};
  const auto refused = [&](const char* text) {
    const std::vector<uint8_t> file = write_program(floats);
    AdalayerCudaOptions plain = options();
    CHECK_EQ(adalayer_cuda_engine_create(file.data(), file.size(), 0, &plain, &handle),
             ADALAYER_CUDA_INVALID);
    const std::string message = adalayer_cuda_last_error();
    CHECK_MSG(message.find(text) != std::string::npos, message);
  };
  refused("input 'mask' is token ids");
  std::swap(floats, recurrent);
  refused("recurrent layers run on the CPU alone");
  std::swap(floats, recurrent);
  Program reduced = programs::reduced_program();
  std::swap(floats, reduced);
  refused("node 'layer.reduce': reduce with a float result runs on the CPU alone");
  programs::Builder sizes;
  const auto large = sizes.value("large", 6, 2, 2, ValueKind::F32);
  const auto small = sizes.value("small", 6, 1, 1, ValueKind::F32);
  sizes.p.outputs = {sizes.node(OpKind::Combine, {large, small},
                                sizes.value("pair", 6, 2, 2, ValueKind::F32), {2})};
  sizes.p.inputs = {large, small};
  floats = sizes.p;
  refused("node 'layer.combine': floats of different sizes are combined on the CPU alone");
  std::swap(floats, reduced);
  std::swap(floats, grouped);
  refused("linear layers with weight groups run on the CPU alone");
  std::swap(floats, grouped);
  floats.nodes.resize(1);  // the first convolution alone
  floats.values = {floats.values[floats.inputs[0]], floats.values[floats.nodes[0].output]};
  floats.inputs = floats.nodes[0].inputs = {0};
  floats.outputs = {floats.nodes[0].output = 1};
  refused("node 'layer.float_conv': float_conv with a float result runs on the CPU alone");

  OnDevice e(p);
  Floats got;
  CHECK_EQ(e.run({{}}, -1, got), ADALAYER_CUDA_INVALID);
  CHECK_EQ(e.run({{}}, 0, got), 0);
  const void* nothing[] = {nullptr};
  void* out[] = {nullptr, nullptr};
  CHECK_EQ(adalayer_cuda_engine_run(e.handle, nothing, nullptr, 1, out, 0), ADALAYER_CUDA_INVALID);
#if defined(ADALAYER_FAKE_CUDA)
  // Out of memory in a call: the engine goes on with what fits.
  const Device x(std::vector<float>(200 * 3 * 7 * 7)), y(std::vector<float>(200 * 20)),
      levels(std::vector<float>(200 * 20 * 16));
  fake_cuda::most_bytes = 20000;
  const void* in_pointers[] = {x.data()};
  void* out_pointers[] = {y.data(), levels.data()};
  CHECK_EQ(adalayer_cuda_engine_run(e.handle, in_pointers, nullptr, 200, out_pointers, 0),
           ADALAYER_CUDA_OUT_OF_MEMORY);
  check_run(e, 1, 1);
  fake_cuda::most_bytes = int64_t{1} << 40;
#endif
}

#if defined(ADALAYER_FAKE_CUDA)
TEST(nothing_is_left_behind) {
  const int64_t before = fake_cuda::allocated;
  {
    OnDevice e(small_network(), options(ADALAYER_CUDA_TUNE));
    check_run(e, 2, 1);
    CHECK(fake_cuda::allocated > before);
  }
  CHECK_EQ(fake_cuda::allocated, before);
}
#endif

int main(int argc, char** argv) {
  int count = 0;
  if (adalayer_cuda_device_count(&count) != 0 || count == 0) {
    std::printf("skipped: no CUDA device (%s)\n", adalayer_cuda_last_error());
    return 77;
  }
  return check::run_all(argc, argv);
}

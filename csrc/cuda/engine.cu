// A program on a device: memory, graphs, and calls from many threads and streams.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <tuple>
#include <vector>

#include "cuda/runtime.hpp"
#include "engine/container.hpp"

namespace adalayer::cuda {

// Batch sizes whose graphs a workspace keeps, and workspaces of an engine besides captured ones.
constexpr size_t kMostReady = 8;
constexpr size_t kMostWorkspaces = 4;
// Choices of a product that are measured, dense ones and of every other form, and launches of each.
constexpr int kMostMeasured = 10, kMostMeasuredSparse = 5;
constexpr int kMeasuredLaunches = 6;

/// What one call brings.
struct Call {
  std::span<const void* const> inputs;
  std::span<void* const> outputs;
  const uint8_t* nhwc = nullptr;
  const void* residual = nullptr;  // layers only
  bool output_nhwc = false;
};

/// A plan for one batch size in one workspace.
struct Ready {
  int64_t batch = 0;
  LaunchPlan plan;
  cudaGraphExec_t graph = nullptr;
  cudaGraph_t source = nullptr;
  struct PortNode {
    size_t launch;
    cudaGraphNode_t node;
  };
  std::vector<PortNode> port_nodes;
  Ready() = default;
  Ready(const Ready&) = delete;
  Ready& operator=(const Ready&) = delete;
  ~Ready() { drop_graph(); }
  void drop_graph() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
    if (source != nullptr) cudaGraphDestroy(source);
    graph = nullptr;
    source = nullptr;
    port_nodes.clear();
  }
};

/// Memory of one call at a time.
struct Workspace {
  DeviceMemory arena, scratch;
  std::list<std::unique_ptr<Ready>> ready;  // last used first
  cudaEvent_t done = nullptr;
  cudaStream_t stream = nullptr;  // of the last call
  bool used = false;
  ~Workspace() {
    ready.clear();
    if (done != nullptr) cudaEventDestroy(done);
  }
};

/// Measured choices of this process: layers that are alike share them.
using ProductKey =
    std::tuple<int, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;
static std::mutex tuned_mutex;
static std::map<ProductKey, Choice> tuned;

static bool replace(uint8_t* params, size_t offset, const void* value, size_t bytes) {
  if (std::memcmp(params + offset, value, bytes) == 0) return false;
  std::memcpy(params + offset, value, bytes);
  return true;
}

/// A stream for measuring and capturing.
struct OwnStream {
  cudaStream_t stream = nullptr;
  OwnStream() {
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~OwnStream() { cudaStreamDestroy(stream); }
};

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event); }
  void record(cudaStream_t stream) { check(cudaEventRecord(event, stream), "cudaEventRecord"); }
};

static double milliseconds(const Event& from, const Event& to) {
  float ms = 0.0f;
  check(cudaEventSynchronize(to.event), "cudaEventSynchronize");
  check(cudaEventElapsedTime(&ms, from.event, to.event), "cudaEventElapsedTime");
  return static_cast<double>(ms);
}

/// The node that a stream's capture added last.
static cudaGraphNode_t last_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  const cudaGraphNode_t* nodes = nullptr;
  size_t count = 0;
#if CUDART_VERSION >= 13000
  const cudaGraphEdgeData* edges = nullptr;
  check(cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &nodes, &edges, &count),
        "cudaStreamGetCaptureInfo");
#else
  const cudaGraphEdgeData* edges = nullptr;
  check(cudaStreamGetCaptureInfo_v3(stream, &status, nullptr, nullptr, &nodes, &edges, &count),
        "cudaStreamGetCaptureInfo");
#endif
  if (status != cudaStreamCaptureStatusActive || count != 1)
    fail("a captured launch left ", count, " nodes to wait for, expected 1");
  return nodes[0];
}

class DeviceEngine {
 public:
  const int device;
  const AdalayerCudaOptions options;
  const Machine machine;
  const Model model;
  DeviceMemory image;
  std::mutex mutex;
  std::vector<std::unique_ptr<Workspace>> workspaces;
  std::vector<std::unique_ptr<Workspace>> captured;  // theirs for good

  DeviceEngine(std::span<const uint8_t> program, int on, const AdalayerCudaOptions& given)
      : device(on),
        options(given),
        machine(machine_of(on)),
        model(engine::read_program(program), machine) {
    const DeviceScope scope(device);
    const RelaxedCapture relaxed;
    image = DeviceMemory(static_cast<int64_t>(model.image().size()));
    if (image.bytes() > 0) {
      // Not the default stream: it may be part of somebody's capture.
      const OwnStream own;
      check(cudaMemcpyAsync(image.data(), model.image().data(), model.image().size(),
                            cudaMemcpyHostToDevice, own.stream),
            "copying the weights");
      check(cudaStreamSynchronize(own.stream), "copying the weights");
    }
  }

  ~DeviceEngine() {
    int before = -1;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    for (const auto& w : workspaces)
      if (w->used) cudaEventSynchronize(w->done);
    workspaces.clear();
    if (!captured.empty()) cudaDeviceSynchronize();
    captured.clear();
    image = {};
    if (before >= 0) cudaSetDevice(before);
  }

  bool overlap() const { return (options.flags & ADALAYER_CUDA_NO_OVERLAP) == 0; }
  int64_t most_images() const {
    const int64_t most = model.most_images();
    return options.images_per_pass > 0 ? std::min(options.images_per_pass, most) : most;
  }

  // ---- plans ----------------------------------------------------------------------------------

  ProductKey key(const Product& p) const {
    return {device,  p.bits,          p.piece,       p.channels,     p.positions, p.groups,
            p.depth, p.longest_block, p.block_steps, p.stored_cells, p.structured};
  }

  /// Choices for a batch size: forced, measured before, or the expected ones.
  std::vector<Choice> chosen(const LaunchPlan& plan) const {
    std::vector<Choice> found;
    for (const auto& product : plan.products) {
      const std::vector<Choice> all = choices(product, machine);
      if (all.empty()) return {};  // make_plan names the node
      Choice choice = all.front();
      if (options.choice >= 0) {
        choice = all[static_cast<size_t>(options.choice) % all.size()];
      } else if ((options.flags & ADALAYER_CUDA_TUNE) != 0) {
        const std::lock_guard lock(tuned_mutex);
        const auto at = tuned.find(key(product));
        if (at != tuned.end()) choice = at->second;
      }
      found.push_back(choice);
    }
    return found;
  }

  /// A plan whose addresses are this workspace's, which grows where it must.
  LaunchPlan plan_in(Workspace& w, int64_t batch, const std::vector<Choice>& choices) {
    const LaunchPlan sizes = make_plan(model, batch, {}, choices);
    if (sizes.arena_bytes > w.arena.bytes() || sizes.scratch_bytes > w.scratch.bytes()) {
      if (w.used) check(cudaEventSynchronize(w.done), "waiting for a workspace");
      w.ready.clear();  // their addresses end here
      if (sizes.arena_bytes > w.arena.bytes()) {
        w.arena = {};
        w.arena = DeviceMemory(sizes.arena_bytes);
      }
      if (sizes.scratch_bytes > w.scratch.bytes()) {
        w.scratch = {};
        w.scratch = DeviceMemory(sizes.scratch_bytes);
        const OwnStream own;
        check(cudaMemsetAsync(w.scratch.data(), 0, static_cast<size_t>(sizes.scratch_bytes),
                              own.stream),
              "cudaMemsetAsync");
        check(cudaStreamSynchronize(own.stream), "cudaMemsetAsync");
      }
    }
    LaunchPlan plan =
        make_plan(model, batch, {image.data(), w.arena.data(), w.scratch.data()}, choices);
    for (Launch& l : plan.launches) {
      allow_shared_memory(l);
      if (l.output_at >= 0 && options.on_grid != 0) {
        auto* out = reinterpret_cast<ConvOutput*>(l.params + l.output_at);
        out->on_grid = 1;
        out->grid = {1.0f / options.grid_scale, options.grid_zero_point, options.grid_qmax};
        out->grid_scale = options.grid_scale;
      }
    }
    return plan;
  }

  /// Writes what a call brings into the launches; returns whether launch k changed.
  bool bring(Launch& l, const Call& call) const {
    bool changed = false;
    for (const auto& port : l.ports) {
      const void* at = port.is_output ? call.outputs[port.number] : call.inputs[port.number];
      changed |= replace(l.params, port.offset, &at, sizeof at);
    }
    if (l.nhwc_input >= 0) {
      const int32_t nhwc = call.nhwc != nullptr && call.nhwc[l.nhwc_input] != 0;
      changed |= replace(l.params, offsetof(QuantizeParams, nhwc), &nhwc, sizeof nhwc);
    }
    if (l.output_at >= 0) {
      const auto at = static_cast<size_t>(l.output_at);
      const int32_t nhwc = call.output_nhwc;
      changed |= replace(l.params, at + offsetof(ConvOutput, nhwc), &nhwc, sizeof nhwc);
      changed |= replace(l.params, at + offsetof(ConvOutput, residual_numbers), &call.residual,
                         sizeof call.residual);
    }
    return changed;
  }

  static bool depends_on_call(const Launch& l) {
    return !l.ports.empty() || l.nhwc_input >= 0 || l.output_at >= 0;
  }

  void capture(Ready& r) const {
    const OwnStream own;
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(own.stream, cudaStreamCaptureModeRelaxed),
          "cudaStreamBeginCapture");
    try {
      for (size_t k = 0; k < r.plan.launches.size(); ++k) {
        const Launch& l = r.plan.launches[k];
        enqueue(l, own.stream, overlap());
        if (depends_on_call(l)) r.port_nodes.push_back({k, last_captured(own.stream)});
      }
    } catch (...) {
      cudaStreamEndCapture(own.stream, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    check(cudaStreamEndCapture(own.stream, &graph), "cudaStreamEndCapture");
    const cudaError_t code = cudaGraphInstantiate(&r.graph, graph, 0);
    r.source = graph;  // its nodes name those of the executable one
    check(code, "cudaGraphInstantiate");
  }

  /// Gives a node of the graph its launch's new parameters; false where the runtime refuses.
  static bool update(Ready& r, const Ready::PortNode& port) {
    Launch& l = r.plan.launches[port.launch];
    cudaKernelNodeParams node{};
    node.func = const_cast<void*>(l.kernel.function);
    node.gridDim = dim3(l.grid[0], l.grid[1], l.grid[2]);
    node.blockDim = dim3(static_cast<unsigned>(l.kernel.threads));
    node.sharedMemBytes = static_cast<unsigned>(l.kernel.shared_bytes);
    void* arguments[] = {l.params};
    node.kernelParams = arguments;
    if (cudaGraphExecKernelNodeSetParams(r.graph, port.node, &node) == cudaSuccess) return true;
    cudaGetLastError();
    return false;
  }

  void recapture(Ready& r) const {
    r.drop_graph();
    capture(r);
  }

  /// `stream` is the caller's: measuring writes to the call's outputs, whose memory earlier work of
  /// that stream may still use.
  Ready& ready(Workspace& w, int64_t batch, const Call& call, bool with_graph,
               cudaStream_t stream) {
    for (auto it = w.ready.begin(); it != w.ready.end(); ++it) {
      if ((*it)->batch != batch) continue;
      w.ready.splice(w.ready.begin(), w.ready, it);
      return *w.ready.front();
    }
    const LaunchPlan sizes = make_plan(model, batch, {});
    const bool tune = with_graph && options.choice < 0 && (options.flags & ADALAYER_CUDA_TUNE) != 0;
    if (tune) {
      check(cudaStreamSynchronize(stream), "waiting for earlier work");
      measure_choices(w, batch, sizes, call);
    }
    auto made = std::make_unique<Ready>();
    made->batch = batch;
    made->plan = plan_in(w, batch, chosen(sizes));
    for (Launch& l : made->plan.launches)
      bring(l, call);
    if (with_graph && (options.flags & ADALAYER_CUDA_NO_GRAPH) == 0) capture(*made);
    w.ready.push_front(std::move(made));
    while (w.ready.size() > kMostReady) {
      if (w.used) check(cudaEventSynchronize(w.done), "waiting for a workspace");
      w.ready.pop_back();
    }
    return *w.ready.front();
  }

  // ---- measuring --------------------------------------------------------------------------------

  /// The choices that are worth a measurement, the one that is expected to be fastest first.
  std::vector<Choice> candidates(const Product& product) const {
    std::vector<Choice> found;
    int count[kForms] = {};
    for (const Choice& choice : choices(product, machine)) {
      const int most = choice.form == Form::Dense ? kMostMeasured : kMostMeasuredSparse;
      if (count[static_cast<int>(choice.form)]++ < most) found.push_back(choice);
    }
    return found;
  }

  /// Measures the first choices of products that have not been measured.
  void measure_choices(Workspace& w, int64_t batch, const LaunchPlan& sizes, const Call& call) {
    struct Best {
      Choice choice;
      double ms = 1e30;
    };
    std::map<ProductKey, Best> best;
    std::vector<std::vector<Choice>> all;
    size_t rounds = 0;
    for (const auto& product : sizes.products) {
      all.push_back(candidates(product));
      if (all.back().empty()) return;
      const std::lock_guard lock(tuned_mutex);
      if (tuned.contains(key(product))) continue;
      best.try_emplace(key(product));
      rounds = std::max(rounds, all.back().size());
    }
    if (best.empty()) return;
    if (w.used) check(cudaEventSynchronize(w.done), "waiting for a workspace");
    const OwnStream own;
    Event begin, end;
    for (size_t round = 0; round < rounds; ++round) {
      std::vector<Choice> choices;
      for (const auto& options_of : all)
        choices.push_back(options_of[std::min(round, options_of.size() - 1)]);
      LaunchPlan plan = plan_in(w, batch, choices);
      std::map<ProductKey, bool> seen;
      for (Launch& l : plan.launches) {
        bring(l, call);
        if (l.choice < 0 || round >= all[static_cast<size_t>(l.choice)].size()) continue;
        const auto name = key(sizes.products[static_cast<size_t>(l.choice)]);
        const auto at = best.find(name);
        if (at == best.end() || seen[name]) continue;
        seen[name] = true;
        enqueue(l, own.stream, false);
        begin.record(own.stream);
        for (int k = 0; k < kMeasuredLaunches; ++k)
          enqueue(l, own.stream, false);
        end.record(own.stream);
        const double ms = milliseconds(begin, end);
        if (ms < at->second.ms) at->second = {choices[static_cast<size_t>(l.choice)], ms};
      }
    }
    const std::lock_guard lock(tuned_mutex);
    for (const auto& [name, found] : best)
      tuned[name] = found.choice;
  }

  void profile(int64_t batch, int rounds, AdalayerCudaNodeProfile* profiles) {
    const RelaxedCapture relaxed;
    const std::lock_guard lock(mutex);
    const DeviceScope scope(device);
    batch = std::min(batch, most_images());
    const auto& program = model.program();
    std::vector<DeviceMemory> memory;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    const auto allocate = [&](int32_t v) {
      const auto& value = program.values[v];
      memory.emplace_back(batch * value.c * value.h * value.w * 4);
      check(cudaMemset(memory.back().data(), 0, static_cast<size_t>(memory.back().bytes())),
            "cudaMemset");
      return memory.back().data();
    };
    for (const int32_t v : program.inputs)
      inputs.push_back(allocate(v));
    for (const int32_t v : program.outputs)
      outputs.push_back(allocate(v));
    const Call call{inputs, outputs};
    Workspace w;
    check(cudaEventCreateWithFlags(&w.done, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    const OwnStream own;
    Ready& r = ready(w, batch, call, true, own.stream);
    const size_t nodes = program.nodes.size();
    std::vector<std::vector<double>> samples(nodes);
    std::vector<std::string> names(nodes);
    Event begin, end;
    for (int round = 0; round < rounds + 1; ++round) {
      std::vector<double> spent(nodes, 0.0);
      for (const Launch& l : r.plan.launches) {
        const auto node = static_cast<size_t>(l.node);
        // Several launches in a row: one alone would measure the launch.
        begin.record(own.stream);
        for (int k = 0; k < kMeasuredLaunches; ++k)
          enqueue(l, own.stream, overlap());
        end.record(own.stream);
        spent[node] += 1e3 * milliseconds(begin, end) / kMeasuredLaunches;
        names[node] = l.name;
      }
      if (round == 0) continue;
      for (size_t k = 0; k < nodes; ++k)
        samples[k].push_back(spent[k]);
    }
    for (size_t k = 0; k < nodes; ++k) {
      auto& s = samples[k];
      std::nth_element(s.begin(), s.begin() + static_cast<std::ptrdiff_t>(s.size() / 2), s.end());
      profiles[k].microseconds = s.empty() ? 0.0 : s[s.size() / 2];
      const size_t length = std::min(names[k].size(), sizeof profiles[k].kernel - 1);
      std::memcpy(profiles[k].kernel, names[k].data(), length);
      profiles[k].kernel[length] = '\0';
    }
  }

  // ---- calls ------------------------------------------------------------------------------------

  Workspace& add_workspace(std::vector<std::unique_ptr<Workspace>>& to) {
    auto w = std::make_unique<Workspace>();
    check(cudaEventCreateWithFlags(&w->done, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    to.push_back(std::move(w));
    return *to.back();
  }

  /// A workspace that this stream may use now, or once its last call is done.
  Workspace& borrow(cudaStream_t stream) {
    for (const auto& w : workspaces)
      if (w->used && w->stream == stream) return *w;
    for (const auto& w : workspaces)
      if (!w->used || cudaEventQuery(w->done) == cudaSuccess) return *w;
    cudaGetLastError();  // "not ready" is no error
    if (workspaces.size() < kMostWorkspaces) return add_workspace(workspaces);
    Workspace& w = *workspaces.front();
    check(cudaStreamWaitEvent(stream, w.done, 0), "cudaStreamWaitEvent");
    std::rotate(workspaces.begin(), workspaces.begin() + 1, workspaces.end());
    return w;
  }

  void run_part(int64_t batch, const Call& call, cudaStream_t stream, bool capturing) {
    Workspace& w = capturing ? add_workspace(captured) : borrow(stream);
    Ready& r = ready(w, batch, call, !capturing, stream);
    if (r.graph != nullptr && !capturing) {
      bool followed = true;
      for (const auto& port : r.port_nodes)
        if (bring(r.plan.launches[port.launch], call)) followed = followed && update(r, port);
      if (!followed) recapture(r);
      check(cudaGraphLaunch(r.graph, stream), "cudaGraphLaunch");
    } else {
      for (size_t k = 0; k < r.plan.launches.size(); ++k) {
        Launch& l = r.plan.launches[k];
        bring(l, call);
        // In front of the first one is work of others.
        enqueue(l, stream, overlap() && k > 0);
      }
    }
    if (capturing) return;
    check(cudaEventRecord(w.done, stream), "cudaEventRecord");
    w.stream = stream;
    w.used = true;
  }

  void run(const Call& call, int64_t batch, cudaStream_t stream) {
    if (batch < 0) fail<InvalidArgument>("expected a batch of 0 or more, got ", batch);
    if (batch == 0) return;
    const RelaxedCapture relaxed;
    const std::lock_guard lock(mutex);
    const DeviceScope scope(device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    const bool capturing = status == cudaStreamCaptureStatusActive;
    const int64_t most = most_images();
    if (batch <= most) return run_part(batch, call, stream, capturing);
    const auto& program = model.program();
    std::vector<const void*> inputs(call.inputs.begin(), call.inputs.end());
    std::vector<void*> outputs(call.outputs.begin(), call.outputs.end());
    const auto bytes = [&](int32_t v) {
      return program.values[v].c * program.values[v].h * program.values[v].w * 4;
    };
    const auto* residual = static_cast<const uint8_t*>(call.residual);
    for (int64_t first = 0; first < batch; first += most) {
      const int64_t count = std::min(most, batch - first);
      Call part{inputs, outputs, call.nhwc, residual, call.output_nhwc};
      run_part(count, part, stream, capturing);
      for (size_t k = 0; k < inputs.size(); ++k)
        inputs[k] = static_cast<const uint8_t*>(inputs[k]) + count * bytes(program.inputs[k]);
      for (size_t k = 0; k < outputs.size(); ++k)
        outputs[k] = static_cast<uint8_t*>(outputs[k]) + count * bytes(program.outputs[k]);
      if (residual != nullptr) residual += count * bytes(program.outputs[0]);
    }
  }
};

}  // namespace adalayer::cuda

struct AdalayerCudaEngine : adalayer::cuda::DeviceEngine {
  using DeviceEngine::DeviceEngine;
};

namespace {

using adalayer::fail;
using adalayer::InvalidArgument;
using adalayer::cuda::guarded;

void require_memory(const void* const* pointers, size_t count, const char* what) {
  for (size_t k = 0; k < count; ++k)
    if (pointers[k] == nullptr)
      fail<InvalidArgument>(what, " ", k, " has no memory");
    else if (reinterpret_cast<uintptr_t>(pointers[k]) % alignof(float) != 0)
      fail<InvalidArgument>(what, " ", k, " is not aligned to the ", alignof(float),
                            " bytes of its numbers");
}

}  // namespace

extern "C" {

int adalayer_cuda_engine_create(const void* program, size_t bytes, int device,
                                const AdalayerCudaOptions* options, AdalayerCudaEngine** engine) {
  if (program == nullptr || options == nullptr || engine == nullptr)
    return ADALAYER_CUDA_NULL_POINTER;
  if (options->struct_size != sizeof(AdalayerCudaOptions)) return ADALAYER_CUDA_STRUCT_SIZE;
  *engine = nullptr;
  return guarded([&] {
    *engine =
        new AdalayerCudaEngine({static_cast<const uint8_t*>(program), bytes}, device, *options);
  });
}

void adalayer_cuda_engine_destroy(AdalayerCudaEngine* engine) { delete engine; }

int adalayer_cuda_engine_run(AdalayerCudaEngine* engine, const void* const* inputs,
                             const uint8_t* nhwc, int64_t batch, void* const* outputs,
                             uint64_t stream) {
  if (engine == nullptr || inputs == nullptr || outputs == nullptr)
    return ADALAYER_CUDA_NULL_POINTER;
  return guarded([&] {
    const auto& program = engine->model.program();
    if (batch > 0) {
      require_memory(inputs, program.inputs.size(), "input");
      require_memory(outputs, program.outputs.size(), "output");
    }
    engine->run({{inputs, program.inputs.size()}, {outputs, program.outputs.size()}, nhwc}, batch,
                adalayer::cuda::stream_of(stream));
  });
}

int adalayer_cuda_layer_run(AdalayerCudaEngine* engine, const void* input, uint8_t input_nhwc,
                            int64_t batch, const void* residual, void* output, uint8_t output_nhwc,
                            uint64_t stream) {
  if (engine == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  return guarded([&] {
    const auto& program = engine->model.program();
    if (program.inputs.size() != 1 || program.outputs.size() != 1)
      fail<InvalidArgument>("a layer has one input and one output, the program has ",
                            program.inputs.size(), " and ", program.outputs.size());
    if (batch > 0) {
      require_memory(&input, 1, "input");
      require_memory(&output, 1, "output");
      if (residual != nullptr) require_memory(&residual, 1, "residual");
    }
    engine->run({{&input, 1}, {&output, 1}, &input_nhwc, residual, output_nhwc != 0}, batch,
                adalayer::cuda::stream_of(stream));
  });
}

int adalayer_cuda_engine_info(AdalayerCudaEngine* engine, AdalayerCudaInfo* info) {
  if (engine == nullptr || info == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  if (info->struct_size != sizeof(AdalayerCudaInfo)) return ADALAYER_CUDA_STRUCT_SIZE;
  return guarded([&] {
    const std::lock_guard lock(engine->mutex);
    info->nodes = static_cast<int64_t>(engine->model.program().nodes.size());
    info->weight_bytes = engine->model.weight_bytes();
    info->image_bytes = engine->image.bytes();
    info->arena_bytes = 0;
    for (const auto& w : engine->workspaces)
      info->arena_bytes += w->arena.bytes() + w->scratch.bytes();
    info->most_images = engine->most_images();
  });
}

int adalayer_cuda_engine_profile(AdalayerCudaEngine* engine, int64_t batch, int rounds,
                                 AdalayerCudaNodeProfile* profiles) {
  if (engine == nullptr || profiles == nullptr) return ADALAYER_CUDA_NULL_POINTER;
  return guarded([&] {
    if (batch < 1 || rounds < 1)
      fail<InvalidArgument>("expected a batch and rounds of 1 or more, got ", batch, " and ",
                            rounds);
    engine->profile(batch, rounds, profiles);
  });
}

int adalayer_cuda_quantize(const void* x, int64_t count, float scale, int32_t zero_point,
                           int32_t qmax, int real, void* out, int device, uint64_t stream) {
  return guarded([&] {
    if (count < 0 || !(scale > 0.0f) || qmax < 1 || qmax > 255 || zero_point < 0 ||
        zero_point > qmax)
      fail<InvalidArgument>("a grid of scale ", scale, ", zero point ", zero_point,
                            " and levels 0 to ", qmax, " over ", count, " values");
    if (count == 0) return;
    require_memory(&x, 1, "input");
    require_memory(&out, 1, "output");
    const adalayer::cuda::DeviceScope scope(device);
    // Parts, so that block numbers stay in 31 bits.
    constexpr int64_t kMost = int64_t{1} << 38;
    for (int64_t first = 0; first < count; first += kMost) {
      adalayer::cuda::GridParams p{};
      p.in = static_cast<const float*>(x) + first;
      p.numbers = real != 0 ? static_cast<float*>(out) + first : nullptr;
      p.levels = real != 0 ? nullptr : static_cast<uint8_t*>(out) + first;
      p.count = std::min(kMost, count - first);
      p.grid = {1.0f / scale, zero_point, qmax};
      p.scale = scale;
      adalayer::cuda::Launch l;
      l.kernel = adalayer::cuda::kernel_info(adalayer::cuda::Kernel::OnGrid);
      l.name = "quantize";
      l.grid[0] = static_cast<uint32_t>((p.count + l.kernel.threads - 1) / l.kernel.threads);
      l.set_params(p);
      adalayer::cuda::enqueue(l, adalayer::cuda::stream_of(stream), false);
    }
  });
}

}  // extern "C"

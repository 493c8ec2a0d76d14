// A program made ready for this machine: derived weights, memory plan, executor.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/program.hpp"
#include "reference/spec.hpp"

namespace adalayer::engine {

/// Weights below 8 bits: packed in memory and unpacked in every call, unpacked to bytes at load,
/// or, layer by layer, whatever the clock says (planner.hpp).
enum class WeightForm : uint8_t { Measured, Streamed, Resident };

struct EngineOptions {
  // Images that one thread takes through the whole program at a time; 0 lets the planner choose,
  // which then also lets nodes with large tensors run image by image.
  int64_t chunk = 0;
  // What one thread's tensors may take of the second-level cache; 0 is 1 MiB.
  int64_t cache_bytes = 0;
  WeightForm weights = WeightForm::Measured;
  // Threads that are timed; 0 is default_threads().
  int threads = 0;
  // Engine::plan() of the same program: followed where this machine, its kernels and the threads
  // are those that it was measured with, instead of measuring again.
  std::string plan = {};
  // What the program may take in all: its own bytes, the weights and tables of this machine, and
  // one call's tensors. More throws LimitExceeded before anything of that size is allocated. 0: no
  // limit.
  int64_t memory_bytes = 0;
};

/// One input batch, [batch][c][h][w] or [batch][h][w][c]: float32 or int32, as the program says.
struct InputTensor {
  const void* data = nullptr;
  Layout layout = Layout::NCHW;

  const float* floats() const { return static_cast<const float*>(data); }
  const int32_t* ids() const { return static_cast<const int32_t*>(data); }
};

/// What one node costs, for coverage().
struct NodeProfile {
  std::string name;  // the node's
  OpKind op = OpKind::Conv;
  std::string kernel;         // what runs: "avx2 panels, resident", "amx depthwise", "avx2"
  int bits = 0;               // of the weights; 0 without weights
  int64_t macs = 0;           // per image
  int64_t packed_bytes = 0;   // canonical weights
  int64_t derived_bytes = 0;  // weights as this machine holds them
  std::string why;            // how zeros are used, and what was measured; may be empty
  double microseconds = 0.0;  // median over the rounds; 0 if never measured
};

/// Immutable after construction; run() may be called from many threads at once. Each call borrows a
/// workspace from a pool that grows to the number of concurrent calls; a warm call allocates
/// nothing.
class Engine {
 public:
  /// Validates the program. Calls share memory with those of `memory` where it is not null; it need
  /// not outlive this one. Throws InvalidArgument or CorruptData naming the node, or LimitExceeded.
  explicit Engine(Program program, const EngineOptions& options = {},
                  const Engine* memory = nullptr);

  /// The network of `base`, which may be of any size, for another image size: `program` is what
  /// at_size() made of the compiled one. The weights of `base`, what was chosen for them, and the
  /// memory of calls are shared; nothing is timed. `base` need not outlive this one.
  Engine(Program program, const Engine& base);

  /// The same with what the clock chose for `measured`, an engine of its own for that size: its
  /// weights are taken where none of `holders` has the same ones. Calls share memory with those of
  /// `base`.
  Engine(const Engine& measured, const Engine& base, std::span<const Engine* const> holders);

  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  const Program& program() const;

  /// Whether input k may be NHWC: only quantization reads it. Others are NCHW.
  bool any_order(size_t input) const;

  /// Outputs are [batch][c][h][w]. threads <= 0: default_threads(). Zero images are allowed.
  void run(std::span<const InputTensor> inputs, int64_t batch, std::span<float* const> outputs,
           int threads) const;

  /// The same by the scalar interpreter (interpret.hpp): the specification, slow.
  void run_reference(std::span<const InputTensor> inputs, int64_t batch,
                     std::span<float* const> outputs) const;

  /// Times every node over `rounds` runs of `batch` images of noise.
  std::vector<NodeProfile> profile(int64_t batch, int threads, int rounds) const;

  /// Name and ConvStep::forms_key() of every convolution: the same algorithms could run those of
  /// other weights or grids, and would take the same time, where the keys are equal.
  std::vector<std::pair<std::string, uint64_t>> forms() const;

  /// What the clock has chosen, for EngineOptions::plan; empty where nothing was measured.
  const std::string& plan() const;

  size_t weight_bytes() const;     // derived weights
  size_t workspace_bytes() const;  // one call's
  /// What this engine alone holds beside weights and workspaces that it shares with other sizes.
  size_t own_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace adalayer::engine

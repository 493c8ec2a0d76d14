// How a prepared program runs: memory of calls, and threads that share its nodes.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "engine/engine.hpp"
#include "engine/layouts.hpp"
#include "engine/memory.hpp"
#include "engine/program.hpp"
#include "engine/steps.hpp"

namespace adalayer::engine {

/// What the runs of a program follow.
struct PreparedProgram {
  explicit PreparedProgram(Program p) : program(std::move(p)) {}

  Program program;
  const cpu::KernelRow* kernels = nullptr;  // null: everything runs on the interpreter
  std::vector<ValueLayout> layouts;
  std::vector<Step> steps;
  // A thread takes `chunk` images at a time. The first `front` nodes run image by image, because
  // their tensors are large; the rest run on all images together, because their weights are.
  int64_t chunk = 1;
  size_t front = 0;
  ArenaPlan arena;
  std::vector<int> port;  // [values] index among program inputs, or outputs, or -1
  std::vector<bool> is_output;
  std::vector<bool> in_front;  // [values] memory of one image only
};

/// Bytes of one image at the program's boundary: of floats and of ids.
inline int64_t port_bytes(const Value& v) { return v.c * v.h * v.w * 4; }

/// How far a team is with one node: which parts somebody has begun, and how many are done. A thread
/// that comes late finds the parts taken; one that never comes is not waited for.
struct alignas(64) Progress {
  std::atomic<uint64_t> begun{0};
  std::atomic<int> done{0};
};

/// Memory for the tensors of calls, which all sizes of one network share: what is not in use waits
/// here, and has grown to the largest size that it has been used for.
class ArenaPool {
 public:
  AlignedBuffer take(size_t bytes) {
    AlignedBuffer arena;
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        arena = std::move(idle_.back());
        idle_.pop_back();
      } else {
        idle_.reserve(++made_);  // giving back must not allocate
      }
    }
    if (arena.size() < bytes) {
      arena = AlignedBuffer();  // before the larger one is there
      arena = AlignedBuffer(bytes);
      arena.clear();
    }
    return arena;
  }
  void give(AlignedBuffer arena) {
    const std::lock_guard lock(mutex_);
    if (idle_.size() < idle_.capacity()) idle_.push_back(std::move(arena));
  }

 private:
  std::mutex mutex_;
  std::vector<AlignedBuffer> idle_;
  size_t made_ = 0;
};

/// Memory of one call: tensors, the team's progress, and the order in which each member reads the
/// weights.
struct Workspace {
  AlignedBuffer arena;
  const uint8_t* bound = nullptr;  // the arena that `frame` points into
  Frame frame;
  Frame single;  // one image of `frame`, for the nodes that run image by image
  std::vector<Progress> progress;
  std::atomic<bool> failed{false};  // a member met an exception: the others stop waiting for it
  int team = 0;
  std::vector<std::vector<cpu::WeightStream::Segment>> segments;  // [member][nodes]
};

/// Runs a prepared program, which outlives it. Safe from many threads; a warm call allocates
/// nothing.
class Executor {
 public:
  Executor(const PreparedProgram& prepared, std::shared_ptr<ArenaPool> arenas)
      : p_(prepared), arenas_(std::move(arenas)) {}

  std::unique_ptr<Workspace> borrow() const;
  void give_back(std::unique_ptr<Workspace> workspace) const;

  /// Points the boundary values of `frame` at images [first, first + count) of the caller's.
  void bind(Frame& frame, std::span<const InputTensor> inputs, std::span<float* const> outputs,
            int64_t first, int64_t count) const;

  /// All images of the frame by a team whose members share each node. `seconds`, which may be null:
  /// what each node took is added.
  void run_together(Workspace& w, int threads, std::vector<double>* seconds) const;
  /// The same by this thread alone.
  void run_alone(Workspace& w) const;

 private:
  std::unique_ptr<Workspace> make_workspace() const;
  /// Gives it memory for the tensors.
  void attach(Workspace& w) const;
  void set_team(Workspace& w, int team) const;
  void run_part(const Step& step, const Frame& frame, cpu::Part part, int team,
                cpu::WeightStream* stream, int64_t segment) const;
  /// A member's share of node k, then the parts that nobody has begun, then the wait for the rest.
  void run_shared(Workspace& w, size_t k, int member, int team, cpu::WeightStream& stream) const;
  /// Points `single` at image i of the frame.
  void select(Workspace& w, int64_t i) const;
  /// One thread's way through the program, or a member's of a team.
  void run_member(Workspace& w, int member, int team, std::vector<double>* seconds) const;

  const PreparedProgram& p_;
  std::shared_ptr<ArenaPool> arenas_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
};

}  // namespace adalayer::engine

#include "engine/executor.hpp"

#include <algorithm>
#include <chrono>

#include "core/relax.hpp"
#include "core/thread_pool.hpp"
#include "cpu/image/ops.hpp"

namespace adalayer::engine {
namespace {

using cpu::Part;
using Clock = std::chrono::steady_clock;

// How far ahead of their use weights are fetched into the second-level cache.
constexpr int64_t kPrefetchWindow = 512 << 10;
constexpr int kMaxTeam = 64;

int64_t parts_of(const Step& step, int team) { return std::min<int64_t>(step.max_parts, team); }

/// Where a recurrent layer's tensors are: planes of floats, whose positions are its steps.
void run_recurrence(const cpu::Recurrence& layer, const Node& node, const Frame& frame, Part part) {
  const RecurrenceSpec& s = layer.spec();
  const auto begin = [&](size_t k) {
    return node.inputs.size() > k ? frame.floats(node.inputs[k], 0) : nullptr;
  };
  cpu::RecurrenceJob job;
  job.images = frame.images;
  job.products = {frame.floats(node.inputs[0], 0), s.outputs() * s.steps, 1, s.steps};
  job.state = begin(1);
  job.cell = begin(2);
  if (frame.program->values[node.output].kind == ValueKind::U8)
    job.levels = frame.image(node.output, 0);
  else
    job.reals = {frame.floats(node.output, 0), s.channels() * s.steps, 1, s.steps};
  layer.run(job, part);
}

/// Positions are the rows of a linear layer; floats lie in planes.
void run_linear(const cpu::Linear& layer, const Node& node, const Frame& frame, Part part) {
  const Value& out = frame.program->values[node.output];
  cpu::LinearJob job;
  job.images = frame.images;
  job.positions = out.h * out.w;
  job.levels = frame.image(node.inputs[0], 0);
  if (out.kind == ValueKind::U8)
    job.level_out = frame.image(node.output, 0);
  else
    job.real_out = {frame.floats(node.output, 0), out.c * job.positions, 1, job.positions};
  layer.run(job, part);
}

}  // namespace

std::unique_ptr<Workspace> Executor::borrow() const {
  {
    std::unique_lock lock(mutex_);
    if (!idle_.empty()) {
      auto workspace = std::move(idle_.back());
      idle_.pop_back();
      lock.unlock();
      attach(*workspace);
      return workspace;
    }
  }
  auto workspace = make_workspace();
  attach(*workspace);
  const std::lock_guard lock(mutex_);
  idle_.reserve(idle_.capacity() + 1);  // giving back must not allocate
  return workspace;
}

void Executor::attach(Workspace& w) const {
  // Kernels read whole blocks beyond the last tensor, too.
  w.arena = arenas_->take(static_cast<size_t>(p_.arena.bytes) + 64);
  if (w.bound == w.arena.data()) return;
  w.bound = w.arena.data();
  for (size_t v = 0; v < p_.program.values.size(); ++v)
    if (p_.port[v] < 0) w.frame.data[v] = w.arena.data() + p_.arena.offsets[v];
  w.single.data = w.frame.data;
}

std::unique_ptr<Workspace> Executor::make_workspace() const {
  auto workspace = std::make_unique<Workspace>();
  workspace->progress = std::vector<Progress>(p_.steps.size());
  Frame& frame = workspace->frame;
  frame.program = &p_.program;
  frame.layouts = &p_.layouts;
  frame.kernels = p_.kernels;
  frame.data.assign(p_.program.values.size(), nullptr);
  frame.order.assign(p_.program.values.size(), Layout::NCHW);
  workspace->single = frame;
  return workspace;
}

void Executor::give_back(std::unique_ptr<Workspace> workspace) const {
  arenas_->give(std::move(workspace->arena));
  const std::lock_guard lock(mutex_);
  idle_.push_back(std::move(workspace));
}

void Executor::bind(Frame& frame, std::span<const InputTensor> inputs,
                    std::span<float* const> outputs, int64_t first, int64_t count) const {
  frame.images = count;
  for (size_t v = 0; v < p_.port.size(); ++v) {
    if (p_.port[v] < 0) continue;
    const int64_t offset = first * port_bytes(p_.program.values[v]);
    if (p_.is_output[v]) {
      frame.data[v] = reinterpret_cast<uint8_t*>(outputs[p_.port[v]]) + offset;
    } else {
      // Program inputs are only read.
      frame.data[v] = static_cast<uint8_t*>(const_cast<void*>(inputs[p_.port[v]].data)) + offset;
      frame.order[v] = inputs[p_.port[v]].layout;
    }
  }
}

void Executor::set_team(Workspace& w, int team) const {
  if (w.team == team) return;
  w.team = team;
  w.segments.assign(static_cast<size_t>(team), {});
  for (int member = 0; member < team; ++member) {
    int64_t before = 0;
    for (const Step& step : p_.steps) {
      cpu::WeightStream::Segment segment{nullptr, 0, 0};
      if (step.conv) {
        const int64_t parts = parts_of(step, team);
        const bool columns = step.conv->by_columns(team);
        if (member < parts)
          segment = step.conv->segment(columns ? Part{member, parts} : Part{0, 1});
      }
      segment.before = before;
      before += segment.bytes;
      w.segments[member].push_back(segment);
    }
  }
}

void Executor::run_part(const Step& step, const Frame& frame, Part part, int team,
                        cpu::WeightStream* stream, int64_t segment) const {
  const Node& node = *step.node;
  const bool u8_out = p_.program.values[node.output].kind == ValueKind::U8;
  const ValueLayout& to = p_.layouts[node.output];
  if (part.index == 0 && u8_out && to.own_input == nullptr && !to.in_place())
    cpu::fill_padding(frame.layout(node.output), frame.data[node.output], frame.images,
                      static_cast<uint8_t>(p_.program.values[node.output].zero_point));
  if (step.floats) {
    step.floats->run(frame.floats(node.inputs[0], 0), frame.floats(node.output, 0), frame.images,
                     part);
    return;
  }
  if (step.recurrence) {
    run_recurrence(*step.recurrence, node, frame, part);
    return;
  }
  if (step.linear) {
    run_linear(*step.linear, node, frame, part);
    return;
  }
  if (!step.conv) {
    for (int64_t n = 0; n < frame.images; ++n)
      step.run_image(frame, n, part);
    return;
  }
  ConvBuffers b;
  b.in = frame.data[node.inputs[0]];
  b.residual = node.inputs.size() > 1 ? frame.data[node.inputs[1]] : nullptr;
  if (u8_out)
    b.out = frame.data[node.output];
  else
    b.out_f32 = frame.floats(node.output, 0);
  b.images = frame.images;
  step.conv->run(b, part, team > 1 && step.conv->by_columns(team), stream, segment);
}

void Executor::run_shared(Workspace& w, size_t k, int member, int team,
                          cpu::WeightStream& stream) const {
  const Step& step = p_.steps[k];
  const auto parts = static_cast<int>(parts_of(step, team));
  Progress& progress = w.progress[k];
  // One's own part first: its rows or weights are in this core's cache.
  for (int i = 0; i < parts; ++i) {
    const int p = (member + i) % parts;
    const uint64_t mine = uint64_t{1} << p;
    if ((progress.begun.load(std::memory_order_relaxed) & mine) != 0) continue;
    if ((progress.begun.fetch_or(mine, std::memory_order_relaxed) & mine) != 0) continue;
    run_part(step, w.frame, {p, parts}, team, p == member ? &stream : nullptr,
             static_cast<int64_t>(k));
    progress.done.fetch_add(1, std::memory_order_release);
  }
  while (progress.done.load(std::memory_order_acquire) < parts &&
         !w.failed.load(std::memory_order_relaxed))
    cpu_relax();
}

void Executor::select(Workspace& w, int64_t i) const {
  w.single.images = 1;
  w.single.order = w.frame.order;
  for (size_t v = 0; v < p_.port.size(); ++v) {
    const Value& value = p_.program.values[v];
    const int64_t bytes = p_.in_front[v]                ? 0
                          : value.kind == ValueKind::U8 ? p_.layouts[v].layout.image_bytes
                                                        : port_bytes(value);
    w.single.data[v] = w.frame.data[v] + i * bytes;
  }
}

void Executor::run_member(Workspace& w, int member, int team, std::vector<double>* seconds) const {
  const cpu::KernelScope scope(p_.kernels);
  cpu::WeightStream stream(w.segments[member], kPrefetchWindow);
  auto last = seconds == nullptr ? Clock::time_point{} : Clock::now();
  const auto timed = [&](size_t k) {
    if (seconds == nullptr) return;
    const auto now = Clock::now();
    (*seconds)[k] += std::chrono::duration<double>(now - last).count();
    last = now;
  };
  size_t k = 0;
  if (team == 1 && w.frame.images > 1) {
    for (int64_t i = 0; i < w.frame.images && p_.front > 0; ++i) {
      select(w, i);
      // The weights of the next image's first node are those of this one's: no prefetching.
      for (size_t f = 0; f < p_.front; ++f, timed(f - 1))
        run_part(p_.steps[f], w.single, {0, 1}, 1, nullptr, 0);
    }
    k = p_.front;
  }
  for (; k < p_.steps.size(); ++k) {
    if (team == 1) {
      run_part(p_.steps[k], w.frame, {0, 1}, 1, &stream, static_cast<int64_t>(k));
    } else {
      if (w.failed.load(std::memory_order_relaxed)) return;
      try {
        run_shared(w, k, member, team, stream);
      } catch (...) {
        w.failed.store(true, std::memory_order_relaxed);
        throw;  // parallel_for hands it to the caller
      }
    }
    timed(k);
  }
}

void Executor::run_together(Workspace& w, int threads, std::vector<double>* seconds) const {
  const int team = std::clamp(threads, 1, kMaxTeam);
  set_team(w, team);
  if (team == 1) {
    run_member(w, 0, 1, seconds);
    return;
  }
  w.failed.store(false, std::memory_order_relaxed);
  for (Progress& p : w.progress) {
    p.begun.store(0, std::memory_order_relaxed);
    p.done.store(0, std::memory_order_relaxed);
  }
  parallel_for(team, team, [&](int64_t member, int) {
    run_member(w, static_cast<int>(member), team, member == 0 ? seconds : nullptr);
  });
}

void Executor::run_alone(Workspace& w) const {
  set_team(w, 1);
  run_member(w, 0, 1, nullptr);
}

}  // namespace adalayer::engine

#include "engine/engine.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <random>

#include "core/aligned_buffer.hpp"
#include "core/status.hpp"
#include "core/thread_pool.hpp"
#include "engine/executor.hpp"
#include "engine/interpret.hpp"
#include "engine/limits.hpp"
#include "engine/memory.hpp"
#include "engine/planner.hpp"
#include "engine/steps.hpp"
#include "engine/token_ids.hpp"

namespace adalayer::engine {
namespace {

// What one thread's tensors may take of the second-level cache (2 MiB on the machines that this was
// tuned on).
constexpr int64_t kActivationBudget = 1 << 20;

/// Images of noise for every input, zeros as ids, and room for the outputs.
struct Noise {
  std::vector<InputTensor> inputs;
  std::vector<float*> outputs;

  Noise(const Program& program, int64_t batch) {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    for (const int32_t v : program.inputs) {
      memory_.emplace_back(static_cast<size_t>(batch * port_bytes(program.values[v]) / 4));
      if (program.values[v].kind == ValueKind::F32)
        for (float& x : memory_.back())
          x = normal(random);
      inputs.push_back({memory_.back().data(), Layout::NCHW});
    }
    for (const int32_t v : program.outputs) {
      memory_.emplace_back(static_cast<size_t>(batch * port_bytes(program.values[v]) / 4));
      outputs.push_back(memory_.back().data());
    }
  }

 private:
  std::vector<std::vector<float>> memory_;
};

}  // namespace

struct Engine::Impl : PreparedProgram {
  Isa isa = Isa::Scalar;
  EngineOptions options;
  std::shared_ptr<ArenaPool> arenas;
  Executor executor;
  size_t shared_constants = 0;  // the first ones, which all sizes have
  size_t own = 0;    // bytes of packed weights and tables of positions that no other size has
  std::string plan;  // plan_line(); empty where nothing was measured
  std::vector<bool> any_order;  // [values] only read by quantization, which takes NHWC as well
  std::vector<int64_t> rows;    // [program inputs] table_rows()

  Impl(Program p, const EngineOptions& given, std::shared_ptr<ArenaPool> shared)
      : PreparedProgram(std::move(p)),
        options(given),
        arenas(std::move(shared)),
        executor(*this, arenas),
        shared_constants(program.constants.size()) {
    if (!prepare()) return;
    const auto fixed = [&](cpu::Room room) { return planned_memory(program, layouts, room); };
    check_memory(fixed(cpu::Room::Least) + largest_moment(), options.memory_bytes);
    // What weights may take beyond that is an offer, which memory may refuse.
    cpu::Room room =
        options.weights == WeightForm::Measured ? cpu::Room::Several : cpu::Room::Scratch;
    const auto fit_room = [&](double tensors) {
      const cpu::Room wanted = room;
      while (room != cpu::Room::Least && options.memory_bytes > 0 &&
             fixed(room) + tensors > static_cast<double>(options.memory_bytes))
        room = room == cpu::Room::Several ? cpu::Room::Scratch : cpu::Room::Least;
      return room == wanted;
    };
    fit_room(largest_moment());
    steps = build_steps(program, layouts, room);
    plan_chunks();
    if (!fit_room(static_cast<double>(arena.bytes))) steps = build_steps(program, layouts, room);
    check_memory(fixed(room) + static_cast<double>(arena.bytes), options.memory_bytes);
    choose_convolutions();
    const auto panels = std::make_shared<const AlignedBuffer>(
        pack_weights([](const ConvStep& conv) { return std::optional(conv.choice()); }));
    own = panels->size();
    for (Step& step : steps)
      if (step.conv) step.conv->settle(panels);
  }

  /// Of another size than `like`'s, with its weights and choices, in the memory of `arenas`.
  Impl(Program p, const Impl& like, std::shared_ptr<ArenaPool> shared)
      : PreparedProgram(std::move(p)),
        options(like.options),
        arenas(std::move(shared)),
        executor(*this, arenas) {
    if (!prepare()) return;
    if (isa != like.isa)
      fail<InvalidArgument>("the engine was compiled for ", isa_name(like.isa), ", but ",
                            isa_name(isa), " is in use now; compile it again");
    const double fixed = planned_memory(program, layouts, cpu::Room::Least);
    check_memory(fixed + largest_moment(), options.memory_bytes);
    SharedSteps found = build_steps(program, layouts, like.steps);
    steps = std::move(found.steps);
    plan_chunks();
    check_memory(fixed + static_cast<double>(arena.bytes), options.memory_bytes);
    for (const size_t k : found.own) {
      ConvStep& conv = *steps[k].conv;
      auto panels =
          std::make_shared<AlignedBuffer>(static_cast<size_t>(conv.panel_bytes(conv.choice())));
      conv.pack(panels->data(), conv.choice());
      own += panels->size();
      conv.settle(std::move(panels));
    }
  }

  /// Counts what at_size() has added to the constants of the compiled size.
  void count_tables(size_t shared) {
    shared_constants = shared;
    for (size_t k = shared; k < program.constants.size(); ++k)
      own += program.constants[k].bytes.size();
  }

  /// Weights that others have already, instead of those of the engine that this one is like.
  void share(std::span<const Engine* const> holders) {
    for (size_t k = 0; k < steps.size(); ++k) {
      if (!steps[k].conv) continue;
      const bool shared = std::any_of(holders.begin(), holders.end(), [&](const Engine* e) {
        return steps[k].conv->share(*e->impl_->steps[k].conv);
      });
      if (shared) continue;
      steps[k].conv->unshare();
      own += static_cast<size_t>(steps[k].conv->panel_bytes(steps[k].conv->choice()));
    }
  }

  /// What needs no weights; false where the interpreter runs everything.
  bool prepare() {
    validate(program);
    rows = table_rows(program);
    isa = active_isa();
    kernels = cpu::active_kernels();
    if (kernels == nullptr) {
      check_memory(interpreter_memory(program), options.memory_bytes);
      return false;
    }
    plan_ports();
    layouts = plan_layouts(program);
    return true;
  }

  void plan_chunks() {
    if (options.chunk > 0)
      chunk = options.chunk;
    else
      choose_chunk(options.cache_bytes > 0 ? options.cache_bytes : kActivationBudget);
    plan_memory();
  }

  void choose_convolutions() {
    if (options.weights != WeightForm::Measured) {
      for (Step& step : steps)
        if (step.conv) step.conv->choose({.resident = options.weights == WeightForm::Resident});
      return;
    }
    const int threads = options.threads > 0 ? options.threads : default_threads();
    const uint64_t key = planning_key(steps, threads);
    if (!apply_plan(options.plan, key, steps)) choose_by_measuring(threads, key);
    plan = plan_line(key, steps);
  }

  void choose_by_measuring(int threads, uint64_t key) {
    const std::optional<PlanCache> cache = PlanCache::of_user();
    if (cache && cache->apply(key, steps)) return;
    std::vector<AlignedBuffer> packed;
    for (int form = 0; form < most_forms(steps); ++form)
      for (const bool resident : {false, true})
        packed.push_back(pack_weights([&](const ConvStep& conv) -> std::optional<ConvChoice> {
          const ConvChoice choice{.resident = resident, .other_order = false, .form = form};
          if (conv.possible(choice) == choice) return choice;
          return std::nullopt;
        }));
    Noise noise(program, 1);
    // Not given back: it goes with what it was needed for.
    const auto workspace = executor.borrow();
    executor.bind(workspace->frame, noise.inputs, noise.outputs, 0, 1);
    choose_by_clock(steps, [&](std::vector<double>& seconds) {
      workspace->team = 0;  // which weights a member reads has changed
      executor.run_together(*workspace, threads, &seconds);
    });
    if (cache) cache->keep(key, steps);
  }

  /// A lower bound of the arena.
  double largest_moment() const {
    double most = 0.0;
    for (const int64_t bytes : live_bytes())
      most = std::max(most, static_cast<double>(bytes));
    return most;
  }

  /// Bytes of one image's tensors that are alive at each node.
  std::vector<int64_t> live_bytes() const {
    std::vector<int64_t> live(program.nodes.size(), 0);
    const std::vector<Lifetime> lifetimes = lifetimes_of([&](size_t v) { return image_bytes(v); });
    for (const Lifetime& l : lifetimes)
      for (int32_t k = std::max(l.first, 0); k <= l.last; ++k)
        live[k] += l.bytes;
    return live;
  }

  /// The chunk that saves the most weight traffic: weights of the nodes behind `front` are read
  /// once for `chunk` images, whose tensors must stay in the second-level cache.
  void choose_chunk(int64_t cache_bytes) {
    const std::vector<int64_t> live = live_bytes();
    int64_t most = 0;
    for (const int64_t images : {2, 4, 8}) {
      size_t first = steps.size();
      int64_t bytes = 0;
      while (first > 0 && live[first - 1] * images <= cache_bytes) {
        --first;
        bytes += static_cast<int64_t>(steps[first].derived_bytes());
      }
      const int64_t saved = bytes - bytes / images;
      // Small programs gain from longer runs of one node, too: the call of a node costs the same.
      if (first == steps.size() || (saved <= most && first > 0)) continue;
      most = saved;
      chunk = images;
      front = first;
    }
  }

  /// The weights of all convolutions in the order of their use, in the form that `form_of` says, if
  /// it says one.
  template <class Form>
  AlignedBuffer pack_weights(const Form& form_of) {
    int64_t bytes = 0;
    for (const Step& step : steps)
      if (step.conv)
        if (const auto form = form_of(*step.conv)) bytes += step.conv->panel_bytes(*form);
    AlignedBuffer buffer(static_cast<size_t>(bytes));
    uint8_t* at = buffer.data();
    for (Step& step : steps) {
      if (!step.conv) continue;
      const auto form = form_of(*step.conv);
      if (!form) continue;
      step.conv->pack(at, *form);
      at += step.conv->panel_bytes(*form);
    }
    return buffer;
  }

  void plan_ports() {
    port.assign(program.values.size(), -1);
    is_output.assign(program.values.size(), false);
    any_order.assign(program.values.size(), true);
    for (const Node& node : program.nodes)
      for (const int32_t v : node.inputs)
        if (node.op != OpKind::Quantize) any_order[v] = false;
    for (const int32_t v : program.outputs)
      any_order[v] = false;
    for (size_t k = 0; k < program.inputs.size(); ++k)
      port[program.inputs[k]] = static_cast<int>(k);
    for (size_t k = 0; k < program.outputs.size(); ++k) {
      if (port[program.outputs[k]] >= 0)
        continue;  // an input, or twice an output: copied at the end
      port[program.outputs[k]] = static_cast<int>(k);
      is_output[program.outputs[k]] = true;
    }
  }

  /// Bytes of one image of a value in the arena.
  int64_t image_bytes(size_t v) const {
    const Value& value = program.values[v];
    if (port[v] >= 0 || layouts[v].in_place()) return 0;
    return value.kind == ValueKind::U8 ? layouts[v].layout.image_bytes : port_bytes(value);
  }

  template <class Bytes>
  std::vector<Lifetime> lifetimes_of(const Bytes& bytes) const {
    std::vector<Lifetime> lifetimes(program.values.size());
    for (size_t v = 0; v < lifetimes.size(); ++v)
      lifetimes[v] = {bytes(v), -1, -1};
    for (size_t k = 0; k < program.nodes.size(); ++k) {
      const Node& node = program.nodes[k];
      const auto at = static_cast<int32_t>(k);
      lifetimes[node.output].first = at;
      lifetimes[node.output].last = std::max(lifetimes[node.output].last, at);
      for (const int32_t v : node.inputs)
        lifetimes[v].last = at;
    }
    // Their memory is there with the first of its pieces.
    for (size_t v = 0; v < lifetimes.size(); ++v)
      if (layouts[v].in_place())
        lifetimes[layouts[v].holder].first =
            std::min(lifetimes[layouts[v].holder].first, lifetimes[v].first);
    return lifetimes;
  }

  void plan_memory() {
    std::vector<Lifetime> lifetimes = lifetimes_of([&](size_t v) { return image_bytes(v); });
    for (size_t v = 0; v < lifetimes.size(); ++v) {
      Lifetime& l = lifetimes[v];
      if (l.bytes == 0) continue;
      if (l.last >= static_cast<int32_t>(front)) {
        l.bytes *= chunk;
        // Images of it pile up while the front nodes run again and again.
        if (l.first < static_cast<int32_t>(front)) l.first = 0;
      }
      if (program.values[v].kind == ValueKind::U8) l.bytes += layouts[v].layout.slack;
    }
    arena = plan_arena(lifetimes);
    in_front.assign(program.values.size(), false);
    for (size_t v = 0; v < lifetimes.size(); ++v)
      in_front[v] = port[v] < 0 && lifetimes[v].last < static_cast<int32_t>(front);
    for (size_t v = 0; v < lifetimes.size(); ++v) {
      const ValueLayout& at = layouts[v];
      if (!at.in_place()) continue;
      arena.offsets[v] = arena.offsets[at.holder] + at.channel;
      in_front[v] = in_front[at.holder];
    }
  }

  /// Image by image, so that memory does not grow with the batch.
  void interpret_images(std::span<const InputTensor> inputs, int64_t batch,
                        std::span<float* const> outputs) const {
    const auto elements = [&](int32_t v) { return port_bytes(program.values[v]) / 4; };
    std::vector<InputTensor> image(inputs.begin(), inputs.end());
    for (int64_t n = 0; n < batch; ++n) {
      for (size_t k = 0; k < image.size(); ++k)
        image[k].data = inputs[k].floats() + n * elements(program.inputs[k]);
      const auto results = interpret(program, image, 1);
      for (size_t k = 0; k < results.size(); ++k)
        std::copy(results[k].begin(), results[k].end(),
                  outputs[k] + n * elements(program.outputs[k]));
    }
  }

  void check(std::span<const InputTensor> inputs, int64_t batch,
             std::span<float* const> outputs) const {
    if (inputs.size() != program.inputs.size())
      fail<InvalidArgument>("expected ", program.inputs.size(), " inputs, got ", inputs.size());
    if (outputs.size() != program.outputs.size())
      fail<InvalidArgument>("expected ", program.outputs.size(), " outputs, got ", outputs.size());
    for (size_t k = 0; k < inputs.size() && kernels != nullptr; ++k) {
      const Value& value = program.values[program.inputs[k]];
      const bool same = value.c == 1 || value.h * value.w == 1;
      if (inputs[k].layout == Layout::NHWC && !same && !any_order[program.inputs[k]])
        fail<InvalidArgument>("input ", k, " ('", value.name,
                              "') is read as floats: expected NCHW order, got NHWC");
    }
    if (batch < 0) fail<InvalidArgument>("expected a batch of 0 or more, got ", batch);
    if (kernels != nullptr && active_isa() != isa)
      fail<InvalidArgument>("the engine was compiled for ", isa_name(isa), ", but ",
                            isa_name(active_isa()), " is in use now; compile it again");
    check_ids(program, rows, inputs, batch);
  }
};

Engine::Engine(Program program, const EngineOptions& options, const Engine* memory)
    : impl_(std::make_unique<Impl>(
          std::move(program), options,
          memory == nullptr ? std::make_shared<ArenaPool>() : memory->impl_->arenas)) {}
Engine::Engine(Program program, const Engine& base)
    : impl_(std::make_unique<Impl>(std::move(program), *base.impl_, base.impl_->arenas)) {
  impl_->count_tables(base.impl_->shared_constants);
}
Engine::Engine(const Engine& measured, const Engine& base, std::span<const Engine* const> holders)
    : impl_(std::make_unique<Impl>(measured.impl_->program, *measured.impl_, base.impl_->arenas)) {
  impl_->count_tables(base.impl_->shared_constants);
  impl_->share(holders);
  impl_->plan = measured.plan();
}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

const Program& Engine::program() const { return impl_->program; }

bool Engine::any_order(size_t input) const {
  return impl_->kernels == nullptr || impl_->any_order[impl_->program.inputs[input]];
}

void Engine::run(std::span<const InputTensor> inputs, int64_t batch,
                 std::span<float* const> outputs, int threads) const {
  const Impl& e = *impl_;
  e.check(inputs, batch, outputs);
  if (batch == 0) return;
  if (e.kernels == nullptr) return e.interpret_images(inputs, batch, outputs);
  if (threads <= 0) threads = default_threads();

  if (threads == 1 || batch < threads) {
    auto workspace = e.executor.borrow();
    const int64_t chunk = threads == 1 ? e.chunk : 1;
    for (int64_t first = 0; first < batch; first += chunk) {
      e.executor.bind(workspace->frame, inputs, outputs, first, std::min(chunk, batch - first));
      e.executor.run_together(*workspace, threads, nullptr);
    }
    e.executor.give_back(std::move(workspace));
  } else {
    // Every thread takes its own images through the whole program: nothing to wait for.
    const int64_t chunk = std::min(e.chunk, (batch + threads - 1) / threads);
    parallel_for((batch + chunk - 1) / chunk, threads, [&](int64_t task, int) {
      const int64_t first = task * chunk;
      auto workspace = e.executor.borrow();
      e.executor.bind(workspace->frame, inputs, outputs, first, std::min(chunk, batch - first));
      e.executor.run_alone(*workspace);
      e.executor.give_back(std::move(workspace));
    });
  }
  // Outputs that are inputs, or other outputs too.
  for (size_t k = 0; k < e.program.outputs.size(); ++k) {
    const int32_t v = e.program.outputs[k];
    const Value& value = e.program.values[v];
    const auto bytes = static_cast<size_t>(batch * port_bytes(value));
    if (!e.is_output[v])
      std::memcpy(outputs[k], inputs[e.port[v]].data, bytes);
    else if (e.port[v] != static_cast<int>(k))
      std::memcpy(outputs[k], outputs[e.port[v]], bytes);
  }
}

void Engine::run_reference(std::span<const InputTensor> inputs, int64_t batch,
                           std::span<float* const> outputs) const {
  const auto results = interpret(impl_->program, inputs, batch);
  if (outputs.size() != results.size())
    fail<InvalidArgument>("expected ", results.size(), " outputs, got ", outputs.size());
  for (size_t k = 0; k < results.size(); ++k)
    std::copy(results[k].begin(), results[k].end(), outputs[k]);
}

std::vector<NodeProfile> Engine::profile(int64_t batch, int threads, int rounds) const {
  const Impl& e = *impl_;
  if (threads <= 0) threads = default_threads();
  std::vector<NodeProfile> profiles;
  for (size_t k = 0; k < e.program.nodes.size(); ++k) {
    NodeProfile p;
    p.name = e.program.nodes[k].name;
    p.op = e.program.nodes[k].op;
    p.kernel = e.kernels == nullptr ? "scalar" : e.kernels->name;
    if (e.kernels != nullptr && e.steps[k].conv) {
      const ConvStep& conv = *e.steps[k].conv;
      p.kernel = conv.kernel();
      p.why = conv.why();
      p.bits = conv.bits();
      p.macs = conv.macs();
      p.packed_bytes = static_cast<int64_t>(conv.packed_bytes());
      p.derived_bytes = static_cast<int64_t>(conv.derived_bytes());
    }
    if (p.op == OpKind::Recurrence) {
      const Constant& weights = weights_of(e.program, e.program.nodes[k]);
      const RecurrenceSpec spec = recurrence_spec(e.program, e.program.nodes[k]);
      p.kernel += " recurrence";
      p.bits = weight_bits(weights);
      p.macs = spec.outputs() * spec.hidden * spec.steps;
      p.packed_bytes = static_cast<int64_t>(weights.bytes.size());
      if (e.kernels != nullptr) p.derived_bytes = static_cast<int64_t>(e.steps[k].derived_bytes());
    }
    if (p.op == OpKind::Linear) {
      const Constant& weights = weights_of(e.program, e.program.nodes[k]);
      const LinearSpec spec = linear_spec(e.program, e.program.nodes[k]);
      const Value& out = e.program.values[e.program.nodes[k].output];
      p.kernel += " linear, groups of " + std::to_string(spec.group);
      p.bits = weight_bits(weights);
      p.macs = spec.outputs * spec.inputs * out.h * out.w;
      p.packed_bytes = static_cast<int64_t>(weights.bytes.size());
      if (e.kernels != nullptr) p.derived_bytes = static_cast<int64_t>(e.steps[k].derived_bytes());
    }
    if (p.op == OpKind::FloatConv) {
      const Constant& weights = weights_of(e.program, e.program.nodes[k]);
      p.kernel += " floats";
      p.bits = 32;
      p.macs = conv_shape(e.program, e.program.nodes[k]).macs();
      p.packed_bytes = static_cast<int64_t>(weights.bytes.size());
      if (e.kernels != nullptr) p.derived_bytes = static_cast<int64_t>(e.steps[k].derived_bytes());
    }
    profiles.push_back(std::move(p));
  }
  if (e.kernels == nullptr || batch < 1 || rounds < 1) return profiles;

  batch = std::min(batch, threads == 1 ? e.chunk : 1);
  const Noise noise(e.program, batch);
  auto workspace = e.executor.borrow();
  e.executor.bind(workspace->frame, noise.inputs, noise.outputs, 0, batch);
  std::vector<std::vector<double>> samples(e.steps.size());
  std::vector<double> seconds(e.steps.size());
  for (int round = 0; round < rounds + 2; ++round) {
    std::fill(seconds.begin(), seconds.end(), 0.0);
    e.executor.run_together(*workspace, threads, &seconds);
    for (size_t k = 0; round >= 2 && k < samples.size(); ++k)
      samples[k].push_back(seconds[k]);
  }
  e.executor.give_back(std::move(workspace));
  for (size_t k = 0; k < samples.size(); ++k) {
    std::nth_element(samples[k].begin(), samples[k].begin() + rounds / 2, samples[k].end());
    profiles[k].microseconds = 1e6 * samples[k][rounds / 2];
  }
  return profiles;
}

std::vector<std::pair<std::string, uint64_t>> Engine::forms() const {
  std::vector<std::pair<std::string, uint64_t>> forms;
  for (const Step& step : impl_->steps)
    if (step.conv) forms.emplace_back(step.node->name, step.conv->forms_key());
  return forms;
}

const std::string& Engine::plan() const { return impl_->plan; }

size_t Engine::weight_bytes() const {
  size_t bytes = 0;
  for (const Step& step : impl_->steps)
    bytes += step.derived_bytes();
  return bytes;
}

size_t Engine::own_bytes() const {
  const Impl& e = *impl_;
  size_t bytes = sizeof e + e.own + e.layouts.size() * sizeof(ValueLayout) +
                 e.program.values.size() * (sizeof(Value) + 32) +
                 e.program.nodes.size() * (sizeof(Node) + sizeof(Step) + 256);
  for (const Step& step : e.steps)
    if (step.conv) bytes += step.conv->table_bytes();
  return bytes;
}

size_t Engine::workspace_bytes() const { return static_cast<size_t>(impl_->arena.bytes); }

}  // namespace adalayer::engine

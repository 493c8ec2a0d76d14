#include "engine/engine.hpp"

#include <algorithm>
#include <chrono>

#include "core/status.hpp"
#include "engine/interpret.hpp"

namespace adalayer::engine {

struct Engine::Impl {
  Program program;
};

Engine::Engine(Program program, const EngineOptions&)
    : impl_(std::make_unique<Impl>(Impl{std::move(program)})) {
  validate(impl_->program);
}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

const Program& Engine::program() const { return impl_->program; }

void Engine::run(std::span<const InputTensor> inputs, int64_t batch,
                 std::span<float* const> outputs, int) const {
  run_reference(inputs, batch, outputs);
}

void Engine::run_reference(std::span<const InputTensor> inputs, int64_t batch,
                           std::span<float* const> outputs) const {
  const auto results = interpret(impl_->program, inputs, batch);
  if (outputs.size() != results.size())
    fail<InvalidArgument>("expected ", results.size(), " outputs, got ", outputs.size());
  for (size_t k = 0; k < results.size(); ++k)
    std::copy(results[k].begin(), results[k].end(), outputs[k]);
}

std::vector<NodeProfile> Engine::profile(int64_t, int, int) const {
  std::vector<NodeProfile> out;
  for (const Node& n : impl_->program.nodes) {
    NodeProfile p;
    p.name = n.name;
    p.op = n.op;
    p.kernel = "reference";
    out.push_back(p);
  }
  return out;
}

size_t Engine::weight_bytes() const { return 0; }
size_t Engine::workspace_bytes() const { return 0; }

}  // namespace adalayer::engine

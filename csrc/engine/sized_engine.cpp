#include "engine/sized_engine.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/status.hpp"
#include "engine/at_size.hpp"

namespace adalayer::engine {
namespace {

bool same_values(const Program& a, const Program& b) {
  return std::equal(
      a.values.begin(), a.values.end(), b.values.begin(), b.values.end(),
      [](const Value& x, const Value& y) { return x.c == y.c && x.h == y.h && x.w == y.w; });
}

/// Parameters, and what constants hold.
bool same_nodes(const Program& a, const Program& b) {
  const auto constant = [](const Program& p, int32_t number) -> const SharedBytes* {
    return number < 0 ? nullptr : &p.constants[number].bytes;
  };
  for (size_t k = 0; k < a.nodes.size(); ++k) {
    const Node &x = a.nodes[k], &y = b.nodes[k];
    if (x.ints != y.ints) return false;
    for (size_t c = 0; c < x.constants.size(); ++c) {
      const SharedBytes *p = constant(a, x.constants[c]), *q = constant(b, y.constants[c]);
      if ((p == nullptr) != (q == nullptr) || (p != nullptr && !(*p == *q))) return false;
    }
  }
  return true;
}

}  // namespace

CacheLimits limits_within(CacheLimits limits, const EngineOptions& options) {
  if (options.memory_bytes > 0)
    limits.bytes = std::min(limits.bytes, static_cast<size_t>(options.memory_bytes) / 8);
  return limits;
}

SizedEngine::SizedEngine(Program program, const EngineOptions& options, CacheLimits limits,
                         const Engine* memory)
    : options_(options), kept_(limits_within(limits, options)) {
  compiled_ = std::make_shared<const Engine>(std::move(program), options, memory);
  const Program& p = compiled_->program();
  rules_ = read_sizes(p);
  if (!rules_.any()) return;
  compiled_sizes_ = rules_.compiled(p);
  Program again;
  try {
    again = at_size(p, rules_, compiled_sizes_, options.memory_bytes);
  } catch (const InvalidArgument& e) {
    fail<CorruptData>("adalayer.sizes: at the program's own size: ", e.what());
  }
  // Rules that give something else here would give something else everywhere.
  if (!same_values(p, again) || !same_nodes(p, again))
    fail<CorruptData>("adalayer.sizes: the rules give another program than this one at its size");
}

std::shared_ptr<const Engine> SizedEngine::at(std::span<const int64_t> sizes) const {
  if (std::equal(sizes.begin(), sizes.end(), compiled_sizes_.begin(), compiled_sizes_.end()))
    return compiled_;
  return found(sizes, false);
}

std::shared_ptr<const Engine> SizedEngine::warm_up(std::span<const int64_t> sizes) const {
  if (std::equal(sizes.begin(), sizes.end(), compiled_sizes_.begin(), compiled_sizes_.end()))
    return compiled_;
  return found(sizes, options_.weights == WeightForm::Measured);
}

std::shared_ptr<const Engine> SizedEngine::found(std::span<const int64_t> sizes,
                                                 bool measured) const {
  rules_.check(sizes);
  const Sizes key(sizes.begin(), sizes.end());
  return kept_.at(key, measured, [&] { return make(key, measured); });
}

SizedEngine::Cache::Made SizedEngine::make(const Sizes& sizes, bool measured) const {
  const auto made = [&](std::shared_ptr<const Engine> engine) {
    const size_t bytes = engine->own_bytes();
    return Cache::Made{std::move(engine), bytes, measured};
  };
  Program program = at_size(compiled_->program(), rules_, sizes, options_.memory_bytes);
  if (!measured) return made(std::make_shared<const Engine>(std::move(program), *nearest(sizes)));
  EngineOptions options = options_;
  options.plan.clear();
  const Engine alone(std::move(program), options);
  // Weights in the forms that this size runs best with: of the compiled size where it is the same
  // form, or of another size that has it.
  std::vector<std::shared_ptr<const Engine>> alive = {compiled_};
  kept_.each([&](const Sizes&, const Cache::Made& other) {
    if (other.measured) alive.push_back(other.engine);
  });
  std::vector<const Engine*> holders;
  for (const auto& engine : alive)
    holders.push_back(engine.get());
  return made(std::make_shared<const Engine>(alone, *compiled_, holders));
}

/// The engine of the size whose area is the most alike, of those that were timed.
std::shared_ptr<const Engine> SizedEngine::nearest(const Sizes& sizes) const {
  const auto area = [](const Sizes& axes) {
    double product = 1.0;
    for (const int64_t n : axes)
      product *= static_cast<double>(n);
    return std::log(product);
  };
  const double wanted = area(sizes);
  std::shared_ptr<const Engine> found = compiled_;
  double least = std::abs(area(compiled_sizes_) - wanted);
  kept_.each([&](const Sizes& other, const Cache::Made& made) {
    const double distance = std::abs(area(other) - wanted);
    if (!made.measured || distance >= least) return;
    least = distance;
    found = made.engine;
  });
  return found;
}

}  // namespace adalayer::engine

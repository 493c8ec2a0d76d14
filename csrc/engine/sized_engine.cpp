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

SizedEngine::SizedEngine(Program program, const EngineOptions& options, SizeLimits limits,
                         const Engine* memory)
    : options_(options), limits_(limits) {
  // What the host has given room for is for weights and tensors first.
  if (options.memory_bytes > 0)
    limits_.bytes = std::min(limits_.bytes, static_cast<size_t>(options.memory_bytes) / 8);
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
  const std::shared_ptr<Entry> e = entry(sizes);
  const auto done = [&] {
    const std::lock_guard lock(mutex_);
    return e->engine != nullptr && (e->measured || !measured) ? e->engine : nullptr;
  };
  if (auto engine = done()) return engine;
  const std::lock_guard making(e->making);
  if (auto engine = done()) return engine;  // another thread was quicker
  try {
    std::shared_ptr<const Engine> engine = make(sizes, measured);
    const size_t bytes = engine->own_bytes();
    const std::lock_guard lock(mutex_);
    e->engine = engine;
    e->measured = measured;
    ++made_;
    const auto place = index_.find(e->sizes);
    if (place != index_.end() && *place->second == e) {  // it has not left meanwhile
      bytes_ += bytes - e->bytes;
      e->bytes = bytes;
      shrink();
    }
    return engine;
  } catch (...) {
    const std::lock_guard lock(mutex_);
    const auto place = index_.find(e->sizes);
    if (e->engine == nullptr && place != index_.end() && *place->second == e) {
      entries_.erase(place->second);
      index_.erase(place);
    }
    throw;
  }
}

std::shared_ptr<SizedEngine::Entry> SizedEngine::entry(std::span<const int64_t> sizes) const {
  rules_.check(sizes);
  std::vector<int64_t> key(sizes.begin(), sizes.end());
  const std::lock_guard lock(mutex_);
  const auto found = index_.find(key);
  if (found != index_.end()) {
    entries_.splice(entries_.begin(), entries_, found->second);
    return *found->second;
  }
  auto made = std::make_shared<Entry>();
  made->sizes = key;
  entries_.push_front(made);
  index_.emplace(std::move(key), entries_.begin());
  return made;
}

std::shared_ptr<const Engine> SizedEngine::make(std::span<const int64_t> sizes,
                                                bool measured) const {
  Program program = at_size(compiled_->program(), rules_, sizes, options_.memory_bytes);
  if (!measured) return std::make_shared<const Engine>(std::move(program), *nearest(sizes));
  EngineOptions options = options_;
  options.plan.clear();
  const Engine alone(std::move(program), options);
  // Weights in the forms that this size runs best with: of the compiled size where it is the same
  // form, or of another size that has it.
  std::vector<std::shared_ptr<const Engine>> alive = {compiled_};
  {
    const std::lock_guard lock(mutex_);
    for (const auto& e : entries_)
      if (e->engine != nullptr && e->measured) alive.push_back(e->engine);
  }
  std::vector<const Engine*> holders;
  for (const auto& engine : alive)
    holders.push_back(engine.get());
  return std::make_shared<const Engine>(alone, *compiled_, holders);
}

/// The engine of the size whose area is the most alike, of those that were timed.
std::shared_ptr<const Engine> SizedEngine::nearest(std::span<const int64_t> sizes) const {
  const auto area = [](std::span<const int64_t> axes) {
    double product = 1.0;
    for (const int64_t n : axes)
      product *= static_cast<double>(n);
    return std::log(product);
  };
  const double wanted = area(sizes);
  std::shared_ptr<const Engine> found = compiled_;
  double least = std::abs(area(compiled_sizes_) - wanted);
  const std::lock_guard lock(mutex_);
  for (const auto& e : entries_) {
    if (e->engine == nullptr || !e->measured) continue;
    const double distance = std::abs(area(e->sizes) - wanted);
    if (distance >= least) continue;
    least = distance;
    found = e->engine;
  }
  return found;
}

void SizedEngine::shrink() const {
  size_t made = 0;
  for (const auto& e : entries_)
    made += e->engine != nullptr;
  // From the one used longest ago on; the newest one, and those that are being made, stay.
  for (auto at = entries_.end(); at != entries_.begin();) {
    --at;
    if (at == entries_.begin() || (made <= limits_.entries && bytes_ <= limits_.bytes)) return;
    if ((*at)->engine == nullptr) continue;
    bytes_ -= (*at)->bytes;
    --made;
    index_.erase((*at)->sizes);
    at = entries_.erase(at);
  }
}

SizedEngine::Info SizedEngine::info() const {
  const std::lock_guard lock(mutex_);
  Info info{0, bytes_, made_, limits_};
  for (const auto& e : entries_)
    info.entries += e->engine != nullptr;
  return info;
}

void SizedEngine::set_limits(SizeLimits limits) {
  const std::lock_guard lock(mutex_);
  limits_ = limits;
  shrink();
}

}  // namespace adalayer::engine

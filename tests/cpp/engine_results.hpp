// What an engine, or the interpreter, makes of a program's inputs when they are noise.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "engine/engine.hpp"
#include "engine_programs.hpp"

namespace programs {

using Results = std::vector<std::vector<float>>;  // by output

/// Of run(inputs, targets); the inputs are the same for every program of these sizes.
template <class Run>
Results results_of(const Program& p, int64_t batch, float deviation, const Run& run) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, deviation);
  const auto data = input_noise(p, batch, [&] { return normal(random); });
  std::vector<InputTensor> inputs;
  for (const auto& x : data)
    inputs.push_back({x.data(), Layout::NCHW});
  Results results;
  std::vector<float*> targets;
  for (const int32_t v : p.outputs) {
    const Value& value = p.values[static_cast<size_t>(v)];
    results.emplace_back(static_cast<size_t>(batch * value.c * value.h * value.w));
    targets.push_back(results.back().data());
  }
  run(inputs, targets);
  return results;
}

inline Results computed(const Engine& e, int64_t batch, float deviation, int threads) {
  return results_of(e.program(), batch, deviation,
                    [&](auto& in, auto& out) { e.run(in, batch, out, threads); });
}

inline Results interpreted(const Program& p, int64_t batch, float deviation) {
  const Engine e(p, {.weights = WeightForm::Streamed});
  return results_of(p, batch, deviation,
                    [&](auto& in, auto& out) { e.run_reference(in, batch, out); });
}

}  // namespace programs

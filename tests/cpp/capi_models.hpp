// Models behind the C interface, and what the engine makes of them.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "adalayer/adalayer.h"
#include "adalayer/adalayer.hpp"
#include "check.hpp"
#include "engine/engine.hpp"
#include "engine_programs.hpp"

namespace programs {

using Floats = std::vector<float>;

/// 3 x 5 x 4 pixels to four numbers: a convolution of the whole image.
inline Program classifier() {
  Builder b;
  const auto x = b.value("pixels", 3, 5, 4, ValueKind::F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", 3, 5, 4));
  b.p.values[static_cast<size_t>(q)].scale = 0.02f;
  b.p.values[static_cast<size_t>(q)].zero_point = 128;
  const auto y = b.node(
      OpKind::Conv, {q}, b.value("scores", 4, 1, 1, ValueKind::F32),
      {5, 4, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, {1, -1e9f, 1e9f},
      {b.weights(4, 3, 5, 4, 4), b.floats({0.1f, 0.2f, 0.3f, 0.4f}), b.floats({0, 1, 2, 3}), -1});
  b.p.inputs = {x};
  b.p.outputs = {y};
  b.p.metadata = {{"classes", R"(["cat", "caf\u00e9", "c", "d"])"},
                  {"preprocessing", R"({"mean": [0.5, 0.25, 0.125], "std": [0.2, 0.3, 0.4]})"}};
  return b.p;
}

inline adalayer_model* loaded(const Program& program) {
  const std::vector<uint8_t> file = write_program(program);
  adalayer_model* model = nullptr;
  CHECK_EQ(adalayer_model_load_memory(file.data(), file.size(), nullptr, &model), ADALAYER_OK);
  return model;
}

inline adalayer::Model shared(const Program& program) {
  const std::vector<uint8_t> file = write_program(program);
  return {file.data(), file.size()};
}

inline Floats ramp(size_t n) {
  Floats x(n);
  for (size_t i = 0; i < n; ++i)
    x[i] = static_cast<float>(i * 37 % 101) / 25.0f - 2.0f;
  return x;
}

/// Room for what a call gives, each as large as another's.
struct Outputs {
  std::vector<Floats> got;
  std::vector<adalayer_output> places;

  explicit Outputs(const std::vector<Floats>& like) {
    for (const Floats& y : like)
      got.emplace_back(y.size());
    for (Floats& y : got)
      places.push_back({y.data(), y.size() * 4});
  }
};

inline std::vector<Floats> engine_run(const Program& p, int64_t batch,
                                      const std::vector<Floats>& in) {
  const Engine engine{Program(p)};
  std::vector<InputTensor> inputs;
  for (const Floats& x : in)
    inputs.push_back({x.data(), Layout::NCHW});
  std::vector<Floats> out;
  std::vector<float*> outputs;
  for (const int32_t v : p.outputs) {
    const Value& value = p.values[static_cast<size_t>(v)];
    out.emplace_back(static_cast<size_t>(batch * value.c * value.h * value.w));
  }
  for (Floats& y : out)
    outputs.push_back(y.data());
  engine.run(inputs, batch, outputs, 1);
  return out;
}

inline bool same(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

inline bool says(const char* part) { return std::strstr(adalayer_last_error(), part) != nullptr; }

}  // namespace programs

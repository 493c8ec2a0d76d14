// What tests of programs and of their files share: what becomes of a damaged one.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "check.hpp"
#include "engine/container.hpp"
#include "engine/engine.hpp"
#include "engine/interpret.hpp"
#include "engine_programs.hpp"

namespace programs {

/// What became of a program or file: refused with one of our errors, or accepted.
enum class Outcome { Refused, Accepted };

inline Outcome outcome(const std::function<void()>& f) {
  try {
    f();
  } catch (const InvalidArgument&) {
    return Outcome::Refused;
  } catch (const CorruptData&) {
    return Outcome::Refused;
  }
  return Outcome::Accepted;
}

inline bool refused(const Program& p) {
  return outcome([&] { validate(p); }) == Outcome::Refused;
}
inline bool refused(const std::vector<uint8_t>& file) {
  return outcome([&] { read_program(file); }) == Outcome::Refused;
}

/// Runs a valid program on noise if it is small enough for a test.
inline std::vector<std::vector<float>> run(const Program& p, int64_t batch) {
  int64_t i = 0;
  const auto data =
      input_noise(p, batch, [&] { return static_cast<float>(i++ * 37 % 101) - 50.0f; });
  std::vector<InputTensor> inputs;
  for (const auto& x : data)
    inputs.push_back({x.data(), Layout::NCHW});
  return interpret(p, inputs, batch);
}

inline bool is_small(const Program& p) {
  int64_t elements = 0;
  for (const Value& v : p.values)
    elements += v.c * v.h * v.w;
  int64_t taps = 1;
  for (const Node& n : p.nodes)
    if (n.op == OpKind::MaxPool || n.op == OpKind::AvgPool)
      taps = std::max(taps, n.ints[0] * n.ints[1]);
  return elements < 100000 && taps < 1000;
}

/// The program with one change, and the message that it must give.
inline void check_refused(const char* text, const std::function<void(Program&)>& change) {
  Program p = every_operation();
  change(p);
  CHECK_THROWS(validate(p), InvalidArgument, text);
}

inline Node& find(Program& p, OpKind op) {
  return *std::find_if(p.nodes.begin(), p.nodes.end(), [&](const Node& n) { return n.op == op; });
}
inline Value& output_of(Program& p, OpKind op) { return p.values[find(p, op).output]; }

template <typename T>
void poke(std::vector<uint8_t>& file, uint64_t at, T value) {
  std::memcpy(file.data() + at, &value, sizeof value);
}

}  // namespace programs

// The program as a specification: every operation written out over plain vectors with the formulas
// of reference/spec.hpp and reference/image_spec.hpp. Slow on purpose; the executor must give the
// same bits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/engine.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

/// One value of a run, [batch][c][h][w]; levels for U8 values, numbers for F32 values, ids for I32.
struct Tensor {
  std::vector<uint8_t> levels;
  std::vector<float> numbers;
  std::vector<int32_t> ids;
};

/// Every value of the program. Validates it first; memory for all of them at once.
std::vector<Tensor> interpret_values(const Program& program, std::span<const InputTensor> inputs,
                                     int64_t batch);

/// The program's outputs, each [batch][c][h][w].
std::vector<std::vector<float>> interpret(const Program& program,
                                          std::span<const InputTensor> inputs, int64_t batch);

}  // namespace adalayer::engine

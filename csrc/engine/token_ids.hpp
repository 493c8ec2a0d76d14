// Token ids of a call: no table is read outside.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/engine.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

/// Per program input the rows of the smallest table that it is an index of, 2 for a mask of zeros
/// and ones; -1 where any number is allowed.
std::vector<int64_t> table_rows(const Program& program);

/// Throws InvalidArgument that names the input, the sample, the position and the ids that there
/// are. `rows`: table_rows() of the program.
void check_ids(const Program& program, std::span<const int64_t> rows,
               std::span<const InputTensor> inputs, int64_t batch);

}  // namespace adalayer::engine

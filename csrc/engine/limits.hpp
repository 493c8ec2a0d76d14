// How much memory a program will take, known before it is taken: a file of a few hundred bytes may
// describe tensors and kernels of many gigabytes.
//
// Numbers are doubles, because sums and products of hostile sizes must not wrap round. They are
// upper bounds of what is allocated, up to small fixed amounts per node.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/layouts.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

/// Bytes of the program itself, and of the weights and tables that are derived from it for the
/// kernels in use. The program has been validated. `room`: ConvTask.
double planned_memory(const Program& program, const std::vector<ValueLayout>& layouts,
                      cpu::Room room);

/// Bytes of the program and of a run by the scalar interpreter, one image at a time.
double interpreter_memory(const Program& program);

/// Throws LimitExceeded if `bytes` is more than `limit`; 0 is no limit.
void check_memory(double bytes, int64_t limit);

}  // namespace adalayer::engine

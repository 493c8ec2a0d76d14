// Programs of one network at several qualities, whose weights are stored once.
#pragma once

#include <cstddef>

#include "engine/program.hpp"

namespace adalayer::engine {

/// The program at a level, without levels of its own: 0 is the program itself. Weights are views of
/// the program's, which share their bytes. Throws InvalidArgument for a level that does not exist.
Program at_level(const Program& program, size_t level);

/// The same with weights of its own, so that it can be saved.
Program own_weights(Program program);

/// Appends a level. `lower` is the same network with other numbers: operations, their order and
/// their sizes are those of `program`, and of every node that has weights these are planes of the
/// program's. Throws InvalidArgument naming the node or value that differs.
void add_level(Program& program, const Program& lower);

/// Throws InvalidArgument unless the levels of a program that is valid itself are valid, too: part
/// of validate().
void check_levels(const Program& program);

}  // namespace adalayer::engine

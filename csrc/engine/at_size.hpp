// A program of one image size made for another.
#pragma once

#include <cstdint>
#include <span>

#include "engine/program.hpp"
#include "engine/size_rules.hpp"

namespace adalayer::engine {

/// The program that the same network is at these sizes of the axes: sizes of values are found node
/// after node, tables of positions are made anew, and constants are shared with `program`, which is
/// valid. What came out is validated.
///
/// Throws InvalidArgument for a size that the rules do not allow, and where a node cannot be made
/// for it, which it names; LimitExceeded where tables alone would take more than `memory_bytes` (0:
/// no limit).
Program at_size(const Program& program, const SizeRules& rules, std::span<const int64_t> sizes,
                int64_t memory_bytes = 0);

}  // namespace adalayer::engine

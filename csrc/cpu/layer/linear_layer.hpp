// A linear layer with weight groups on the active instruction set: tensors in, tensors out.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/conv/linear.hpp"

namespace adalayer::cpu {

/// Runs one layer over rows of floats. Weights derived from the canonical bytes are kept in a
/// process-wide cache, like those of convolutions. Throws CorruptData for damaged bytes,
/// InvalidArgument where they are of another shape.
void linear_layer(const LinearSpec& spec, std::span<const uint8_t> canonical, const LinearJob& job,
                  int threads);

/// Drops what the cache holds.
void clear_linear_cache();

}  // namespace adalayer::cpu

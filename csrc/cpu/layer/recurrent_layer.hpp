// A recurrent layer of its own on the active instruction set: tensors in, tensors out.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/conv/recurrence.hpp"

namespace adalayer::cpu {

/// Runs one layer in one direction over images of [steps][...] floats. Weights derived from the
/// canonical bytes are kept in a process-wide cache, like those of convolutions. Throws CorruptData
/// for damaged bytes, InvalidArgument where they are of another shape. `job.levels` is not used.
void recurrent_layer(const RecurrenceSpec& spec, std::span<const uint8_t> canonical,
                     const RecurrenceJob& job, int threads);

/// Drops what the cache holds.
void clear_recurrent_cache();

}  // namespace adalayer::cpu

// Trial runs of a single layer: which form of its weights is the fastest.
#pragma once

#include <span>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/conv/algorithm.hpp"

namespace adalayer::cpu {

struct PackedForm {
  ConvForm form;
  AlignedBuffer packed;
  double time = 1.0;  // of its trials, beside those of the first form
};

/// Whether the forms are timed once more after so many turns, which took so many seconds: a layer
/// of microseconds several times, one that takes long (a large one on a small processor, or any on
/// an emulated one) as often as there is time for, so that deriving weights never takes minutes.
bool another_turn(int turns, double seconds);

/// The form that is clearly the fastest on an image (and, where it is made for few positions, no
/// slower with a larger batch), or that is forced, with its packed weights. The first one wins
/// ties.
PackedForm fastest_form(const ConvTask& task, std::vector<ConvForm> forms,
                        std::span<const int8_t> values);

}  // namespace adalayer::cpu

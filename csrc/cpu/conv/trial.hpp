// Trial runs of a single layer: which form of its weights is the fastest.
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/conv/algorithm.hpp"

namespace adalayer::cpu {

struct PackedForm {
  ConvForm form;
  AlignedBuffer packed;
  double seconds = INFINITY;
};

/// The form that is clearly the fastest on an image (and, where it is made for few positions, no
/// slower with a larger batch), or that is forced, with its packed weights. The first one wins
/// ties.
PackedForm fastest_form(const ConvTask& task, std::vector<ConvForm> forms,
                        std::span<const int8_t> values);

}  // namespace adalayer::cpu

// What the process says about all layers at once: whether zeros may be left out of panels, and
// whether convolutions may be Winograd ones. For tests and measurements.
//
// A setting is what its set_...() said last, else its environment variable (read at the first use),
// else "auto": the faster form. Results have the same bits under each. Throws InvalidArgument for
// an unknown name. Weights that are derived already stay as they are.
#pragma once

#include <string_view>

namespace adalayer::cpu {

enum class SparsePolicy {
  Auto,     // dense wins ties
  Dense,    // zeros are multiplied
  Blocks,   // blocks wherever a layer has panels
  Bitmask,  // bitmasks likewise, where the machine has the instructions
};

/// ADALAYER_SPARSE: auto, dense, blocks, bitmask.
SparsePolicy sparse_policy();
void set_sparse_policy(std::string_view name);

inline bool sparse_is_forced() {
  return sparse_policy() == SparsePolicy::Blocks || sparse_policy() == SparsePolicy::Bitmask;
}

enum class WinogradPolicy {
  Auto,  // the direct product wins ties
  Off,
  F4x4,  // F(4x4, 3x3) wherever a layer suits and sums are exact, before any sparse form
  F2x2,
};

/// ADALAYER_WINOGRAD: auto, off, 4x4, 2x2.
WinogradPolicy winograd_policy();
void set_winograd_policy(std::string_view name);

}  // namespace adalayer::cpu

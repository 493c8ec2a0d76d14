// Which layout each u8 value gets: what its readers need around it decides. A value that is but a
// piece of a concatenation lies in it.
#pragma once

#include <memory>
#include <vector>

#include "cpu/conv/algorithm.hpp"
#include "cpu/image/layout.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

struct ValueLayout {
  cpu::ImageLayout layout;  // u8 values only
  /// Not null where the only reader has a form of its own for it (layout is that one's).
  std::shared_ptr<const cpu::OwnInput> own_input;
  /// Not negative where the only reader is a concatenation that moves the levels as they are: the
  /// value whose channels from `channel` on are this one. It is written there, and has no memory
  /// and no padding of its own (layout is that of the holder).
  int32_t holder = -1;
  int64_t channel = 0;

  bool in_place() const { return holder >= 0; }
};

/// One entry per value of the program.
std::vector<ValueLayout> plan_layouts(const Program& program);

}  // namespace adalayer::engine

// Which layout each u8 value gets: what its readers need around it decides.
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
};

/// One entry per value of the program.
std::vector<ValueLayout> plan_layouts(const Program& program);

}  // namespace adalayer::engine

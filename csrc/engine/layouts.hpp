// Which layout each u8 value gets: what its readers need around it decides.
#pragma once

#include <optional>
#include <vector>

#include "cpu/conv/stem.hpp"
#include "cpu/image/layout.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

struct ValueLayout {
  cpu::ImageLayout layout;        // u8 values only
  std::optional<cpu::Stem> stem;  // the value is kept in row groups (layout is theirs)
};

/// One entry per value of the program.
std::vector<ValueLayout> plan_layouts(const Program& program);

}  // namespace adalayer::engine

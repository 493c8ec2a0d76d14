// What random tests draw: the same in every run, and something else with ADALAYER_TEST_SEED=7, say.
#pragma once

#include <cstdlib>

namespace check {

inline unsigned seed(unsigned usual) {
  const char* other = std::getenv("ADALAYER_TEST_SEED");
  return other == nullptr ? usual : usual + static_cast<unsigned>(std::atoi(other));
}

}  // namespace check

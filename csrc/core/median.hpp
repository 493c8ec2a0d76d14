// What counts of times that scatter.
#pragma once

#include <algorithm>
#include <vector>

namespace adalayer {

/// The lower one of two in the middle; there is a value at least. Reorders.
inline double median(std::vector<double>& values) {
  const auto middle = values.begin() + (std::ssize(values) - 1) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace adalayer

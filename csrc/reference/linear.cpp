#include "reference/linear.hpp"

#include <algorithm>

namespace adalayer::reference {

void linear(const LinearSpec& s, const int8_t* weights, const uint8_t* levels, float* out) {
  const int64_t groups = s.groups();
  for (int64_t o = 0; o < s.outputs; ++o) {
    float y = s.bias[o];
    for (int64_t g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int64_t i = g * s.group; i < std::min(s.inputs, (g + 1) * s.group); ++i)
        sum += weights[o * s.inputs + i] * (levels[i] - s.zero_point);
      y = add_part(sum, s.scale[o * groups + g], s.step, y);
    }
    out[o] = y;
  }
}

}  // namespace adalayer::reference

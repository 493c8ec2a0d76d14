#include "reference/recurrence.hpp"

#include <vector>

namespace adalayer::reference {

void recurrence(const RecurrenceSpec& s, const int8_t* weights, const float* products,
                const float* state, const float* cell, float* out) {
  const int64_t gates = recurrent_gates(s.kind), hidden = s.hidden;
  const U8Finish grid = s.fed_back();
  std::vector<float> states(static_cast<size_t>(hidden), 0.0f), cells = states;
  if (state != nullptr) states.assign(state, state + hidden);
  if (cell != nullptr) cells.assign(cell, cell + hidden);
  std::vector<int32_t> levels(static_cast<size_t>(hidden));
  for (int64_t k = 0; k < s.steps; ++k) {
    const int64_t t = s.step(k);
    for (int64_t j = 0; j < hidden; ++j)
      levels[j] = finish_u8(states[j], grid) - grid.zero_point;
    for (int64_t j = 0; j < hidden; ++j) {
      float x[4], y[4];
      for (int64_t g = 0; g < gates; ++g) {
        const int64_t o = g * hidden + j;
        int32_t sum = 0;
        for (int64_t i = 0; i < hidden; ++i)
          sum += weights[o * hidden + i] * levels[i];
        x[g] = products[o * s.steps + t];
        y[g] = conv_value(sum, s.scale[o], s.bias[o]);
      }
      if (s.kind == RecurrentKind::Lstm)
        states[j] = lstm_unit(x, y, cells[j]);
      else if (s.kind == RecurrentKind::Gru)
        states[j] = gru_unit(x, y, states[j]);
      else
        states[j] = plain_unit(s.kind, x[0], y[0]);
      out[j * s.steps + t] = states[j];
      if (s.cells) out[(hidden + j) * s.steps + t] = cells[j];
    }
  }
}

}  // namespace adalayer::reference

// Recurrent layers in scalar form: whole numbers in the products, floats in the cells.
//
// What a layer's inputs contribute is computed for all steps before (an ordinary linear layer,
// its bias included); a step adds what the hidden state contributes, whose levels meet the packed
// weights. Only the product reads levels: the state itself goes from step to step in float.
#pragma once

#include "reference/image_spec.hpp"

namespace adalayer {

/// Values per unit of the hidden state that come out of a product: of an LSTM input gate, forget
/// gate, candidate and output gate, of a GRU reset gate, update gate and candidate, one after the
/// other, as torch has them.
constexpr int64_t recurrent_gates(RecurrentKind kind) {
  return kind == RecurrentKind::Lstm ? 4 : kind == RecurrentKind::Gru ? 3 : 1;
}

/// One layer in one direction.
struct RecurrenceSpec {
  RecurrentKind kind = RecurrentKind::Lstm;
  bool reverse = false;  // from the last step to the first
  bool cells = false;    // the result is the hidden state, and then the cell's: of an LSTM
  int64_t hidden = 1, steps = 1;
  const float* scale = nullptr;  // [gates * hidden]: of the state's grid and of the weights
  const float* bias = nullptr;   // [gates * hidden]
  // The grid of the state in front of a product. Its table is one of the result alone.
  U8Finish state;

  int64_t outputs() const { return recurrent_gates(kind) * hidden; }
  int64_t channels() const { return cells ? 2 * hidden : hidden; }
  /// The step that comes k-th.
  int64_t step(int64_t k) const { return reverse ? steps - 1 - k : k; }
  U8Finish fed_back() const {
    U8Finish grid = state;
    grid.table = nullptr;
    return grid;
  }
};

inline float tanh_value(float x) { return std::fmaf(2.0f, sigmoid_value(2.0f * x), -1.0f); }

// One unit. `x` is what the inputs contribute to a gate, `y` what the hidden state does
// (conv_value() of the sum). Products and sums are rounded one by one unless fmaf joins them.

/// Changes the cell; returns the hidden state.
inline float lstm_unit(const float x[4], const float y[4], float& cell) {
  const float input = sigmoid_value(x[0] + y[0]);
  const float forget = sigmoid_value(x[1] + y[1]);
  const float candidate = tanh_value(x[2] + y[2]);
  const float output = sigmoid_value(x[3] + y[3]);
  cell = std::fmaf(forget, cell, input * candidate);
  return output * tanh_value(cell);
}

inline float gru_unit(const float x[3], const float y[3], float state) {
  const float reset = sigmoid_value(x[0] + y[0]);
  const float update = sigmoid_value(x[1] + y[1]);
  const float candidate = tanh_value(std::fmaf(reset, y[2], x[2]));
  return std::fmaf(update, state - candidate, candidate);
}

/// Tanh and Relu.
inline float plain_unit(RecurrentKind kind, float x, float y) {
  return kind == RecurrentKind::Tanh ? tanh_value(x + y) : max_x86(x + y, 0.0f);
}

namespace reference {

/// One sequence. weights: [gates * hidden][hidden]; products: what the inputs contribute,
/// [gates * hidden][steps]; state and cell: before the first step, [hidden], or null for zeros.
/// Writes real values [channels()][steps].
void recurrence(const RecurrenceSpec& s, const int8_t* weights, const float* products,
                const float* state, const float* cell, float* out);

}  // namespace reference
}  // namespace adalayer

// Operations over floats by number, as programs and kernels of any device name them.
#pragma once

#include <cstdint>

namespace adalayer {

/// Of one float; reference/image_spec.hpp has the formulas.
enum class FloatFunction : int32_t { Clamp, Multiply, Plus, Sigmoid, Tanh, Silu };
constexpr int kFloatFunctions = 6;

/// Of two.
enum class FloatPair : int32_t { Sum, Difference, Product, Quotient };
constexpr int kFloatPairs = 4;

/// Of all values along some axes: their mean, or the root of the sum of their squares.
enum class Reduction : int32_t { Mean, Norm };
constexpr int kReductions = 2;

/// Of a recurrent layer; reference/recurrence.hpp has the formulas.
enum class RecurrentKind : int32_t { Lstm, Gru, Tanh, Relu };
constexpr int kRecurrentKinds = 4;

}  // namespace adalayer

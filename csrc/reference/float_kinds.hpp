// Operations over floats by number, as programs and kernels of any device name them.
#pragma once

#include <cstdint>

namespace adalayer {

/// Of one float; reference/image_spec.hpp has the formulas.
enum class FloatFunction : int32_t { Clamp, Multiply, Plus, Sigmoid, Tanh, Silu };
constexpr int kFloatFunctions = 6;

/// Of two.
enum class FloatPair : int32_t { Sum, Difference, Product };
constexpr int kFloatPairs = 3;

/// Of a recurrent layer; reference/recurrence.hpp has the formulas.
enum class RecurrentKind : int32_t { Lstm, Gru, Tanh, Relu };
constexpr int kRecurrentKinds = 4;

}  // namespace adalayer

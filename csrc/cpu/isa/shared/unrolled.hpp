// Loops that are written out.
#pragma once

#include <utility>

// For files with instruction-set flags: nothing in here may be one function for the whole program.
namespace adalayer::cpu {
namespace {

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};

template <int kBegin, class Fn, int... kAt>
[[gnu::always_inline]] inline void call_all([[maybe_unused]] const Fn& fn,
                                            std::integer_sequence<int, kAt...>) {
  (fn(Index<kBegin + kAt>{}), ...);
}

/// fn(Index<kBegin>{}), ..., fn(Index<kEnd - 1>{}): a loop whose counter is a constant. All calls
/// are in one function: the compiler optimizes each function before it inlines it, and with one
/// function more per step the last call was optimized as often as there are steps.
template <int kBegin, int kEnd, class Fn>
[[gnu::always_inline]] inline void unrolled(const Fn& fn) {
  call_all<kBegin>(fn, std::make_integer_sequence<int, (kEnd > kBegin ? kEnd - kBegin : 0)>{});
}

}  // namespace
}  // namespace adalayer::cpu

// What a check of a layer was about, for check::About.
#pragma once

#include <string>

#include "cpu/kernel_table.hpp"
#include "reference/spec.hpp"

namespace adalayer {

inline std::string text_of(const ConvShape& s) {
  const auto n = [](int64_t number) { return std::to_string(number); };
  const auto pair = [&](int64_t h, int64_t w) { return n(h) + "x" + n(w); };
  return n(s.batch) + " x " + n(s.in_channels) + " x " + pair(s.in_h, s.in_w) + " to " +
         n(s.out_channels) + " in " + n(s.groups) + " groups, kernel " +
         pair(s.kernel_h, s.kernel_w) + ", stride " + pair(s.stride_h, s.stride_w) + ", dilation " +
         pair(s.dilation_h, s.dilation_w) + ", padding " + n(s.pad_top) + " " + n(s.pad_left) +
         " " + n(s.pad_bottom) + " " + n(s.pad_right);
}

inline std::string text_of(const cpu::KernelRow& row) { return std::string("kernels ") + row.name; }

}  // namespace adalayer

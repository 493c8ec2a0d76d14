// Requantization with numbers drawn at random, and its vectors.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "cpu/conv_epilogue.hpp"
#include "reference/spec.hpp"

/// What follows the sums of a convolution: of a problem, which draws it behind its weights.
struct RandomEpilogue {
  std::vector<float> scale, bias;
  std::vector<int32_t> correction;
  std::vector<uint8_t> table;
  adalayer::cpu::ConvEpilogue epilogue;

  /// `pick(lo, hi)` draws an integer. `zero_point`: of input and residual. With `with_table` the
  /// result goes through the table; unless `bounded`, the first channel's leaves every range.
  template <class Pick>
  void draw(const adalayer::ConvShape& s, std::span<const int8_t> weights, int bits, int zero_point,
            bool with_table, bool bounded, const Pick& pick) {
    const auto padded = static_cast<size_t>(adalayer::cpu::epilogue_size(s.out_channels));
    scale.resize(padded);
    bias.resize(padded);
    correction.resize(padded);
    table.resize(256);
    for (auto& v : table)
      v = static_cast<uint8_t>(pick(0, 255));
    for (int64_t o = 0; o < s.out_channels; ++o) {
      int32_t sum = 0;
      for (int64_t k = 0; k < s.reduction(); ++k)
        sum += weights[o * s.reduction() + k];
      correction[o] = -zero_point * sum;
      scale[o] = static_cast<float>(pick(-100, 100)) / 1e3f /
                 static_cast<float>((1 << (bits - 1)) * (1 + s.reduction() / 16));
      bias[o] = static_cast<float>(pick(-1000, 1000)) / 10.0f;
    }
    if (!bounded) scale[0] = 1e30f;
    epilogue.correction = zero_point == 0 ? nullptr : correction.data();
    epilogue.scale = scale.data();
    epilogue.bias = bias.data();
    epilogue.residual_scale = 0.37f;
    epilogue.residual_zero = zero_point;
    epilogue.finish = {.lo = static_cast<float>(3 - 17),
                       .hi = static_cast<float>(250 - 17),
                       .zero_point = 17,
                       .table = with_table ? table.data() : nullptr,
                       .inv_scale = 1.7f};
    epilogue.bounded = bounded;
  }
};

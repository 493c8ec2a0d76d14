// The programs that the fuzzer begins with, and that other architectures have to read.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "engine_programs.hpp"

namespace programs {

/// Convolutions in the forms that have kernels of their own.
inline Program convolutions() {
  Builder b;
  const auto x = b.value("image", 3, 9, 8, ValueKind::F32);
  auto y = b.node(OpKind::Quantize, {x}, b.value("levels", 3, 9, 8));
  const auto conv = [&](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t groups,
                        int bits, bool residual) {
    const Value v = b.p.values[static_cast<size_t>(y)];
    const int64_t pad = kernel / 2;
    const auto next = b.value("conv", out, (v.h + 2 * pad - kernel) / stride + 1,
                              (v.w + 2 * pad - kernel) / stride + 1);
    const std::vector<float> scale(static_cast<size_t>(out), 0.01f);
    const std::vector<float> bias(static_cast<size_t>(out), 1.0f);
    std::vector<int32_t> inputs = {y};
    if (residual) inputs.push_back(y);
    y = b.node(OpKind::Conv, inputs, next,
               {kernel, kernel, stride, stride, pad, pad, pad, pad, 1, 1, groups, 10, 255, 10},
               {kInverse, -1, 1},
               {b.weights(static_cast<uint32_t>(out), static_cast<uint32_t>(in / groups),
                          static_cast<uint32_t>(kernel), static_cast<uint32_t>(kernel), bits),
                b.floats(scale), b.floats(bias), -1});
  };
  conv(3, 24, 3, 2, 1, 8, false);    // a stem
  conv(24, 24, 3, 1, 24, 5, false);  // depthwise
  conv(24, 32, 1, 1, 1, 3, false);   // pointwise
  conv(32, 32, 3, 1, 4, 4, true);    // grouped, with a residual
  conv(32, 20, 3, 1, 1, 2, false);
  const Value v = b.p.values[static_cast<size_t>(y)];
  const auto out = b.node(OpKind::Dequantize, {y}, b.value("y", v.c, v.h, v.w, ValueKind::F32));
  b.p.inputs = {x};
  b.p.outputs = {out};
  return b.p;
}

/// With the texts that the Python package writes.
inline Program described() {
  Program p = small_program();
  p.metadata["adalayer.inputs"] = R"([["x", [2]]])";
  p.metadata["adalayer.order"] = "[0]";
  p.metadata["adalayer.outputs"] = "[[0, [2], [[2, 1]]]]";
  p.metadata["adalayer.leaves"] = R"([{"tensor": 0}])";
  p.metadata["adalayer.structure"] = R"({"dict": {"scores": 0}})";
  p.metadata["preprocessing"] = R"({"mean": [0.5, 0.25], "std": [0.2, 0.3]})";
  return p;
}

/// Names, and what is in them.
inline std::vector<std::pair<std::string, Program>> seeds() {
  std::vector<std::pair<std::string, Program>> all;
  all.emplace_back("small", small_program());
  all.emplace_back("every_operation", every_operation());
  all.emplace_back("tokens", token_program());
  all.emplace_back("floats", float_program());
  all.emplace_back("convolutions", convolutions());
  all.emplace_back("described", described());
  all.emplace_back("sizes", ranged());
  return all;
}

}  // namespace programs

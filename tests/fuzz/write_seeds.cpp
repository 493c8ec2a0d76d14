// Writes the seeds of the fuzzer into a folder: files as the writer of today makes them, so that
// they follow the format. Usage: write_seeds FOLDER
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>

#include "engine/container.hpp"
#include "engine_programs.hpp"

using namespace programs;

namespace {

/// Convolutions in the forms that have kernels of their own.
Program convolutions() {
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
Program described() {
  Program p = small_program();
  p.metadata["adalayer.inputs"] = R"([["x", [2]]])";
  p.metadata["adalayer.order"] = "[0]";
  p.metadata["adalayer.outputs"] = "[[0, [2], [[2, 1]]]]";
  p.metadata["adalayer.leaves"] = R"([{"tensor": 0}])";
  p.metadata["adalayer.structure"] = R"({"dict": {"scores": 0}})";
  p.metadata["preprocessing"] = R"({"mean": [0.5, 0.25], "std": [0.2, 0.3]})";
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  try {
    const std::filesystem::path folder = argv[1];
    std::filesystem::create_directories(folder);
    save_program(small_program(), folder / "small.ada");
    save_program(every_operation(), folder / "every_operation.ada");
    save_program(token_program(), folder / "tokens.ada");
    save_program(float_program(), folder / "floats.ada");
    save_program(convolutions(), folder / "convolutions.ada");
    save_program(described(), folder / "described.ada");
    save_program(ranged(), folder / "sizes.ada");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}

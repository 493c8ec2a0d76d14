// Times direct convolutions, u8 image in and out, one thread: pointwise, strided and depthwise
// ones, with weights of 8 bits (a bell, and uniform ones; levels of 8 bits and of 7) and of 4, in
// microseconds and in products per cycle of the core. A sample counts where two loops beside it,
// one that waits for its own products and one that keeps the vector units busy, ran as fast as
// they ever do: on a core that shares its units with a neighbour the second takes longer.
//
//   bench_products [what a layer's name contains]
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/conv/grouped.hpp"
#include "cpu/conv/matmul.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/probe.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

namespace {

constexpr int kMultiplications = 7000;
constexpr int kLatency = 3;  // cycles of one, on every processor of the last ten years
constexpr double kLikeTheBest = 1.08;
constexpr double kMicroseconds = 150e3;  // of runs, per order of the loops
constexpr int kLeast = 20;

double thread_microseconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) / 1e3;
}

double timed(const std::function<void()>& run) {
  const double begin = thread_microseconds();
  run();
  return thread_microseconds() - begin;
}

/// Each waits for the one before it. (Some cores add constants without taking a cycle.)
void wait_for_multiplications() {
  uint64_t product = 3;
  for (int i = 0; i < kMultiplications; ++i)
    __asm__ volatile("imul %0, %0" : "+r"(product));
}

/// One run of a layer, and what the core did beside it.
struct Sample {
  double run, chain, vectors;  // microseconds
};

/// The median of the runs beside which both loops were as fast as beside any of this layer, in
/// microseconds and in cycles. (Of this layer: wide units lower the clock while they are in use.)
struct Result {
  double microseconds = 0, cycles = 0;
};
Result at_its_best(const std::vector<Sample>& samples) {
  double chain = std::numeric_limits<double>::max(), vectors = chain;
  for (const Sample& s : samples) {
    chain = std::min(chain, s.chain);
    vectors = std::min(vectors, s.vectors);
  }
  std::vector<double> runs;
  for (const Sample& s : samples)
    if (s.chain < kLikeTheBest * chain && s.vectors < kLikeTheBest * vectors) runs.push_back(s.run);
  if (runs.empty()) return {};
  std::sort(runs.begin(), runs.end());
  const double median = runs[runs.size() / 2];
  return {median, median * kMultiplications * kLatency / chain};
}

struct Layer {
  int64_t in, out, size, kernel, stride;
  bool residual, depthwise;

  std::string name() const {
    std::string text = std::to_string(kernel) + "x" + std::to_string(kernel) +
                       (stride > 1 ? ", " + std::to_string(stride) : "") + " " +
                       std::to_string(in) + "-" + std::to_string(out) + " @" + std::to_string(size);
    return text + (residual ? ", residual" : "") + (depthwise ? ", depthwise" : "");
  }
  ConvShape shape() const {
    const int64_t pad = kernel / 2;
    return {.batch = 1,
            .in_channels = in,
            .in_h = size,
            .in_w = size,
            .out_channels = out,
            .kernel_h = kernel,
            .kernel_w = kernel,
            .stride_h = stride,
            .stride_w = stride,
            .pad_top = pad,
            .pad_left = pad,
            .pad_bottom = pad,
            .pad_right = pad,
            .groups = depthwise ? in : 1};
  }
};

const Layer kLayers[] = {{64, 64, 56, 1, 1, false, false},    {64, 256, 56, 1, 1, true, false},
                         {256, 64, 56, 1, 1, false, false},   {128, 512, 28, 1, 1, true, false},
                         {512, 128, 28, 1, 1, false, false},  {256, 1024, 14, 1, 1, true, false},
                         {1024, 256, 14, 1, 1, false, false}, {512, 2048, 7, 1, 1, true, false},
                         {2048, 512, 7, 1, 1, false, false},  {128, 128, 56, 3, 2, false, false},
                         {64, 64, 224, 3, 1, false, false},   {256, 256, 56, 3, 1, false, false},
                         {64, 64, 56, 3, 1, false, false},    {128, 128, 28, 3, 1, false, false},
                         {256, 256, 14, 3, 1, false, false},  {512, 512, 28, 3, 1, false, false},
                         {512, 512, 7, 3, 1, false, false},   {16, 96, 112, 1, 1, false, false},
                         {32, 192, 28, 1, 1, false, false},   {144, 24, 56, 1, 1, false, false},
                         {32, 32, 112, 3, 1, false, true},    {144, 144, 56, 3, 1, false, true},
                         {96, 96, 112, 3, 2, false, true},    {384, 384, 14, 3, 1, false, true}};

struct Values {
  const char* name;
  int bits;
  bool uniform;
  int qmax;
};

const Values kValues[] = {{"8 bits, bell", 8, false, 255},
                          {"8 bits, uniform", 8, true, 255},
                          {"bell, levels of 7", 8, false, 127},
                          {"uniform, levels of 7", 8, true, 127},
                          {"4 bits", 4, false, 255}};

/// Each output channel a bell, scaled so that its largest weight is the grid's; or uniform.
std::vector<int8_t> weights_of(const ConvShape& s, int bits, bool uniform, std::mt19937& random) {
  const int most = (1 << (bits - 1)) - 1;
  std::normal_distribution<float> normal;
  std::vector<float> channel(static_cast<size_t>(s.reduction()));
  std::vector<int8_t> weights;
  for (int64_t o = 0; o < s.out_channels; ++o) {
    float largest = 0.0f;
    for (float& w : channel)
      largest = std::max(largest, std::fabs(w = normal(random)));
    for (const float w : channel)
      weights.push_back(static_cast<int8_t>(
          uniform ? static_cast<int>(random() % static_cast<unsigned>(2 * most + 1)) - most
                  : std::lrint(w / largest * static_cast<float>(most))));
  }
  return weights;
}

/// A layer by the faster order of its loops.
Result measure(const Layer& layer, const Values& values) {
  std::mt19937 random(1);
  const KernelRow& row = *active_kernels();
  const ConvShape s = layer.shape();
  const auto pad = static_cast<int>(layer.kernel / 2);
  const int64_t phases = row.positions == Positions::Flattened ? layer.stride : 1;
  const ImageLayout in =
      image_layout(layer.in, layer.size, layer.size, {pad, pad, pad, pad}, phases);
  const ImageLayout out = image_layout(layer.out, s.out_h(), s.out_w(), {0, 0, 0, 0});
  AlignedBuffer x(static_cast<size_t>(in.image_bytes + in.slack));
  AlignedBuffer y(static_cast<size_t>(out.image_bytes + out.slack)), residual(y.size());
  for (size_t i = 0; i < x.size(); ++i)
    x.data()[i] = static_cast<uint8_t>(random() % static_cast<unsigned>(values.qmax + 1));
  const auto padded = static_cast<size_t>(epilogue_size(layer.out));
  const std::vector<float> scale(padded, 1e-4f), bias(padded, 20.0f);
  ConvEpilogue epilogue;
  epilogue.scale = scale.data();
  epilogue.bias = bias.data();
  epilogue.bounded = true;
  const std::vector<int8_t> weights = weights_of(s, values.bits, values.uniform, random);

  std::vector<std::function<void()>> orders;
  GroupedWeights grouped;
  ConvPlan plan;
  AlignedBuffer packed;
  if (layer.depthwise) {
    grouped = build_grouped(s, weights);
    orders.emplace_back(
        [&] { run_grouped(s, grouped, epilogue, {&in, x.data()}, {}, {&out, y.data()}, {}); });
  } else {
    plan = plan_conv(s, in, &out, layer.residual ? &out : nullptr, row);
    plan.qmax = values.qmax;
    const int bits = product_bits(row, values.bits, values.qmax);
    if (bits < 7) plan.arrangement = nullptr;
    packed = AlignedBuffer(static_cast<size_t>(plan.packed_bytes(8)));
    pack_panels(plan, weights, 8, packed.data());
    for (const bool other : {false, true})
      orders.emplace_back([&, other, bits] {
        const ConvCall call{.plan = plan,
                            .weights = packed.data(),
                            .bits = 8,
                            .weight_bits = bits,
                            .epilogue = &epilogue,
                            .in = x.data(),
                            .images = 1,
                            .out = y.data(),
                            .residual = layer.residual ? residual.data() : nullptr,
                            .by_columns = false,
                            .other_order = other,
                            .stream = nullptr,
                            .segment = 0};
        row.begin();  // (each time: the probe releases the tiles, too)
        run_conv(call, row, {});
        row.end();
      });
  }
  Result best;
  for (const auto& run : orders) {
    std::vector<Sample> samples;
    double spent = 0;
    for (int i = 0; spent < kMicroseconds || i < kLeast; ++i) {
      const double chain = timed(wait_for_multiplications);
      const double took = timed(run);
      const double vectors = timed([] { probe_cores(1); });
      samples.push_back({took, chain, vectors});
      spent += took;
    }
    const Result result = at_its_best(samples);
    if (result.microseconds > 0 &&
        (best.microseconds == 0 || result.microseconds < best.microseconds))
      best = result;
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  if (active_kernels() == nullptr) {
    std::fprintf(stderr, "this machine has no vector kernels\n");
    return 1;
  }
  std::printf("%-32s", "us, products per cycle");
  for (const Values& values : kValues)
    std::printf(" %21s", values.name);
  std::printf("\n");
  for (const Layer& layer : kLayers) {
    if (layer.name().find(only) == std::string::npos) continue;
    const ConvShape s = layer.shape();
    const auto products = static_cast<double>(s.out_h() * s.out_w() * s.out_channels) *
                          static_cast<double>(s.reduction());
    std::printf("%-32s", layer.name().c_str());
    for (const Values& values : kValues) {
      const Result result = measure(layer, values);
      std::printf("   %10.1f %7.1f", result.microseconds, products / result.cycles);
      std::fflush(stdout);
    }
    std::printf("\n");
  }
  return 0;
}

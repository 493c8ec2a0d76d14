// Times direct convolutions, u8 image in and out, one thread: pointwise, strided and depthwise
// ones, with weights of 8 bits (a bell, and uniform ones; levels of 8 bits and of 7) and of 4, in
// microseconds and in products per cycle of the core. A sample counts where two loops beside it,
// one that waits for its own additions and one that keeps the vector units busy, ran as fast as
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

constexpr int kAdditions = 20000;
constexpr double kLikeTheBest = 1.08;
constexpr int kSamples = 25, kMostRounds = 3000;

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

/// As many cycles as additions: each waits for the one before it.
void wait_for_additions() {
  uint64_t sum = 0;
  for (int i = 0; i < kAdditions; ++i)
    __asm__ volatile("add $1, %0" : "+r"(sum));
}

/// The core beside a sample: cycles per microsecond, and whether its units are ours alone.
class Core {
 public:
  bool at_its_best() {
    const double additions = timed(wait_for_additions);
    const double vectors = timed([] { probe_cores(1); });
    additions_ = std::min(additions_, additions);
    vectors_ = std::min(vectors_, vectors);
    return additions < kLikeTheBest * additions_ && vectors < kLikeTheBest * vectors_;
  }
  double cycles(double microseconds) const { return microseconds * kAdditions / additions_; }

 private:
  double additions_ = std::numeric_limits<double>::max();
  double vectors_ = std::numeric_limits<double>::max();
};

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
                         {256, 256, 14, 3, 1, false, false},  {16, 96, 112, 1, 1, false, false},
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

/// Microseconds of a layer, by the faster order of its loops.
double measure(const Layer& layer, const Values& values, Core& core) {
  std::mt19937 random(1);
  const KernelRow& row = *active_kernels();
  const ConvShape s = layer.shape();
  const auto pad = static_cast<int>(layer.kernel / 2);
  const ImageLayout in = image_layout(layer.in, layer.size, layer.size, {pad, pad, pad, pad});
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
        run_conv(call, row, {});
      });
  }
  double best = std::numeric_limits<double>::max();
  row.begin();
  for (const auto& run : orders) {
    std::vector<double> samples;
    for (int i = 0; i < kMostRounds && samples.size() < kSamples; ++i) {
      const bool before = core.at_its_best();
      const double took = timed(run);
      if (core.at_its_best() && before) samples.push_back(took);
    }
    if (samples.empty()) continue;
    std::sort(samples.begin(), samples.end());
    best = std::min(best, samples[samples.size() / 2]);
  }
  row.end();
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  if (active_kernels() == nullptr) {
    std::fprintf(stderr, "this machine has no vector kernels\n");
    return 1;
  }
  Core core;
  for (int i = 0; i < 1000; ++i)
    core.at_its_best();
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
      const double us = measure(layer, values, core);
      std::printf("   %10.1f %7.1f", us, products / core.cycles(us));
      std::fflush(stdout);
    }
    std::printf("\n");
  }
  return 0;
}

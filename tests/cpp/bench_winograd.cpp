// Times a 3x3 layer, u8 image in and out, one thread, by the direct product and by Winograd: all of
// them in turn in one process, so that whatever else the machine does falls on each alike, and by
// the thread's own clock, which stands still while others have the core.
//
//   bench_winograd [rounds [channels size [what its name contains]]]
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/conv/matmul.hpp"
#include "cpu/conv/winograd.hpp"
#include "cpu/kernel_table.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

namespace {

struct Contender {
  std::string name;
  std::function<void()> run;
  std::vector<double> microseconds;

  double median() {
    std::sort(microseconds.begin(), microseconds.end());
    return microseconds[microseconds.size() / 2];
  }
};

double thread_microseconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) / 1e3;
}

struct Ratio {
  double median = 0.0, least = 0.0;
};

/// Weights as training leaves them: each output channel a bell, scaled so that its largest is the
/// grid's.
std::vector<int8_t> bell(const ConvShape& s, int bits, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> channel(static_cast<size_t>(s.reduction()));
  std::vector<int8_t> weights;
  for (int64_t o = 0; o < s.out_channels; ++o) {
    float most = 0.0f;
    for (float& w : channel)
      most = std::max(most, std::fabs(w = normal(random)));
    for (const float w : channel)
      weights.push_back(
          static_cast<int8_t>(std::lrint(w / most * static_cast<float>((1 << (bits - 1)) - 1))));
  }
  return weights;
}

/// `rounds` of all, in turn.
void measure(std::vector<Contender>& contenders, const KernelRow& row, int rounds) {
  row.begin();
  for (int round = -2; round < rounds; ++round)
    for (Contender& c : contenders) {
      const double begin = thread_microseconds();
      c.run();
      const double took = thread_microseconds() - begin;
      if (round >= 0) c.microseconds.push_back(took);
    }
  row.end();
}

void print(std::vector<Contender>& contenders, int64_t channels, int64_t size) {
  std::printf("%lld -> %lld channels at %lld x %lld\n", static_cast<long long>(channels),
              static_cast<long long>(channels), static_cast<long long>(size),
              static_cast<long long>(size));
  // Over the faster direct form of the same width; 1 where none was asked for.
  Ratio direct;
  for (Contender& c : contenders) {
    const double median = c.median(), least = c.microseconds.front();
    if (c.name.rfind("direct", 0) == 0) {
      const bool other_form = c.name.find("resident") != std::string::npos;
      direct.median = other_form ? std::min(direct.median, median) : median;
      direct.least = other_form ? std::min(direct.least, least) : least;
    }
    std::printf("  %-40s %6.0f us %5.2f x   least %6.0f us %5.2f x\n", c.name.c_str(), median,
                direct.median > 0 ? direct.median / median : 1.0, least,
                direct.least > 0 ? direct.least / least : 1.0);
  }
}

void layer(int64_t channels, int64_t size, int rounds, const std::string& only = {}) {
  std::mt19937 random(1);
  const KernelRow& row = *active_kernels();
  const WinogradKernels& kernels = *row.winograd;
  const ConvShape s{.batch = 1,
                    .in_channels = channels,
                    .in_h = size,
                    .in_w = size,
                    .out_channels = channels,
                    .kernel_h = 3,
                    .kernel_w = 3,
                    .pad_top = 1,
                    .pad_left = 1,
                    .pad_bottom = 1,
                    .pad_right = 1};
  const ImageLayout image = image_layout(channels, size, size, {1, 1, 1, 1});
  const auto bytes = static_cast<size_t>(image.image_bytes + image.slack);
  AlignedBuffer x(bytes), y(bytes);
  for (size_t i = 0; i < bytes; ++i)
    x.data()[i] = static_cast<uint8_t>(random());
  const auto padded = static_cast<size_t>(epilogue_size(channels));
  const std::vector<float> scale(padded, 1e-4f), bias(padded, 20.0f);
  ConvEpilogue epilogue;
  epilogue.scale = scale.data();
  epilogue.bias = bias.data();
  epilogue.bounded = true;

  std::vector<Contender> contenders;
  for (const int bits : {8, 4}) {
    const std::vector<int8_t> weights = bell(s, bits, random);
    const std::string suffix = ", " + std::to_string(bits) + " bits";
    for (const int panel_bits : {bits, 8}) {
      auto plan = std::make_shared<ConvPlan>(plan_conv(s, image, &image, nullptr, row));
      if (bits < 7) plan->arrangement = nullptr;
      const auto packed =
          std::make_shared<AlignedBuffer>(static_cast<size_t>(plan->packed_bytes(panel_bits)));
      pack_panels(*plan, weights, panel_bits, packed->data());
      contenders.push_back({"direct" + std::string(panel_bits == bits ? "" : " resident") + suffix,
                            [=, &row, &epilogue, &x, &y] {
                              const ConvCall call{.plan = *plan,
                                                  .weights = packed->data(),
                                                  .bits = panel_bits,
                                                  .weight_bits = bits,
                                                  .epilogue = &epilogue,
                                                  .in = x.data(),
                                                  .images = 1,
                                                  .out = y.data(),
                                                  .residual = nullptr,
                                                  .by_columns = false,
                                                  .other_order = false,
                                                  .stream = nullptr,
                                                  .segment = 0};
                              run_conv(call, row, {});
                            },
                            {}});
      if (bits == 8) break;
    }
    for (const WinogradForm form : {WinogradForm::F4x4, WinogradForm::F2x2}) {
      const auto w = std::make_shared<WinogradWeights>(derive_winograd(form, s, weights));
      const auto plan =
          std::make_shared<WinogradPlan>(plan_winograd(form, s, image, &image, nullptr, kernels));
      const auto scratch = std::make_shared<AlignedBuffer>(
          static_cast<size_t>(winograd_scratch_bytes(*plan, kernels)));
      contenders.push_back({(form == WinogradForm::F4x4 ? "winograd 4x4, " : "winograd 2x2, ") +
                                w->taps.describe() + suffix,
                            [=, &row, &kernels, &epilogue, &x, &y] {
                              const WinogradCall call{.plan = *plan,
                                                      .taps = w->taps,
                                                      .data = w->data.data(),
                                                      .epilogue = &epilogue,
                                                      .in = x.data(),
                                                      .images = 1,
                                                      .out = y.data(),
                                                      .residual = nullptr,
                                                      .by_columns = false};
                              run_winograd(call, kernels, row, scratch->data(), {});
                            },
                            {}});
    }
  }
  std::erase_if(contenders,
                [&](const Contender& c) { return c.name.find(only) == std::string::npos; });
  measure(contenders, row, rounds);
  print(contenders, channels, size);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 50;
  if (active_kernels() == nullptr) {
    std::fprintf(stderr, "this machine has no vector kernels\n");
    return 1;
  }
  if (argc > 3) {
    layer(std::atoi(argv[2]), std::atoi(argv[3]), rounds, argc > 4 ? argv[4] : "");
    return 0;
  }
  layer(64, 56, rounds);
  layer(128, 28, rounds);
  layer(256, 14, rounds);
  layer(512, 7, rounds);
  return 0;
}

// Single layers on every instruction set against the scalar reference, and what they keep: packed
// weights, activations, scales and outputs live in memory of exactly their size between unreadable
// pages, so that a stray read or write is an error, not luck.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "core/status.hpp"
#include "cpu/conv/policy.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/layer/single_layer.hpp"
#include "describe.hpp"
#include "exact.hpp"
#include "formats/canonical.hpp"
#include "seed.hpp"

using namespace adalayer;

// ---- allocations of this thread -----------------------------------------------------------------

namespace {
thread_local long long t_allocations = 0;
}

// Not inlined: g++ 12 would see free() of what operator new returned, and warn.
[[gnu::noinline]] void* operator new(size_t size) {
  ++t_allocations;
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }

// Sanitizers have an aligned_alloc of their own.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
extern "C" void* aligned_alloc(size_t alignment, size_t size) {
  ++t_allocations;
  void* p = nullptr;
  return posix_memalign(&p, alignment, size) == 0 ? p : nullptr;
}
#endif

namespace {

std::mt19937 rng(check::seed(20240607));

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

struct Layer {
  ConvShape shape;
  int bits = 8;
  std::vector<int8_t> weights;
  std::vector<uint8_t> packed;
  std::vector<float> scale, bias;
};

Layer make_layer(const ConvShape& shape, int bits) {
  Layer layer{shape, bits, {}, {}, {}, {}};
  const int lo = -(1 << (bits - 1)), hi = (1 << (bits - 1)) - 1;
  layer.weights.resize(static_cast<size_t>(shape.out_channels * shape.reduction()));
  const bool sparse = uniform(0, 1) == 1;
  for (auto& w : layer.weights)
    w = static_cast<int8_t>(sparse && uniform(0, 9) < 7 ? 0 : uniform(lo, hi));
  // Blocks of zeros: output channels 16k ... 16k + 15 over some of the input channels.
  if (uniform(0, 2) == 0) {
    const int64_t area = shape.kernel_h * shape.kernel_w, ins = shape.group_in();
    for (int64_t o = 0; o < shape.out_channels; o += 16) {
      const int first = uniform(0, static_cast<int>((ins - 1) / 64)) * 64;
      for (int64_t row = o; row < std::min(o + 16, shape.out_channels); ++row)
        for (int64_t at = first * area; at < std::min<int64_t>(ins, first + 64) * area; ++at)
          layer.weights[static_cast<size_t>(row * ins * area + at)] = 0;
    }
  }
  layer.packed = formats::pack_canonical(
      layer.weights, bits, static_cast<uint32_t>(shape.out_channels),
      static_cast<uint32_t>(shape.group_in()), static_cast<uint32_t>(shape.kernel_h),
      static_cast<uint32_t>(shape.kernel_w));
  for (int64_t o = 0; o < shape.out_channels; ++o) {
    layer.scale.push_back(static_cast<float>(uniform(-1000, 1000)) * 1e-5f);
    layer.bias.push_back(static_cast<float>(uniform(-500, 500)) * 0.1f);
  }
  return layer;
}

ConvShape random_shape() {
  for (;;) {
    ConvShape s;
    s.groups = uniform(0, 3) == 0 ? uniform(2, 20) : 1;
    const bool depthwise = s.groups > 1 && uniform(0, 1) == 1;
    s.in_channels = depthwise ? s.groups : s.groups * uniform(1, 70);
    s.out_channels = depthwise ? s.groups : s.groups * uniform(1, 40);
    s.batch = uniform(1, 3);
    s.in_h = uniform(1, 10);
    s.in_w = uniform(1, 10);
    s.kernel_h = uniform(1, 4);
    s.kernel_w = uniform(1, 4);
    s.stride_h = uniform(1, 3);
    s.stride_w = uniform(1, 3);
    s.pad_top = uniform(0, 3);
    s.pad_left = uniform(0, 3);
    s.pad_bottom = uniform(0, 3);
    s.pad_right = uniform(0, 3);
    s.dilation_h = uniform(1, 2);
    s.dilation_w = uniform(1, 2);
    if (uniform(0, 3) == 0) {  // what Winograd takes
      s.kernel_h = s.kernel_w = 3;
      s.groups = s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    }
    try {
      validate(s);
      return s;
    } catch (const InvalidArgument&) {
    }
  }
}

/// Runs one layer on the active instruction set into a buffer of exactly the output's size.
template <class T>
std::vector<T> run(const Layer& layer, const ActivationIn& in, Layout layout, int threads,
                   const float* residual = nullptr) {
  const ConvShape& s = layer.shape;
  const auto count = static_cast<size_t>(s.batch * s.out_channels * s.out_h() * s.out_w());
  const Exact<T> out(count);
  const auto scale = Exact<float>::of(layer.scale), bias = Exact<float>::of(layer.bias);
  const auto packed = Exact<uint8_t>::of(layer.packed);
  OutputSpec spec;
  spec.data = out.data();
  spec.dtype = sizeof(T) == 1 ? DType::U8 : DType::F32;
  spec.layout = layout;
  spec.scale = scale.data();
  spec.bias = bias.data();
  spec.zero_point = sizeof(T) == 1 ? 120 : 0;
  spec.lo = -110.0f;
  spec.hi = 130.0f;
  if (residual != nullptr) {
    spec.residual = residual;
    spec.on_grid = true;
    spec.grid = {1.0f / 0.7f, 100, 255};
    spec.grid_scale = 0.7f;
  }
  const auto weights =
      cpu::cached_weights(s, {packed.data(), packed.size()}, cpu::largest_level(in));
  cpu::conv2d(s, in, *weights, spec, threads);
  return {out.data(), out.data() + count};
}

long long compared = 0;

/// `policy`: of zeros, else any.
void check_layer(const Layer& layer, int threads, const char* policy = nullptr) {
  constexpr const char* kPolicies[] = {"auto", "dense", "blocks", "bitmask"};
  const char* const sparse = policy != nullptr ? policy : kPolicies[uniform(0, 3)];
  cpu::set_sparse_policy(sparse);
  constexpr const char* kWinograd[] = {"auto", "off", "4x4", "2x2"};
  const char* const winograd = kWinograd[uniform(0, 3)];
  cpu::set_winograd_policy(winograd);
  const ConvShape& s = layer.shape;
  const auto count = static_cast<size_t>(s.batch * s.in_channels * s.in_h * s.in_w);
  // Most layers have all levels; the fewer they are the larger the sums that kernels may take.
  constexpr int kQmax[] = {255, 255, 127, 63, 15, 3};
  const int qmax = kQmax[uniform(0, 5)];
  const check::About about([&] {
    return text_of(s) + ", " + std::to_string(layer.bits) + " bits, levels to " +
           std::to_string(qmax) + ", " + std::to_string(threads) + " threads, sparse " + sparse +
           ", winograd " + winograd;
  });
  const Exact<uint8_t> levels(count);
  const Exact<float> floats(count);
  for (size_t i = 0; i < count; ++i) {
    levels[i] = static_cast<uint8_t>(uniform(0, qmax));
    floats[i] = static_cast<float>(uniform(-3000, 3000)) * 0.01f;
  }
  const Exact<float> residual(
      static_cast<size_t>(s.batch * s.out_channels * s.out_h() * s.out_w()));
  for (size_t i = 0; i < residual.size(); ++i)
    residual[i] = static_cast<float>(uniform(-900, 900)) * 0.1f;
  for (Layout layout : {Layout::NCHW, Layout::NHWC}) {
    const ActivationIn u8{levels.data(), DType::U8, layout, {1.0f, qmax / 7, qmax}};
    const ActivationIn f32{floats.data(), DType::F32, layout, {11.3f, qmax / 3, qmax}};
    force_isa("scalar");
    const auto want_u8 = run<uint8_t>(layer, u8, layout, 1);
    const auto want_f32 = run<float>(layer, f32, layout, 1);
    const auto want_added = run<float>(layer, f32, layout, 1, residual.data());
    for (const cpu::KernelRow* row : cpu::kernel_rows()) {
      if (!isa_supported(row->isa)) continue;
      force_isa(row->name);
      const check::Family family(row->name);
      const check::About where(
          [&] { return text_of(*row) + (layout == Layout::NCHW ? ", NCHW" : ", NHWC"); });
      CHECK(run<uint8_t>(layer, u8, layout, threads) == want_u8);
      CHECK(run<float>(layer, f32, layout, threads) == want_f32);
      CHECK(run<float>(layer, f32, layout, threads, residual.data()) == want_added);
      ++compared;
    }
  }
  force_isa("auto");
  cpu::set_sparse_policy("auto");
  cpu::set_winograd_policy("auto");
}

TEST(random_layers) {
  for (int i = 0; i < 150; ++i)
    check_layer(make_layer(random_shape(), uniform(2, 8)), uniform(1, 3));
}

ConvShape square(int64_t in, int64_t out, int64_t size, int64_t kernel, int64_t stride,
                 int64_t groups = 1, int64_t batch = 1) {
  ConvShape s;
  s.batch = batch;
  s.in_channels = in;
  s.out_channels = out;
  s.in_h = s.in_w = size;
  s.kernel_h = s.kernel_w = kernel;
  s.stride_h = s.stride_w = stride;
  s.pad_top = s.pad_left = s.pad_bottom = s.pad_right = kernel / 2;
  s.groups = groups;
  return s;
}

/// One to four channels: pixels without gaps, or rows side by side.
TEST(first_layers) {
  for (int channels = 1; channels <= 4; ++channels)
    for (int kernel : {2, 3, 7})
      for (int stride : {1, 2, 4})
        check_layer(make_layer(square(channels, 20, 21, kernel, stride, 1, 2), 5), uniform(1, 3));
}

/// As few positions in all as a matrix-vector product takes, and one more.
TEST(few_positions) {
  for (int bits : {2, 5, 8}) {
    for (int batch = 1; batch <= 5; ++batch) {
      check_layer(make_layer(square(150, 1100, 1, 1, 1, 1, batch), bits), uniform(1, 3));
      check_layer(make_layer(square(40, 33, 3, 3, 3, 1, batch), bits), uniform(1, 3));
    }
    check_layer(make_layer(square(66, 70, 2, 3, 1), bits), 2);
    check_layer(make_layer(square(160, 240, 2, 1, 1, 4), bits), 2);
  }
}

/// Pointwise layers over more pixels than one of the images that they are cut into.
TEST(many_pixels) {
  check_layer(make_layer(square(1500, 3, 27, 1, 1, 1, 2), 4), 3);
  check_layer(make_layer(square(2000, 5, 16, 1, 1, 1, 2), 3), 1);  // without a rest
}

/// What lies between the windows is not packed.
TEST(windows_apart) {
  for (int stride : {2, 3})
    for (int pad : {0, 1, 2}) {
      ConvShape s = square(24, 40, 13, 1, stride, 1, 2);
      s.pad_top = s.pad_left = s.pad_bottom = s.pad_right = pad;
      check_layer(make_layer(s, 6), uniform(1, 3));
    }
}

/// Narrow groups have kernels of their own, which take several rows at once.
TEST(grouped_layers) {
  for (int channels : {3, 16, 17, 40, 130}) {
    for (int stride : {1, 2})
      check_layer(make_layer(square(channels, channels, 19, 3, stride, channels), 8), 2);
    check_layer(make_layer(square(channels, 2 * channels, 9, 5, 1, channels), 4), 1);
  }
  for (int group : {2, 3, 4, 8, 9, 12, 16, 32, 33})
    check_layer(make_layer(square(3 * group, 3 * group, 19, 3, 1, 3), 7), uniform(1, 3));
  check_layer(make_layer(square(48, 200, 11, 3, 2, 4), 3), 2);
}

/// A tensor may be empty where padding makes up for it.
TEST(padding_alone) {
  ConvShape s = square(20, 18, 0, 3, 1);
  s.in_w = 4;
  s.pad_top = s.pad_bottom = 2;
  check_layer(make_layer(s, 4), 2);
  s.in_h = 4;
  s.in_w = 0;
  s.pad_left = s.pad_right = 2;
  check_layer(make_layer(s, 4), 2);
}

TEST(warm_calls_do_not_allocate) {
  const Layer layers[] = {
      make_layer(square(3, 16, 30, 7, 2), 8),      make_layer(square(32, 48, 14, 3, 1), 4),
      make_layer(square(96, 96, 14, 3, 1, 96), 8), make_layer(square(32, 32, 14, 3, 1, 8), 8),
      make_layer(square(256, 300, 1, 1, 1), 2),    make_layer(square(64, 24, 40, 1, 1, 1, 3), 5)};
  for (const cpu::KernelRow* row : cpu::kernel_rows()) {
    if (!isa_supported(row->isa)) continue;
    force_isa(row->name);
    const check::Family family(row->name);
    cpu::clear_weight_cache();
    long long allocations[3] = {};
    for (long long& count : allocations) {
      count = -t_allocations;
      for (const Layer& layer : layers) {
        const ConvShape& s = layer.shape;
        static float x[400000], y[400000];
        const ActivationIn in{x, DType::F32, Layout::NHWC, {1.0f, 37, 255}};
        OutputSpec out;
        out.data = y;
        out.layout = Layout::NHWC;
        out.scale = layer.scale.data();
        out.bias = layer.bias.data();
        cpu::conv2d(s, in, *cpu::cached_weights(s, layer.packed), out, 1);
      }
      count += t_allocations;
    }
    CHECK(allocations[0] > 0);  // they are seen
    CHECK_EQ(allocations[2], 0LL);
  }
  force_isa("auto");
}

/// Trials of weights that no cache holds have them come from memory.
TEST(weights_beyond_the_caches) {
  const ConvShape shape = square(2112, 2112, 1, 1, 1);
  Layer layer = make_layer(shape, 8);
  // A fifth of them are blocks of zeros: a form without those is tried beside the dense one.
  for (int64_t o = 0; o < shape.out_channels; ++o)
    for (int64_t i = 0; i < shape.in_channels; ++i) {
      auto& w = layer.weights[static_cast<size_t>(o * shape.in_channels + i)];
      w = static_cast<int8_t>((o / 16 + i / 64) % 5 == 0 ? 0 : w == 0 ? 1 : w);
    }
  layer.packed = formats::pack_canonical(layer.weights, 8, 2112, 2112, 1, 1);
  CHECK(layer.weights.size() > size_t{4} << 20);
  check_layer(layer, 1, "auto");
}

/// Weights are laid out for one instruction set.
TEST(weights_of_another_instruction_set) {
  const Layer layer = make_layer(square(8, 8, 5, 3, 1), 4);
  force_isa("scalar");
  const auto weights = cpu::cached_weights(layer.shape, layer.packed);
  force_isa("auto");
  if (cpu::active_kernels() == nullptr) return;
  float x[200] = {}, y[200];
  OutputSpec out;
  out.data = y;
  out.scale = layer.scale.data();
  out.bias = layer.bias.data();
  CHECK_THROWS(cpu::conv2d(layer.shape, {x, DType::F32, Layout::NCHW, {}}, *weights, out, 1),
               InvalidArgument, "derived for another instruction set");
  const auto narrow = cpu::cached_weights(layer.shape, layer.packed, 127);
  CHECK_THROWS(
      cpu::conv2d(layer.shape, {x, DType::F32, Layout::NCHW, {1.0f, 0, 128}}, *narrow, out, 1),
      InvalidArgument, "levels up to 127, the input may have 128");
}

/// Levels that come as they are may be beyond the grid of the input.
TEST(levels_beyond_the_grid) {
  Layer layer = make_layer(square(64, 32, 5, 1, 1), 8);
  std::fill(layer.weights.begin(), layer.weights.end(), int8_t{-128});
  layer.packed = formats::pack_canonical(layer.weights, 8, 32, 64, 1, 1);
  std::fill(layer.scale.begin(), layer.scale.end(), 3e-5f);
  const std::vector<uint8_t> levels(64 * 5 * 5, 255);
  for (const int qmax : {127, 63, 255}) {
    const ActivationIn in{levels.data(), DType::U8, Layout::NHWC, {1.0f, 0, qmax}};
    force_isa("scalar");
    const auto want = run<uint8_t>(layer, in, Layout::NHWC, 1);
    for (const cpu::KernelRow* row : cpu::kernel_rows()) {
      if (!isa_supported(row->isa)) continue;
      force_isa(row->name);
      const check::Family family(row->name);
      const check::About about([&] { return text_of(*row) + ", grid to " + std::to_string(qmax); });
      CHECK(run<uint8_t>(layer, in, Layout::NHWC, 1) == want);
      if (qmax == 255) continue;
      const auto narrow = cpu::cached_weights(layer.shape, layer.packed, qmax);
      CHECK_THROWS(cpu::conv2d(layer.shape, in, *narrow, {}, 1), InvalidArgument,
                   "the input may have 255");
    }
  }
  force_isa("auto");
}

TEST(canonical_round_trip_and_damage) {
  for (int i = 0; i < 60; ++i) {
    ConvShape s = random_shape();
    const Layer layer = make_layer(s, uniform(2, 8));
    CHECK(formats::unpack_canonical(layer.packed) == layer.weights);
    auto damaged = layer.packed;
    const auto at = static_cast<size_t>(uniform(0, static_cast<int>(damaged.size()) - 1));
    damaged[at] ^= static_cast<uint8_t>(1 << uniform(0, 7));
    CHECK_THROWS(formats::unpack_canonical(damaged), CorruptData, "packed weight");
    damaged = layer.packed;
    damaged.resize(static_cast<size_t>(uniform(0, static_cast<int>(damaged.size()) - 1)));
    CHECK_THROWS(formats::unpack_canonical(damaged), CorruptData, "packed weight");
  }
}

TEST(accumulator_bound) {
  check_accumulator(65793, 8);  // 65793 * 255 * 128 = 2^31 - 128
  CHECK_THROWS(check_accumulator(65794, 8), InvalidArgument, "overflow the int32 accumulator");
}

/// A layer chooses its algorithm at each image size, a few times; sizes that choose the same share
/// the weights.
TEST(every_size_has_its_algorithm) {
  ConvShape s;
  s.batch = 2;
  s.in_channels = 16;
  s.out_channels = 24;
  s.kernel_h = s.kernel_w = 3;
  s.pad_top = s.pad_left = s.pad_bottom = s.pad_right = 1;
  Layer layer = make_layer(s, 3);
  const auto at = [&](int64_t size) {
    layer.shape.in_h = layer.shape.in_w = size;
    return cpu::cached_weights(layer.shape, layer.packed);
  };
  const auto right = [&](int64_t size) {
    layer.shape.in_h = layer.shape.in_w = size;
    std::vector<float> x(static_cast<size_t>(s.batch * s.in_channels * size * size));
    for (auto& v : x)
      v = static_cast<float>(uniform(-100, 100)) * 0.05f;
    const ActivationIn in{x.data(), DType::F32, Layout::NCHW, {12.0f, 100, 255}};
    const auto got = run<float>(layer, in, Layout::NCHW, 1);
    const Isa isa = active_isa();
    force_isa("scalar");
    const bool same = got == run<float>(layer, in, Layout::NCHW, 1);
    force_isa(isa_name(isa));
    return same;
  };
  cpu::set_sparse_policy("dense");
  for (const cpu::KernelRow* row : cpu::kernel_rows()) {
    if (!isa_supported(row->isa)) continue;
    force_isa(row->name);
    const check::Family family(row->name);
    const check::About about(
        [&] { return text_of(*row) + ", " + text_of(layer.shape) + ", 3 bits"; });
    cpu::clear_weight_cache();
    // Which of them is the faster one does not matter here: a policy decides instead of the clock.
    cpu::set_winograd_policy("off");
    const auto small = at(4);
    CHECK_EQ(small->algorithm->name(s), std::string("panels"));
    cpu::set_winograd_policy("4x4");
    const auto large = at(20);
    CHECK_EQ(large->algorithm->name(s), std::string("winograd 4x4"));
    CHECK(at(4) == small && at(20) == large);
    const size_t bytes = cpu::weight_cache_info().bytes;
    CHECK(bytes >= small->bytes() + large->bytes());
    CHECK(at(21) == large);  // not by being near: it has chosen the same
    for (int64_t size = 22; size < 27; ++size)
      CHECK(at(size) == large);
    CHECK_EQ(cpu::weight_cache_info().entries, size_t{1});
    CHECK(cpu::weight_cache_info().bytes < bytes + 4096);
    // Enough sizes: no more choices.
    CHECK(at(5) == small && at(40) == large && at(3) == small);
    for (const int64_t size : {3, 4, 5, 20, 26, 31})
      CHECK(right(size));
  }
  force_isa("auto");
  cpu::set_sparse_policy("auto");
  cpu::set_winograd_policy("auto");
}

/// Several threads run layers at once through one cache: the results are those of one thread.
TEST(concurrent_calls) {
  ConvShape s;
  s.batch = 2;
  s.in_channels = 40;
  s.out_channels = 48;
  s.in_h = s.in_w = 9;
  s.kernel_h = s.kernel_w = 3;
  s.pad_top = s.pad_left = s.pad_bottom = s.pad_right = 1;
  const Layer layer = make_layer(s, 5);
  std::vector<float> x(static_cast<size_t>(s.batch * s.in_channels * s.in_h * s.in_w));
  for (auto& v : x)
    v = static_cast<float>(uniform(-100, 100)) * 0.05f;
  const ActivationIn in{x.data(), DType::F32, Layout::NHWC, {12.0f, 100, 255}};
  const auto want = run<float>(layer, in, Layout::NHWC, 1);
  std::vector<std::thread> threads;
  std::vector<int> right(8, 0);
  cpu::clear_weight_cache();
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 40; ++i)
        right[static_cast<size_t>(t)] += run<float>(layer, in, Layout::NHWC, 1 + t % 3) == want;
    });
  for (auto& thread : threads)
    thread.join();
  CHECK(std::all_of(right.begin(), right.end(), [](int r) { return r == 40; }));
}

/// The cache's lock may be held by another thread at the moment of a fork.
TEST(cache_survives_fork) {
#if defined(__SANITIZE_ADDRESS__)
  return;  // the sanitizer's own allocator has locks that a child may find taken
#endif
  ConvShape s;
  s.batch = 1;
  s.in_channels = 3;
  s.out_channels = 5;
  std::vector<Layer> layers;
  for (int i = 0; i < 8; ++i)
    layers.push_back(make_layer(s, 4));
  const size_t limit = cpu::weight_cache_info().limit;
  cpu::set_weight_cache_limit(1);  // every call derives, inserts and evicts
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      for (size_t i = static_cast<size_t>(t); !stop; ++i)
        cpu::cached_weights(s, layers[i % layers.size()].packed);
    });
  for (int round = 0; round < 100; ++round) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a lock that is never released ends the child with a signal
      const auto weights = cpu::cached_weights(s, layers[0].packed);
      _exit(weights->header.bits == 4 ? 0 : 1);
    }
    CHECK(child > 0);
    int status = -1;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  stop = true;
  for (auto& thread : threads)
    thread.join();
  cpu::set_weight_cache_limit(limit);
}

}  // namespace

int main(int argc, char** argv) {
  const int failed = check::run_all(argc, argv);
  std::printf("%lld layer comparisons with the scalar reference, on:", compared);
  for (const cpu::KernelRow* row : cpu::kernel_rows())
    if (isa_supported(row->isa)) std::printf(" %s", row->name);
  std::printf("\n");
  // Without arguments all tests ran; then every machine with a faster kernel has compared some.
  const bool idle = argc == 1 && best_isa() != Isa::Scalar && compared == 0;
  return failed != 0 || idle ? 1 : 0;
}

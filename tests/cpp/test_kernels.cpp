// Kernels of every instruction set against the scalar reference, in C++ so that the sanitizers see
// them: packed weights, activations, scales and outputs live in memory of exactly their size
// between unreadable pages, so that a stray read or write is an error, not luck.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "core/status.hpp"
#include "cpu/conv/policy.hpp"
#include "cpu/isa/avx2/arrange.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/layer/single_layer.hpp"
#include "describe.hpp"
#include "exact.hpp"
#include "formats/canonical.hpp"
#include "formats/panels.hpp"
#include "reference/reference.hpp"
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
    const check::About about([&] { return text_of(*row); });
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

TEST(unpacking) {
  for (int bits = 2; bits <= 8; ++bits) {
    const int tiles = 3;
    std::vector<uint8_t> packed(static_cast<size_t>(tiles) * 128 * bits);
    for (auto& byte : packed)
      byte = static_cast<uint8_t>(uniform(0, 255));
    std::vector<int8_t> want(tiles * formats::kTileBytes), got(want.size());
    formats::unpack_tiles_scalar(packed.data(), bits, tiles, want.data());
    for (const cpu::KernelRow* row : cpu::kernel_rows()) {
      if (!isa_supported(row->isa)) continue;
      const check::Family family(row->name);
      const check::About about(
          [&] { return text_of(*row) + ", " + std::to_string(bits) + " bits"; });
      row->unpack_tiles(packed.data(), bits, tiles, got.data());
      CHECK(got == want);
      std::fill(got.begin(), got.end(), int8_t{0});
      cpu::unpacker (*row)(packed.data(), bits, tiles, got.data());
      CHECK(got == want);
    }
  }
}

TEST(bitmask_tiles) {
  for (int bits = 2; bits <= 8; ++bits)
    for (const int zeros : {0, 30, 80, 100}) {
      const int tiles = 5;
      const int low = -(1 << (bits - 1)), high = (1 << (bits - 1)) - 1;
      std::vector<int8_t> want(tiles * formats::kTileBytes), got(want.size());
      for (auto& w : want)
        w = static_cast<int8_t>(uniform(1, 100) <= zeros ? 0 : uniform(low, high));
      int64_t bytes = 0;
      for (int t = 0; t < tiles; ++t)
        bytes += formats::bitmask_tile_bytes(want.data() + t * formats::kTileBytes, bits);
      const Exact<uint8_t> packed(static_cast<size_t>(bytes + formats::kBitmaskSlack));
      uint8_t* at = packed.data();
      for (int t = 0; t < tiles; ++t)
        at += formats::pack_bitmask_tile(want.data() + t * formats::kTileBytes, bits, at);
      CHECK_EQ(at - packed.data(), bytes);
      formats::expand_tiles_scalar(packed.data(), bits, tiles, got.data());
      CHECK(got == want);
      for (const cpu::KernelRow* row : cpu::kernel_rows()) {
        if (!isa_supported(row->isa)) continue;
        const check::Family family(row->name);
        const cpu::UnpackTiles expand = cpu::bitmask_kernels(*row).expand;
        if (expand == nullptr) continue;
        const check::About about([&] {
          return text_of(*row) + ", " + std::to_string(bits) + " bits, " + std::to_string(zeros) +
                 " % zeros";
        });
        std::fill(got.begin(), got.end(), int8_t{0});
        expand(packed.data(), bits, tiles, got.data());
        CHECK(got == want);
      }
    }
}

// How weights and levels are filled: the extremes are where int16 sums would overflow.
enum class Fill { Random, Small, Bell, Low, High, Mixed };
constexpr Fill kFills[] = {Fill::Random, Fill::Small, Fill::Bell,
                           Fill::Low,    Fill::High,  Fill::Mixed};
constexpr int kFillCount = static_cast<int>(std::size(kFills));

int fill_value(Fill fill, int low, int high) {
  switch (fill) {
    case Fill::Low:
      return low;
    case Fill::High:
      return high;
    case Fill::Mixed:
      return uniform(0, 1) == 0 ? low : high;
    case Fill::Small:  // most near the middle, some at the ends
      return uniform(0, 19) == 0 ? uniform(low, high)
                                 : std::clamp((low + high) / 2 + uniform(-9, 9), low, high);
    case Fill::Bell: {  // as in trained layers: some pairs of neighbours are beyond int16
      const double spread = (high - low) / 7.0;
      const double value = std::normal_distribution<double>((low + high) / 2.0, spread)(rng);
      return std::clamp(static_cast<int>(std::lround(value)), low, high);
    }
    default:
      return uniform(low, high);
  }
}

/// Operands of one product of the kernel table, in memory of exactly the size that they may read.
/// Rows and steps lie anywhere.
struct Product {
  int bits, rows, steps, tiles, qmax;
  std::vector<int32_t> row_offsets;
  std::vector<int64_t> offsets;
  std::vector<uint8_t> live;
  std::vector<int8_t> weights;  // unpacked tiles [tiles][steps]
  std::vector<uint8_t> packed;  // the same
  std::optional<Exact<uint8_t>> levels;
  std::vector<int64_t> sums;  // [rows][columns]

  /// `whole`: all 64 bytes of a step are read, else just the live quads.
  Product(int width, int row_count, int step_count, int tile_count, Fill weight_fill,
          Fill level_fill, bool whole, int largest_level = 255)
      : bits(width), rows(row_count), steps(step_count), tiles(tile_count), qmax(largest_level) {
    for (int step = 0; step < steps; ++step) {
      live.push_back(static_cast<uint8_t>(uniform(0, 2) == 0 ? uniform(1, 16) : 16));
      offsets.push_back(uniform(0, 999));
    }
    for (int row = 0; row < rows; ++row)
      row_offsets.push_back(uniform(0, 4999));
    int64_t end = 0;
    for (int step = 0; step < steps; ++step)
      for (int row = 0; row < rows; ++row)
        end = std::max(end, row_offsets[row] + offsets[step] + (whole ? 64 : live[step] * 4));
    levels.emplace(static_cast<size_t>(end));
    for (size_t i = 0; i < levels->size(); ++i)
      (*levels)[i] = static_cast<uint8_t>(fill_value(level_fill, 0, qmax));
    // Weights of bytes that are not live are zero.
    const int low = -(1 << (bits - 1)), high = (1 << (bits - 1)) - 1;
    weights.resize(static_cast<size_t>(tiles * steps) * formats::kTileBytes, 0);
    packed.resize(static_cast<size_t>(tiles * steps * 128 * bits));
    for (int i = 0; i < tiles * steps; ++i) {
      int8_t* tile = weights.data() + i * formats::kTileBytes;
      for (int w = 0; w < live[i % steps] * 64; ++w)
        tile[w] = static_cast<int8_t>(fill_value(weight_fill, low, high));
      formats::pack_tile(tile, bits, packed.data() + i * 128 * bits);
    }
    add_up();
  }

  std::string text() const {
    return std::to_string(bits) + " bits, " + std::to_string(rows) + " rows, " +
           std::to_string(steps) + " steps, " + std::to_string(tiles) + " tiles, levels to " +
           std::to_string(qmax);
  }

  const int8_t* tile(int t) const { return weights.data() + t * steps * formats::kTileBytes; }

  int64_t want(int row, int column) const {
    return sums[static_cast<size_t>(row * tiles * 16 + column)];
  }

  /// Sums that every kernel has to give, from weights and levels.
  void add_up() {
    sums.assign(static_cast<size_t>(rows * tiles * 16), 0);
    for (int row = 0; row < rows; ++row)
      for (int t = 0; t < tiles; ++t)
        for (int s = 0; s < steps; ++s)
          for (int d = 0; d < live[s] * 4; ++d) {
            const int64_t level = (*levels)[static_cast<size_t>(row_offsets[row] + offsets[s] + d)];
            const int8_t* w = tile(t) + s * formats::kTileBytes + d / 4 * 64 + d % 4;
            int64_t* sum = sums.data() + (row * tiles + t) * 16;
            for (int column = 0; column < 16; ++column)
              sum[column] += level * w[column * 4];
          }
  }
};

/// The column tiles of a product as the row's gemm wants eight-bit weights.
Exact<int8_t> arranged(const cpu::TileArrangement& arrangement, const Product& p) {
  const int64_t bytes = p.steps * formats::kTileBytes;
  const int64_t pitch = bytes + arrangement.extra_bytes(p.steps);
  const Exact<uint8_t> scratch(static_cast<size_t>(arrangement.scratch_bytes(p.steps)));
  Exact<int8_t> tiles(static_cast<size_t>(p.tiles * pitch));
  for (int t = 0; t < p.tiles; ++t) {
    std::memcpy(tiles.data() + t * pitch, p.tile(t), static_cast<size_t>(bytes));
    arrangement.arrange(tiles.data() + t * pitch, p.steps, p.live.data(), p.qmax, scratch.data());
  }
  return tiles;
}

/// The row's products on their way to u8, in one call: every kind of epilogue in turn.
void check_gemm_requantize(const cpu::KernelRow& row, const Product& p, const cpu::GemmArgs& g) {
  static int turn = 0;
  const int kind = turn++;
  const bool with_residual = kind % 2 == 1, with_table = kind % 5 == 0, whole = kind % 3 != 0;
  const int cols = p.tiles * 16 - (kind % 3 == 2 ? 0 : uniform(0, 15));
  const int pitch = p.tiles * 16;
  cpu::ConvEpilogue e;
  std::vector<int32_t> correction;
  std::vector<float> scale, bias;
  for (int c = 0; c < cpu::epilogue_size(pitch); ++c) {
    correction.push_back(uniform(-100000, 100000));
    scale.push_back(static_cast<float>(uniform(1, 1000)) * 1e-6f);
    bias.push_back(static_cast<float>(uniform(-1000, 1000)) * 0.01f);
  }
  e.correction = correction.data();
  e.scale = scale.data();
  e.bias = bias.data();
  e.residual_scale = 0.37f;
  e.residual_zero = 17;
  e.bounded = kind % 4 < 2;
  uint8_t table[256];
  for (int i = 0; i < 256; ++i)
    table[i] = static_cast<uint8_t>(255 - i);
  e.finish = {-20.0f, 200.0f, 31, with_table ? table : nullptr, 0.83f};
  std::vector<int32_t> at;  // rows in any order
  for (int r = 0; r < p.rows; ++r)
    at.push_back((p.rows - 1 - r) * pitch);
  const auto bytes = static_cast<size_t>(p.rows * pitch);
  const Exact<uint8_t> out(bytes), residual(bytes);
  for (size_t i = 0; i < bytes; ++i) {
    out[i] = 99;
    residual[i] = static_cast<uint8_t>(uniform(0, 255));
  }
  cpu::RequantizeArgs q{};
  q.cols = cols;
  q.whole = whole;
  q.out_offset = at.data();
  q.out = out.data();
  if (with_residual) {
    q.residual_offset = at.data();
    q.residual = residual.data();
  }
  q.epilogue = &e;
  row.begin();
  row.gemm_requantize(g, q, cpu::requantizer(row));
  row.end();
  bool equal = true;
  for (int r = 0; r < p.rows; ++r)
    for (int c = 0; c < pitch; ++c) {
      const uint8_t got = out[static_cast<size_t>(at[r] + c)];
      if (c >= cols) {
        equal = equal && (whole || got == 99);
        continue;
      }
      float y = conv_value(static_cast<int32_t>(p.want(r, c)) + correction[c], scale[c], bias[c]);
      if (with_residual)
        y += dequantize_value(residual[static_cast<size_t>(at[r] + c)], e.residual_scale,
                              e.residual_zero);
      equal = equal && got == finish_u8(y, e.finish);
    }
  CHECK_MSG(equal, "requantized, epilogue " + std::to_string(kind));
}

void check_gemm(const cpu::KernelRow& row, const Product& p, const Exact<int8_t>* tiles) {
  const check::About about(
      [&] { return text_of(row) + ", " + p.text() + (tiles == nullptr ? "" : ", arranged"); });
  std::vector<int32_t> sums(static_cast<size_t>(p.rows) * cpu::kBlockCols, -1);
  cpu::GemmArgs g{};
  g.activations = p.levels->data();
  g.row_offsets = p.row_offsets.data();
  g.step_offsets = p.offsets.data();
  g.live_quads = p.live.data();
  g.steps = p.steps;
  g.tile0 = p.tile(0);
  g.tile1 = p.tiles == 2 ? p.tile(1) : nullptr;
  g.weight_bits = cpu::product_bits(row, p.bits, p.qmax);
  if (tiles != nullptr) {
    g.arranged = true;
    g.tile0 = tiles->data();
    if (p.tiles == 2) g.tile1 = g.tile0 + tiles->size() / 2;
  }
  g.rows = p.rows;
  g.sums = sums.data();
  row.begin();
  row.gemm(g);
  row.end();
  bool equal = true;
  for (int r = 0; r < p.rows; ++r)
    for (int c = 0; c < p.tiles * 16; ++c)
      equal = equal && sums[static_cast<size_t>(r * cpu::kBlockCols + c)] == p.want(r, c);
  CHECK(equal);
  if (row.gemm_requantize != nullptr) check_gemm_requantize(row, p, g);
}

/// In every form of the weights that the row takes.
void check_gemm(const cpu::KernelRow& row, const Product& p) {
  const check::Family family(row.name);
  if (row.arrangement == nullptr || cpu::product_bits(row, p.bits, p.qmax) < 8)
    check_gemm(row, p, nullptr);
  if (row.arrangement == nullptr) return;
  const Exact<int8_t> tiles = arranged(*row.arrangement, p);
  check_gemm(row, p, &tiles);
}

TEST(every_row_is_whole) {
  for (const cpu::KernelRow* row : cpu::kernel_rows()) {
    const check::About about([&] { return text_of(*row); });
    CHECK(row->quantize_row && row->quantize_planar && row->fake_quantize && row->unpack_tiles);
    CHECK(row->begin && row->end && row->gemm && row->gemv && row->store && row->requantize);
    CHECK(row->gemm_rows >= 1 && row->gemm_rows <= cpu::kGemmRows);
    const bool flattened = row->positions == cpu::Positions::Flattened;
    CHECK_EQ(row->block != nullptr, flattened);
    const cpu::StemKernels& s = row->stem;
    CHECK(!flattened || (s.quantize_quads && s.interleave_pairs && s.interleave_fours));
    CHECK(row->grouped->depthwise && row->grouped->in_lane && row->grouped->broadcast);
    const cpu::WinogradKernels& w = *row->winograd;
    CHECK(w.multiply && w.groups >= 1 && w.rows >= 1);
    for (int form = 0; form < kWinogradForms; ++form)
      CHECK(w.input[form] && w.output[form]);
    if (const cpu::WinogradByteKernels* b = row->winograd_bytes)
      CHECK(b->input && b->multiply && b->cell > 2 && b->rows % b->together == 0);
    const cpu::ImageKernels& i = *row->image;
    CHECK(i.copy && i.lookup && i.gather && i.add && i.mul && i.line);
    CHECK(i.max_window && i.average_window && i.bilinear && i.moments && i.normalize);
    CHECK(i.quantize_planar && i.quantize_pixels && i.dequantize_planar && i.dequantize_row);
    CHECK(i.blend_columns && i.blend_rows && i.fma_values && i.softmax && i.function && i.combine);
  }
}

/// The matrix product of every row of the table, alone: 1..64 rows, one and two column tiles.
TEST(gemm_of_every_row) {
  int i = 0;
  for (int bits = 2; bits <= 8; ++bits)
    for (int rows = 1; rows <= 64; ++rows) {
      const int steps = 1 + i % 7, tiles = 1 + i / 7 % 2;
      const Product p(bits, rows, steps, tiles, kFills[i % kFillCount],
                      kFills[i / kFillCount % kFillCount], false);
      ++i;
      for (const cpu::KernelRow* row : cpu::kernel_rows())
        if (isa_supported(row->isa)) check_gemm(*row, p);
    }
}

/// Long reductions and as many rows as the row of the table takes, with every pair of fills.
TEST(gemm_of_many_rows) {
  const int row_counts[] = {33, 49, 56, 101, cpu::kGemmRows}, step_counts[] = {16, 17, 35};
  int i = 0;
  for (int bits = 2; bits <= 8; ++bits)
    for (Fill weights : kFills)
      for (Fill levels : kFills) {
        const int rows = row_counts[i % kFillCount == 0 ? 4 : i % 4], steps = step_counts[i % 3];
        const Product p(bits, rows, steps, 1 + i / 3 % 2, weights, levels, false);
        ++i;
        for (const cpu::KernelRow* row : cpu::kernel_rows())
          if (isa_supported(row->isa) && rows <= row->gemm_rows) check_gemm(*row, p);
      }
}

/// Around the levels up to which two products, or eight, of the largest weights of either sign are
/// what an int16 just holds, and just does not.
TEST(gemm_of_every_largest_level) {
  int i = 0;
  for (const int qmax : {1, 15, 31, 32, 63, 64, 65, 85, 86, 126, 127, 128, 129, 130, 170, 254})
    for (Fill weights : kFills)
      for (Fill levels : {Fill::High, Fill::Mixed, Fill::Random}) {
        const Product p(i % 5 == 4 ? 7 : 8, 1 + i % 19, 1 + i % 11, 1 + i % 2, weights, levels,
                        false, qmax);
        ++i;
        for (const cpu::KernelRow* row : cpu::kernel_rows())
          if (isa_supported(row->isa)) check_gemm(*row, p);
      }
}

#ifdef ADALAYER_HAVE_AVX2
/// A column tile of equal weights, times the largest level.
Product equal_products(int qmax, int weight, int steps) {
  Product p(8, 9, steps, 1, Fill::Low, Fill::High, false, qmax);
  std::fill(p.live.begin(), p.live.end(), uint8_t{16});
  std::fill(p.weights.begin(), p.weights.end(), static_cast<int8_t>(weight));
  std::fill(p.row_offsets.begin(), p.row_offsets.end(), 0);
  std::fill(p.offsets.begin(), p.offsets.end(), 0);
  p.levels.emplace(size_t{64});
  std::fill_n(p.levels->data(), 64, static_cast<uint8_t>(qmax));
  p.add_up();
  return p;
}

/// The quads of a tile of equal weights, by how many of them int16 adds up.
TEST(largest_groups_that_int16_holds) {
  if (!isa_supported(Isa::Avx2)) return;
  using Table = cpu::ArrangedTable;
  struct Case {
    int qmax, weight;
    uint32_t Table::* kind;
  };
  const Case cases[] = {
      {255, 16, &Table::four},    {255, 17, &Table::paired},  {255, 32, &Table::paired},
      {255, 33, &Table::whole},   {255, 64, &Table::whole},   {255, 65, &Table::wide},
      {255, -16, &Table::four},   {255, -17, &Table::paired}, {255, -33, &Table::whole},
      {255, -64, &Table::whole},  {255, -65, &Table::wide},   {127, 32, &Table::four},
      {127, 33, &Table::paired},  {127, 64, &Table::paired},  {127, 65, &Table::whole},
      {127, 127, &Table::whole},  {127, -32, &Table::four},   {127, -33, &Table::paired},
      {127, -64, &Table::paired}, {127, -65, &Table::whole},  {127, -128, &Table::whole},
      {128, 31, &Table::four},    {128, 32, &Table::paired},  {128, 127, &Table::whole},
      {128, -32, &Table::four},   {128, -128, &Table::whole},  // -32768 is held, 32768 is not
      {129, 127, &Table::whole},  {129, -127, &Table::whole}, {129, -128, &Table::wide},
      {130, 126, &Table::whole},  {130, 127, &Table::wide},   {63, 127, &Table::paired},
      {64, -128, &Table::paired}, {65, -128, &Table::whole},  {31, 127, &Table::four},
      {32, -128, &Table::four},   {33, -128, &Table::paired}, {1, -128, &Table::four}};
  for (const Case& c : cases) {
    const Product p = equal_products(c.qmax, c.weight, 3);
    const Exact<int8_t> tiles = arranged(cpu::kAvx2Arrangement, p);
    for (int half = 0; half < 2; ++half)
      CHECK_MSG(cpu::arranged_table(tiles.data(), p.steps, half).*c.kind == 48,
                "levels to " + std::to_string(c.qmax) + ", weights " + std::to_string(c.weight));
    check_gemm(cpu::kAvx2Row, p, &tiles);
  }
}

/// Few steps are multiplied in bytes where int16 holds every pair, else in 16 bits.
TEST(forms_of_few_steps) {
  if (!isa_supported(Isa::Avx2)) return;
  struct Case {
    int qmax, weight;
    cpu::ShortForm form;
  };
  for (const Case& c :
       {Case{255, 64, cpu::ShortForm::Bytes}, Case{255, 65, cpu::ShortForm::Words},
        Case{128, -128, cpu::ShortForm::Bytes}, Case{129, 127, cpu::ShortForm::Bytes},
        Case{129, -128, cpu::ShortForm::Words}, Case{130, 127, cpu::ShortForm::Words}})
    for (const int steps : {1, 2}) {
      const Product p = equal_products(c.qmax, c.weight, steps);
      const check::About about([&] {
        return "levels to " + std::to_string(c.qmax) + ", weights of " + std::to_string(c.weight) +
               ", " + std::to_string(steps) + " steps";
      });
      const Exact<int8_t> tiles = arranged(cpu::kAvx2Arrangement, p);
      CHECK(cpu::arranged_table(tiles.data(), steps, 0).short_form == c.form);
      check_gemm(cpu::kAvx2Row, p, &tiles);
    }
}
#endif

/// The matrix-vector product of every row of the table, and what the machine has in place of it.
TEST(gemv_of_every_row) {
  int i = 0;
  for (int bits = 2; bits <= 8; ++bits)
    for (int rows = 1; rows <= cpu::kGemvRows; ++rows)
      for (int steps : {1, 2, 5, 9}) {
        const int tiles = uniform(1, 4);
        const int qmax = bits == 8 && i % 2 == 1 ? 63 : 255;
        const Product p(bits, rows, steps, tiles, kFills[i % kFillCount],
                        kFills[i / kFillCount % kFillCount], true, qmax);
        ++i;
        for (const cpu::KernelRow* row : cpu::kernel_rows()) {
          const bool is_arranged = row->arrangement != nullptr && bits == 8 && qmax == 255;
          if (!isa_supported(row->isa) || is_arranged) continue;
          const check::Family family(row->name);
          for (const cpu::Gemv gemv : {row->gemv, cpu::gemv(*row)}) {
            const int64_t stride = tiles * 16 + uniform(0, 9);
            const Exact<int32_t> sums(static_cast<size_t>((rows - 1) * stride + tiles * 16));
            const auto packed = Exact<uint8_t>::of(p.packed);
            cpu::GemvArgs g{};
            for (int r = 0; r < rows; ++r)
              g.activations[r] = p.levels->data() + p.row_offsets[r];
            g.step_offsets = p.offsets.data();
            g.steps = steps;
            g.packed = packed.data();
            g.bits = bits;
            g.rows = rows;
            g.column_tiles = tiles;
            g.sums = sums.data();
            g.sums_stride = stride;
            gemv(g);
            const check::About about([&] { return text_of(*row) + ", " + p.text(); });
            bool equal = true;
            for (int r = 0; r < rows; ++r)
              for (int c = 0; c < tiles * 16; ++c)
                equal = equal && sums[static_cast<size_t>(r * stride + c)] == p.want(r, c);
            CHECK(equal);
          }
        }
      }
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

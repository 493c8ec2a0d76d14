// The executor of csrc/engine against the interpreter, whole programs on every instruction set:
// what a kernel needs between nodes (AMX its tile configuration, on every thread) shows here.
#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "cpu/conv/policy.hpp"
#include "engine/engine.hpp"
#include "engine/interpret.hpp"
#include "engine/layouts.hpp"
#include "engine_programs.hpp"
#include "seed.hpp"

using namespace programs;

namespace {

std::mt19937 g_random(check::seed(11));

int pick(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(g_random); }

struct Layer {
  int64_t out_channels = 1, kernel = 3, stride = 1, groups = 1;
  ValueKind kind = ValueKind::U8;
  int32_t residual = -1;  // value to add
};

/// A convolution of value x with random weights, whose results spread over the u8 range.
int32_t add_conv(Builder& b, int32_t x, const Layer& l) {
  const Value in = b.p.values[static_cast<size_t>(x)];
  const int64_t pad = l.kernel / 2, group_in = in.c / l.groups;
  const int64_t reduction = group_in * l.kernel * l.kernel;
  const int bits = pick(2, 8), half = 1 << (bits - 1);
  std::vector<int8_t> w(static_cast<size_t>(l.out_channels * reduction));
  for (auto& v : w)
    v = static_cast<int8_t>(pick(-half, half - 1));
  const auto side = static_cast<uint32_t>(l.kernel);
  const auto packed = formats::pack_canonical(w, bits, static_cast<uint32_t>(l.out_channels),
                                              static_cast<uint32_t>(group_in), side, side);
  std::vector<float> scale(static_cast<size_t>(l.out_channels)), bias(scale.size());
  for (size_t o = 0; o < scale.size(); ++o) {
    scale[o] = static_cast<float>(pick(50, 150)) * 0.015f * kScale /
               (std::sqrt(static_cast<float>(reduction)) * static_cast<float>(half));
    bias[o] = static_cast<float>(pick(40, 140)) * kScale;
  }
  const auto size = [&](int64_t n) { return (n + 2 * pad - l.kernel) / l.stride + 1; };
  const auto y = b.value(std::string("y") + std::to_string(b.p.nodes.size()), l.out_channels,
                         size(in.h), size(in.w), l.kind);
  std::vector<int32_t> inputs{x};
  if (l.residual >= 0) inputs.push_back(l.residual);
  const bool u8 = l.kind == ValueKind::U8;
  return b.node(OpKind::Conv, inputs, y,
                {l.kernel, l.kernel, l.stride, l.stride, pad, pad, pad, pad, 1, 1, l.groups, 0, 255,
                 u8 ? 10 : 0},
                {kInverse, -1e30f, 1e30f},
                {b.constant(ConstantKind::Weights, packed), b.floats(scale), b.floats(bias), -1});
}

/// A chain of convolutions, one with a residual, one in groups, down to float images and a
/// float vector.
Program network() {
  Builder b;
  const auto x = b.value("image", pick(1, 8), pick(4, 14), pick(4, 14), ValueKind::F32);
  const Value image = b.p.values[0];
  auto y = b.node(OpKind::Quantize, {x}, b.value("levels", image.c, image.h, image.w));
  y = add_conv(b, y, {.out_channels = pick(1, 40), .stride = pick(1, 2)});
  const int64_t middle = 16 * pick(2, 8);
  const auto wide = add_conv(b, y, {.out_channels = middle, .kernel = 2 * pick(0, 1) + 1});
  y = add_conv(b, wide, {.out_channels = pick(8, 70), .kernel = 1});
  y = add_conv(b, y, {.out_channels = middle, .residual = wide});
  // Groups of 16 channels: a matmul where there is AMX, kernels of their own elsewhere.
  y = add_conv(b, y, {.out_channels = middle, .groups = middle / 16});
  const auto each = add_conv(b, y,
                             {.out_channels = middle,
                              .stride = pick(1, 2),
                              .groups = pick(0, 1) == 1 ? middle : middle / 16,
                              .kind = ValueKind::F32});
  y = add_conv(b, y, {.out_channels = pick(1, 50), .stride = 2, .kind = ValueKind::F32});
  const Value v = b.p.values[static_cast<size_t>(y)];
  const auto mean = b.node(OpKind::AdaptiveAvgPool, {y}, b.value("mean", v.c, 1, 1, v.kind),
                           {0, 255, 0}, {1.0f, 1.0f}, {-1});
  b.p.inputs = {x};
  b.p.outputs = {y, mean, each};
  return b.p;
}

/// Concatenations whose pieces are convolutions, transposed ones, other concatenations and what has
/// to be copied: levels behind a table, a value with another reader, odd numbers of channels. They
/// are read with padding.
Program joined() {
  Builder b;
  const auto x = b.value("image", pick(1, 8), pick(3, 9), pick(3, 9), ValueKind::F32);
  const Value image = b.p.values[0];
  const int64_t h = image.h, w = image.w;
  const auto y = b.node(OpKind::Quantize, {x}, b.value("levels", image.c, h, w));
  const auto piece = [&](int64_t channels) {
    return add_conv(b, y, {.out_channels = channels, .kernel = 2 * pick(0, 1) + 1});
  };
  const auto channels_of = [&](int32_t v) { return b.p.values[static_cast<size_t>(v)].c; };
  const auto join = [&](const char* name, const std::vector<int32_t>& pieces,
                        std::vector<int32_t> tables) {
    int64_t channels = 0;
    for (const int32_t v : pieces)
      channels += channels_of(v);
    tables.resize(pieces.size(), -1);
    return b.node(OpKind::Concat, pieces, b.value(name, channels, h, w), {}, {}, tables);
  };
  const auto shared = piece(16 * pick(1, 3));
  std::vector<float> scale(32, 0.02f), bias(32, 90 * kScale);
  const auto transposed =
      b.node(OpKind::ConvTranspose, {shared}, b.value("transposed", 32, h, w),
             {3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 255, 10}, {kInverse, -1e30f, 1e30f},
             {b.weights(32, static_cast<uint32_t>(channels_of(shared)), 3, 3, pick(2, 8)),
              b.floats(scale), b.floats(bias), -1});
  const auto inner = join("inner", {piece(16), piece(16 * pick(1, 5)), shared}, {});
  std::vector<int32_t> pieces = {inner, transposed, piece(pick(1, 40)), piece(32), piece(16)};
  std::shuffle(pieces.begin(), pieces.end(), g_random);
  const auto outer = join("outer", pieces, {-1, -1, pick(0, 1) == 0 ? b.table(3) : -1});
  const auto strided = add_conv(b, outer, {.out_channels = 8, .stride = 2});
  const auto last = add_conv(b, outer, {.out_channels = 5, .kind = ValueKind::F32});
  const auto more = add_conv(b, strided, {.out_channels = 3, .kind = ValueKind::F32});
  b.p.inputs = {x};
  b.p.outputs = {last, more};
  return b.p;
}

std::vector<std::vector<float>> noise(const Program& p, int64_t batch) {
  return input_noise(p, batch, [] { return static_cast<float>(pick(-20, 140)); });
}

void check_program(const Program& p, int64_t batch) {
  const auto images = noise(p, batch);
  std::vector<InputTensor> inputs;
  for (const auto& image : images)
    inputs.push_back({image.data(), Layout::NCHW});
  const auto want = interpret(p, inputs, batch);
  // All-equal outputs would be right whatever was multiplied.
  CHECK(std::set<float>(want[0].begin(), want[0].end()).size() > 1);
  for (const Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    const check::Family family(isa_name(isa));
    constexpr const char* kWinograd[] = {"auto", "off", "4x4", "2x2"};
    cpu::set_winograd_policy(kWinograd[pick(0, 3)]);
    // Images one by one or together; tensors that seem to fit into the cache or not.
    const EngineOptions options{.chunk = pick(0, 2),
                                .cache_bytes = pick(0, 1) * 2000,
                                .weights = static_cast<WeightForm>(pick(0, 2)),
                                .threads = pick(1, 2)};
    const Engine engine(p, options);
    for (const int threads : {1, 2, 3}) {
      std::vector<std::vector<float>> got;
      std::vector<float*> outputs;
      for (const auto& y : want)
        outputs.push_back(got.emplace_back(y.size(), NAN).data());
      engine.run(inputs, batch, outputs, threads);
      CHECK_MSG(got == want, std::string(isa_name(isa)) + ", batch " + std::to_string(batch) +
                                 ", threads " + std::to_string(threads) + ", chunk " +
                                 std::to_string(options.chunk));
    }
  }
  force_isa("auto");
  cpu::set_winograd_policy("auto");
}

}  // namespace

TEST(every_operation_is_bit_equal_to_the_interpreter) {
  Program p = every_operation();
  // Behind the softmax, which the interpreter computes in double.
  p.outputs.erase(p.outputs.begin());
  for (const int64_t batch : {1, 2, 5})
    check_program(p, batch);
}

TEST(concatenations_are_bit_equal_to_the_interpreter) {
  for (int round = 0; round < 8; ++round)
    check_program(joined(), pick(1, 4));
}

TEST(convolutions_write_pieces_of_concatenations_in_place) {
  Builder b;
  const auto x = b.value("image", 3, 6, 6, ValueKind::F32);
  const auto y = b.node(OpKind::Quantize, {x}, b.value("levels", 3, 6, 6));
  const auto conv = [&](int64_t channels) { return add_conv(b, y, {.out_channels = channels}); };
  const int32_t a = conv(32), c = conv(16), odd = conv(20), d = conv(16), shared = conv(16),
                tabled = conv(16), grouped = add_conv(b, d, {.out_channels = 16, .groups = 16});
  const auto join = [&](std::vector<int32_t> pieces, int64_t channels,
                        std::vector<int32_t> tables) {
    return b.node(OpKind::Concat, std::move(pieces), b.value("joined", channels, 6, 6), {}, {},
                  std::move(tables));
  };
  const int32_t inner = join({a, c}, 48, {-1, -1});
  const int32_t outer =
      join({grouped, inner, tabled, shared, odd}, 116, {-1, -1, b.table(3), -1, -1});
  const int32_t last = add_conv(b, outer, {.out_channels = 2, .kind = ValueKind::F32});
  const int32_t other = add_conv(b, shared, {.out_channels = 2, .kind = ValueKind::F32});
  b.p.inputs = {x};
  b.p.outputs = {last, other};
  const std::vector<ValueLayout> layouts = plan_layouts(b.p);
  const auto at = [&](int32_t v) { return layouts[static_cast<size_t>(v)]; };
  for (const auto& [v, channel] : {std::pair{inner, 16}, {a, 16}, {c, 48}}) {
    CHECK_EQ(at(v).holder, outer);
    CHECK_EQ(at(v).channel, channel);
    CHECK_EQ(at(v).layout.pitch, at(outer).layout.pitch);
  }
  for (const int32_t v : {odd, d, shared, tabled, grouped, outer})
    CHECK(!at(v).in_place());
}

TEST(strides_wider_than_the_image) {
  // The tile unit loads sixteen positions, whatever lies where the others would be.
  for (const int64_t stride : {int64_t{17}, int64_t{1} << 16, int64_t{1} << 20}) {
    Builder b;
    const auto x = b.value("image", 2, 1, 1, ValueKind::F32);
    const auto y = b.node(OpKind::Quantize, {x}, b.value("levels", 2, 1, 1));
    const auto z = b.value("rows", 9, 5, 1, ValueKind::F32);
    b.node(OpKind::Conv, {y}, z, {1, 1, 1, stride, 0, 0, 4, 0, 1, 1, 1, 0, 255, 0},
           {kInverse, -1e30f, 1e30f},
           {b.weights(9, 2, 1, 1, 6), b.floats(std::vector<float>(9, 0.01f)),
            b.floats(std::vector<float>(9, 0.5f)), -1});
    b.p.inputs = {x};
    b.p.outputs = {z};
    check_program(b.p, 2);
  }
}

TEST(tokens_are_bit_equal_to_the_interpreter) {
  for (const int64_t batch : {1, 2, 5})
    check_program(token_program(), batch);
}

TEST(floats_are_bit_equal_to_the_interpreter) {
  for (const int64_t batch : {1, 2, 5}) {
    check_program(float_program(), batch);
    check_program(reduced_program(), batch);
  }
}

TEST(recurrent_layers_are_bit_equal_to_the_interpreter) {
  // Around a tile of 64 units and of 16 outputs, a register, and the steps that are side by side.
  for (const int hidden : {1, 3, 16, 63, 64, 65, 130})
    for (const int64_t steps : {1, 2, 16, 17})
      for (const int bits : {2, 4, 8}) {
        if (hidden > 64 && (steps == 2 || bits == 2)) continue;
        check_program(recurrent_program(hidden, steps, bits), steps == 2 ? 9 : 1);
      }
  check_program(recurrent_program(), 5);
}

TEST(weight_groups_are_bit_equal_to_the_interpreter) {
  // Around a group, a tile of 64 inputs and of 16 outputs, and rows that share a pass.
  for (const int64_t inputs : {5, 32, 33, 64, 130})
    for (const int64_t positions : {1, 4, 5, 130})
      for (const int bits : {2, 4, 8}) {
        const int64_t group = inputs == 130 ? (bits == 4 ? 128 : 64) : 32;
        if (positions > 5 && inputs != 33 && bits != 4) continue;
        check_program(grouped_program(inputs, inputs / 2 + 1, positions, bits, group),
                      positions == 4 ? 3 : 1);
      }
  check_program(grouped_program(96, 70, 1), 20);
}

TEST(convolutions_are_bit_equal_to_the_interpreter) {
  for (int i = 0; i < 8; ++i) {
    const Program p = network();
    for (const int64_t batch : {1, 2, 5})
      check_program(p, batch);
  }
}

TEST(float_output_beside_a_reader_of_stride_2) {
  // Two columns of four are outputs, and two rows make a run: the tile unit's positions 0, 1, -, -,
  // 4, 5 end where six neighbours would.
  for (const int64_t w : {2, 3, 9}) {
    Builder b;
    const auto x = b.value("image", 32, 5, w, ValueKind::F32);
    auto y = b.node(OpKind::Quantize, {x}, b.value("levels", 32, 5, w));
    y = add_conv(b, y, {.out_channels = 32, .kernel = 1});
    const auto each = add_conv(b, y, {.out_channels = 32, .kind = ValueKind::F32});
    y = add_conv(b, y, {.out_channels = 32, .stride = 2, .kind = ValueKind::F32});
    b.p.inputs = {x};
    b.p.outputs = {each, y};
    check_program(b.p, 2);
  }
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

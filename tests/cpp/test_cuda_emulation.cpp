// CUDA programs on a GPU in software: packing, plans, and every kernel against the interpreter.
#include <cstring>
#include <random>

#include "check.hpp"
#include "cuda_emulation.hpp"
//
#include "cuda/linear_kernel.cuh"
#include "cuda/linear_plan.hpp"
#include "cuda/packing.hpp"
#include "cuda/plan.hpp"
#include "cuda_cases.hpp"
#include "engine/interpret.hpp"

using namespace adalayer;
using namespace cuda_cases;
namespace cuda = adalayer::cuda;

namespace {

Floats interpreted(const Program& p, const Floats& inputs, int64_t batch) {
  std::vector<InputTensor> tensors;
  for (const auto& x : inputs)
    tensors.push_back({x.data(), Layout::NCHW});
  return interpret(p, tensors, batch);
}

/// Memory with room in front and behind that must stay as it is.
class Guarded {
 public:
  Guarded(size_t bytes, uint8_t fill) : bytes_(bytes), memory_(bytes + 2 * kRoom, 0x5A) {
    std::memset(data(), fill, bytes);
  }
  uint8_t* data() {
    return memory_.data() + kRoom +
           (256 - (reinterpret_cast<uintptr_t>(memory_.data()) + kRoom) % 256) % 256 - 256;
  }
  bool intact() {
    for (uint8_t* p = memory_.data(); p < data(); ++p)
      if (*p != 0x5A) return false;
    for (uint8_t* p = data() + bytes_; p < memory_.data() + memory_.size(); ++p)
      if (*p != 0x5A) return false;
    return true;
  }

 private:
  static constexpr size_t kRoom = 4096;
  size_t bytes_;
  std::vector<uint8_t> memory_;
};

/// One choice of each form that there is, the one of this number among them.
std::vector<cuda::Choice> of_every_form(const cuda::Product& product, const cuda::Machine& machine,
                                        size_t number) {
  std::vector<cuda::Choice> found;
  for (int form = 0; form < cuda::kForms; ++form) {
    std::vector<cuda::Choice> all;
    for (const cuda::Choice& c : cuda::choices(product, machine))
      if (static_cast<int>(c.form) == form) all.push_back(c);
    if (!all.empty()) found.push_back(all[number % all.size()]);
  }
  return found;
}

/// Runs a program as the CUDA engine would. choice: all products use the choice of this number, as
/// far as they have so many; -1: the expected one.
Floats run(const Program& p, const Floats& inputs, int64_t batch, uint64_t seed = 1,
           int choice = -1, const std::vector<bool>& nhwc = {}) {
  cuda::emulation::seed(seed);
  const cuda::Model model(p, {});
  std::vector<cuda::Choice> chosen;
  const cuda::LaunchPlan sizes = cuda::make_plan(model, batch, {});
  for (const cuda::Product& product : sizes.products) {
    const auto all = cuda::choices(product, model.machine());
    CHECK(!all.empty());
    if (choice >= 0) chosen.push_back(all[static_cast<size_t>(choice) % all.size()]);
  }
  const cuda::LaunchPlan asked = cuda::make_plan(model, batch, {}, chosen);
  Guarded image(model.image().size(), 0), arena(static_cast<size_t>(asked.arena_bytes), 0xCD),
      scratch(static_cast<size_t>(asked.scratch_bytes), 0);
  std::memcpy(image.data(), model.image().data(), model.image().size());
  cuda::LaunchPlan plan =
      cuda::make_plan(model, batch, {image.data(), arena.data(), scratch.data()}, chosen);
  Floats outputs;
  for (const int32_t v : p.outputs)
    outputs.emplace_back(
        static_cast<size_t>(batch * p.values[v].c * p.values[v].h * p.values[v].w));
  for (cuda::Launch& l : plan.launches) {
    for (const auto& port : l.ports) {
      const float* at = port.is_output ? outputs[port.number].data() : inputs[port.number].data();
      std::memcpy(l.params + port.offset, &at, sizeof at);
    }
    if (l.nhwc_input >= 0 && !nhwc.empty() && nhwc[l.nhwc_input]) {
      const int32_t yes = 1;
      std::memcpy(l.params + offsetof(cuda::QuantizeParams, nhwc), &yes, sizeof yes);
    }
    cuda::emulation::run(l.kernel.function, l.grid, l.kernel.threads, l.kernel.shared_bytes,
                         l.params);
  }
  CHECK(image.intact() && arena.intact() && scratch.intact());
  CHECK(std::memcmp(image.data(), model.image().data(), model.image().size()) == 0);
  for (int64_t i = 0; i < plan.scratch_bytes; ++i)
    if (scratch.data()[i] != 0) {
      CHECK_EQ(i, -1);  // a launch left sums behind
      break;
    }
  return outputs;
}

bool same(const Floats& a, const Floats& b) {
  if (a.size() != b.size()) return false;
  for (size_t k = 0; k < a.size(); ++k)
    if (a[k].size() != b[k].size() ||
        std::memcmp(a[k].data(), b[k].data(), a[k].size() * sizeof(float)) != 0)
      return false;
  return true;
}

void check_runs(const std::vector<Run>& runs) {
  uint32_t seed = 0;
  for (const Run& r : runs) {
    const Program p = program_of(r.conv, ++seed);
    const Floats inputs = noise(p, r.batch, seed);
    const bool equal =
        same(run(p, inputs, r.batch, seed, r.choice), interpreted(p, inputs, r.batch));
    check::report(equal, __FILE__, __LINE__, show(r.conv, r.batch, r.choice));
  }
}

}  // namespace

TEST(unpacking_gives_the_packed_weights) {
  // Every field comes out of the place that field_place() names.
  std::mt19937 random(3);
  const auto each = [&](auto bits_tag) {
    constexpr int kBits = decltype(bits_tag)::value;
    std::vector<uint8_t> cell(cuda::kCellBytesPerBit * kBits);
    for (uint8_t& byte : cell)
      byte = static_cast<uint8_t>(random());
    for (int lane = 0; lane < 32; ++lane)
      for (int h = 0; h < 2; ++h) {
        using U = cuda::Unpack<kBits>;
        uint32_t wide[4] = {}, two = 0, one = 0, out[4];
        if (U::kEight) std::memcpy(wide, cell.data() + h * 512 + lane * 16, 16);
        if (U::kFour) std::memcpy(wide, cell.data() + h * 256 + lane * 8, 8);
        if (U::kTwo)
          std::memcpy(&two, cell.data() + cuda::plane_offset(kBits, 2) + h * 128 + lane * 4, 4);
        if (U::kOne) std::memcpy(&one, cell.data() + cuda::plane_offset(kBits, 1) + lane * 4, 4);
        U::half(h, wide, two, one, out);
        for (int r = 0; r < 4; ++r)
          for (int i = 0; i < 4; ++i) {
            uint32_t expected = 0;
            int left = kBits, top = 8;
            for (const int plane : {8, 4, 2, 1}) {
              if (left < plane) continue;
              const auto at = cuda::field_place(kBits, plane, lane, h, r, i);
              expected |= ((cell[at.byte] >> at.bit) & ((1u << plane) - 1)) << (top - plane);
              top -= plane;
              left -= plane;
            }
            CHECK_EQ((out[r] >> (8 * i)) & 0xFF, expected);
          }
      }
  };
  each(std::integral_constant<int, 2>{});
  each(std::integral_constant<int, 3>{});
  each(std::integral_constant<int, 4>{});
  each(std::integral_constant<int, 5>{});
  each(std::integral_constant<int, 6>{});
  each(std::integral_constant<int, 7>{});
  each(std::integral_constant<int, 8>{});
}

TEST(lanes_own_neighbouring_channels) {
  for (const int cells : {1, 2, 4}) {
    std::vector<int> owner(static_cast<size_t>(cells) * 16, -1);
    for (int cell = 0; cell < cells; ++cell)
      for (int row = 0; row < 16; ++row)
        owner[cuda::block_channel(cells, cell, row)] = row % 8;
    for (int c = 0; c < cells * 16; ++c)
      CHECK_EQ(owner[c], c / (2 * cells));
  }
}

TEST(every_width_of_weights) { check_runs(every_width()); }
TEST(every_choice_of_tile_and_splits) { check_runs(every_choice({3, 8})); }
TEST(products_of_four_warps) {
  const ConvCase shapes[] = {
      {.c = 80, .h = 9, .w = 17, .o = 72, .residual = true},                    // tails everywhere
      {.c = 144, .h = 6, .w = 7, .o = 200, .pt = 0, .pl = 0, .extreme = true},  // cells of 4 and 8
      {.c = 16, .h = 20, .w = 20, .o = 17, .sh = 2, .sw = 2, .to_float = true},
      {.c = 64, .h = 5, .w = 5, .o = 16, .kh = 1, .kw = 1, .pt = 0, .pl = 0, .pb = 0, .pr = 0},
  };
  uint32_t seed = 0;
  for (ConvCase k : shapes)
    for (const int bits : {2, 3, 4, 7, 8}) {
      k.bits = bits;
      const Program p = program_of(k, ++seed);
      const cuda::Model model(p, {});
      const cuda::LaunchPlan sizes = cuda::make_plan(model, 2, {});
      const auto all = cuda::choices(sizes.products.at(0), model.machine());
      const Floats inputs = noise(p, 2, seed);
      const Floats expected = interpreted(p, inputs, 2);
      int tried = 0;
      for (int number = 0; number < static_cast<int>(all.size()); ++number) {
        const cuda::Choice& c = all[static_cast<size_t>(number)];
        if (!cuda::shape_of(c.tile).group || c.splits > 4) continue;
        ++tried;
        check::report(same(run(p, inputs, 2, seed, number), expected), __FILE__, __LINE__,
                      show(k, 2, number));
      }
      CHECK(tried >= 2);
      cuda::Machine other;
      other.group_products = false;
      for (const cuda::Choice& c : cuda::choices(sizes.products.at(0), other))
        CHECK(!cuda::shape_of(c.tile).group);
    }
}
TEST(sparse_weights_in_every_form) {
  uint32_t seed = 0;
  int ran[cuda::kForms] = {};
  for (const Run& r : sparse_weights({2, 3, 4, 5, 6, 7, 8})) {
    const Program p = program_of(r.conv, ++seed);
    const Floats inputs = noise(p, r.batch, seed), expected = interpreted(p, inputs, r.batch);
    const cuda::Model model(p, {});
    const cuda::Product product = cuda::make_plan(model, r.batch, {}).products.at(0);
    const auto all = cuda::choices(product, {});
    for (const cuda::Choice& choice : of_every_form(product, {}, seed)) {
      // (run() takes a choice by its number.)
      const auto number = std::find(all.begin(), all.end(), choice) - all.begin();
      const bool equal = same(run(p, inputs, r.batch, seed, static_cast<int>(number)), expected);
      check::report(equal, __FILE__, __LINE__,
                    show(r.conv, r.batch, static_cast<int>(number)) + ", form " +
                        std::to_string(static_cast<int>(choice.form)));
      ++ran[static_cast<int>(choice.form)];
    }
  }
  CHECK_EQ(ran[0], 35);
  CHECK(ran[1] >= 28);  // all but 2:4 without blocks
  CHECK_EQ(ran[2], 21);
}

TEST(every_choice_of_sparse_weights) {
  for (const Zeros zeros : {Zeros::Blocks32, Zeros::Both}) {
    const ConvCase k{.c = 128, .h = 3, .w = 3, .o = 130, .bits = 4, .zeros = zeros};
    const Program p = program_of(k, 5);
    const Floats inputs = noise(p, 1, 5), expected = interpreted(p, inputs, 1);
    const cuda::Model model(p, {});
    const auto all = cuda::choices(cuda::make_plan(model, 1, {}).products.at(0), {});
    for (size_t c = 0; c < all.size(); ++c) {
      if (all[c].form == cuda::Form::Dense) continue;
      const bool equal = same(run(p, inputs, 1, 5, static_cast<int>(c)), expected);
      check::report(equal, __FILE__, __LINE__, show(k, 1, static_cast<int>(c)));
    }
  }
}

TEST(empty_cells_are_not_stored) {
  // 3 of 4 blocks of 32 channels are empty; 2:4 keeps half of the bytes and their places.
  const ConvCase dense{.c = 128, .h = 3, .w = 3, .o = 128, .bits = 8};
  ConvCase blocks = dense, fours = dense, none = dense;
  blocks.zeros = Zeros::Blocks32;
  fours.zeros = Zeros::TwoOfFour;
  none.zeros = Zeros::All;
  const auto bytes = [](const ConvCase& k) {
    return cuda::Model(program_of(k, 1), {}).weight_bytes();
  };
  const int64_t whole = 128 * 128 * 9;
  CHECK_EQ(bytes(dense), whole);
  const double kept = static_cast<double>(bytes(blocks) - whole) / static_cast<double>(whole);
  check::report(kept > 0.2 && kept < 0.4, __FILE__, __LINE__, std::to_string(kept));
  CHECK_EQ(bytes(fours), whole + whole / 2 + whole / 8);
  CHECK_EQ(bytes(none), bytes(fours));
}

TEST(tiles_that_overflow) { check_runs(overflowing_tiles()); }
TEST(images_of_few_channels) { check_runs(few_input_channels()); }
TEST(random_shapes) { check_runs(random_convolutions(110, 11)); }
TEST(large_kernels) { check_runs(unusual_kernels()); }

TEST(every_operation_of_a_program) {
  const Program p = programs::every_operation();
  for (const int64_t batch : {1, 3}) {
    const Floats inputs = noise(p, batch, 7);
    const Floats got = run(p, inputs, batch), expected = interpreted(p, inputs, batch);
    CHECK_EQ(got.size(), expected.size());
    for (size_t k = 0; k < got.size(); ++k) {
      // Behind the softmax, which the interpreter computes in double, values are close; the others
      // are equal.
      const float tolerance = k == 0 ? 1e-6f : 0.0f;
      CHECK_EQ(got[k].size(), expected[k].size());
      for (size_t i = 0; i < got[k].size(); ++i)
        CHECK(std::fabs(got[k][i] - expected[k][i]) <= tolerance);
    }
  }
}

TEST(tensors_beyond_32_bits_are_refused) {
  const auto image = [](int64_t c, int64_t side) {
    programs::Builder b;
    const auto x = b.value("x", c, side, side, ValueKind::F32);
    const auto q = b.node(OpKind::Quantize, {x}, b.value("q", c, side, side));
    b.p.outputs = {b.node(OpKind::Dequantize, {q}, b.value("y", c, side, side, ValueKind::F32))};
    b.p.inputs = {x};
    return b.p;
  };
  const auto refused = [](const auto& body, const char* named) {
    std::string said;
    try {
      body();
    } catch (const InvalidArgument& e) {
      said = e.what();
    }
    check::report(said.find(named) != std::string::npos, __FILE__, __LINE__, said);
  };
  refused([&] { cuda::Model(image(512, 1024), {}); }, "address 2147483647");
  // What fits for one image is run in parts; a part is as large as offsets allow.
  const cuda::Model model(image(64, 512), {});
  CHECK_EQ(model.most_images(), ((int64_t{1} << 31) - 1) / (64 * 512 * 512 * 4));
  cuda::make_plan(model, model.most_images(), {});
  refused([&] { cuda::make_plan(model, model.most_images() + 1, {}); }, "a plan is for 1 to");
  refused([&] { cuda::make_plan(model, 0, {}); }, "a plan is for 1 to");
}

TEST(linear_layers_with_float_activations) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (const bool bfloat : {false, true})
    for (int bits = 2; bits <= 8; ++bits)
      for (const int64_t rows : {1, 5, 8, 19, 40}) {
        const int64_t in = bits % 2 == 0 ? 264 : 301, out = 16 + bits;
        std::vector<int8_t> w(static_cast<size_t>(in * out));
        for (int8_t& v : w)
          v = static_cast<int8_t>(static_cast<int>(random() % (1u << bits)) - (1 << (bits - 1)));
        const auto canonical = formats::pack_canonical(w, bits, static_cast<uint32_t>(out),
                                                       static_cast<uint32_t>(in), 1, 1);
        const cuda::LinearWeights l = cuda::pack_linear(canonical);
        const auto number = [bfloat](uint16_t v) {
          return bfloat ? std::bit_cast<float>(uint32_t{v} << 16)
                        : cuda::emulation::half_to_float(v);
        };
        alignas(16) static uint16_t x[40 * 301 + 8];
        for (uint16_t& v : x)
          v = bfloat ? cuda::to_bfloat_rn(normal(random)) : cuda::to_half_rn(normal(random));
        std::vector<uint16_t> y(static_cast<size_t>(rows * out), 0xFFFF);
        std::vector<float> scale(32, 0.0f), bias(32, 0.0f);
        for (int64_t o = 0; o < out; ++o) {
          scale[o] = 0.01f * static_cast<float>(o + 1);
          bias[o] = normal(random);
        }
        cuda::LinearParams p{};
        p.x = x;
        p.y = y.data();
        p.weights = l.packed.data();
        p.scale = scale.data();
        p.bias = bias.data();
        p.rows = static_cast<int32_t>(rows);
        p.in_features = static_cast<int32_t>(in);
        p.out_features = static_cast<int32_t>(out);
        p.units = l.units;
        p.aligned = in % 8 == 0;
        const int columns = rows <= 8 ? 1 : 4;
        const auto kernel = cuda::linear_kernel(bits, bfloat, columns);
        const uint32_t grid[3] = {static_cast<uint32_t>((out + 15) / 16),
                                  static_cast<uint32_t>((rows + 8 * columns - 1) / (8 * columns)),
                                  1};
        cuda::emulation::run(kernel.function, grid, kernel.threads, kernel.shared_bytes, &p);
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t o = 0; o < out; ++o) {
            double sum = 0.0, size = 0.0;
            for (int64_t k = 0; k < in; ++k) {
              const double term = static_cast<double>(number(x[row * in + k])) * w[o * in + k];
              sum += term;
              size += std::fabs(term);
            }
            const double expected =
                sum * static_cast<double>(scale[o]) + static_cast<double>(bias[o]);
            const double got = static_cast<double>(number(y[row * out + o]));
            // float32 sums of 301 terms, then one rounding to 11 or 8 digits.
            const double tolerance = size * static_cast<double>(scale[o]) * 302 * 0x1p-24 +
                                     std::fabs(expected) * (bfloat ? 0x1p-8 : 0x1p-11) + 0x1p-24;
            CHECK(std::fabs(got - expected) <= tolerance);
          }
      }
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

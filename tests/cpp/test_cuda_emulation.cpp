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
#include "engine/interpret.hpp"
#include "engine_programs.hpp"

using namespace adalayer;
using namespace adalayer::engine;
namespace cuda = adalayer::cuda;

namespace {

using Floats = std::vector<std::vector<float>>;

Floats noise(const Program& p, int64_t batch, uint64_t seed) {
  std::mt19937 random(static_cast<uint32_t>(seed));
  std::normal_distribution<float> normal(0.0f, 40.0f);
  Floats inputs;
  for (const int32_t v : p.inputs) {
    const Value& value = p.values[v];
    inputs.emplace_back(static_cast<size_t>(batch * value.c * value.h * value.w));
    for (float& x : inputs.back())
      x = normal(random);
  }
  return inputs;
}

Floats reference(const Program& p, const Floats& inputs, int64_t batch) {
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

/// Runs a program as the CUDA engine would. choice: all products use the choice of this number, as
/// far as they have so many; -1: the expected one.
Floats run(const Program& p, const Floats& inputs, int64_t batch, uint64_t seed = 1,
           int choice = -1, const std::vector<bool>& nhwc = {}) {
  cuda::emulation::seed(seed);
  const cuda::Model model(p, {});
  std::vector<cuda::Choice> chosen;
  const cuda::Plan sizes = cuda::make_plan(model, batch, {});
  for (const cuda::Product& product : sizes.products) {
    const auto all = cuda::choices(product, model.machine());
    CHECK(!all.empty());
    if (choice >= 0) chosen.push_back(all[static_cast<size_t>(choice) % all.size()]);
  }
  const cuda::Plan asked = cuda::make_plan(model, batch, {}, chosen);
  Guarded image(model.image().size(), 0), arena(static_cast<size_t>(asked.arena_bytes), 0xCD),
      scratch(static_cast<size_t>(asked.scratch_bytes), 0);
  std::memcpy(image.data(), model.image().data(), model.image().size());
  cuda::Plan plan =
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
  for (const auto& copy : plan.copies)
    outputs[copy.output] = copy.from_output ? outputs[copy.from] : inputs[copy.from];
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

/// One convolution from quantized noise to levels (shown as floats), or to floats.
struct ConvCase {
  int64_t c = 16, h = 5, w = 6, o = 16, kh = 3, kw = 3, sh = 1, sw = 1;
  int64_t pt = 1, pl = 1, pb = 1, pr = 1, dh = 1, dw = 1, groups = 1;
  int bits = 4;
  bool residual = false, to_float = false, transposed = false;
};

Program program_of(const ConvCase& k, uint32_t seed) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  programs::Builder b;
  std::mt19937 random(seed);
  const auto oh = k.transposed ? (k.h - 1) * k.sh - k.pt - k.pb + k.dh * (k.kh - 1) + 1
                               : (k.h + k.pt + k.pb - k.dh * (k.kh - 1) - 1) / k.sh + 1;
  const auto ow = k.transposed ? (k.w - 1) * k.sw - k.pl - k.pr + k.dw * (k.kw - 1) + 1
                               : (k.w + k.pl + k.pr - k.dw * (k.kw - 1) - 1) / k.sw + 1;
  const auto x = b.value("x", k.c, k.h, k.w, ValueKind::F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", k.c, k.h, k.w));
  std::vector<int32_t> inputs{q};
  std::vector<int32_t> ports{x};
  if (k.residual) {
    const auto r = b.value("r", k.o, oh, ow, ValueKind::F32);
    ports.push_back(r);
    inputs.push_back(b.node(OpKind::Quantize, {r}, b.value("rq", k.o, oh, ow)));
  }
  const int64_t group_in = k.c / k.groups, reduction = group_in * k.kh * k.kw;
  std::vector<int8_t> w(static_cast<size_t>(k.o * reduction));
  const int lo = -(1 << (k.bits - 1)), span = 1 << k.bits;
  for (int8_t& v : w)
    v = static_cast<int8_t>(lo + static_cast<int>(random() % static_cast<unsigned>(span)));
  w[0] = static_cast<int8_t>(lo);
  const auto weights = b.constant(
      ConstantKind::Weights,
      formats::pack_canonical(w, k.bits, static_cast<uint32_t>(k.o),
                              static_cast<uint32_t>(group_in), static_cast<uint32_t>(k.kh),
                              static_cast<uint32_t>(k.kw)));
  std::vector<float> scale, bias;
  for (int64_t o = 0; o < k.o; ++o) {
    const float unit = 1.0f / static_cast<float>((1 << (k.bits - 1)) *
                                                 std::sqrt(static_cast<double>(reduction)));
    scale.push_back(unit * (static_cast<float>(random() % 1000) / 500.0f - 1.0f));
    bias.push_back(static_cast<float>(random() % 1000) / 10.0f - 20.0f);
  }
  const auto y = b.value("y", k.o, oh, ow, k.to_float ? ValueKind::F32 : ValueKind::U8);
  b.node(k.transposed ? OpKind::ConvTranspose : OpKind::Conv, inputs, y,
         {k.kh, k.kw, k.sh, k.sw, k.pt, k.pl, k.pb, k.pr, k.dh, k.dw, k.groups, 0, 255, 10},
         {1.0f / b.p.values[y].scale, -kInf, kInf}, {weights, b.floats(scale), b.floats(bias), -1});
  const auto out =
      k.to_float ? y : b.node(OpKind::Dequantize, {y}, b.value("out", k.o, oh, ow, ValueKind::F32));
  b.p.inputs = ports;
  b.p.outputs = {out};
  return b.p;
}

std::string show(const ConvCase& k, int64_t batch, int choice) {
  std::ostringstream s;
  s << k.c << "x" << k.h << "x" << k.w << " -> " << k.o << ", kernel " << k.kh << "x" << k.kw
    << ", stride " << k.sh << "," << k.sw << ", pad " << k.pt << k.pl << k.pb << k.pr
    << ", dilation " << k.dh << "," << k.dw << ", groups " << k.groups << ", bits " << k.bits
    << (k.residual ? ", residual" : "") << (k.to_float ? ", to float" : "")
    << (k.transposed ? ", transposed" : "") << ", batch " << batch << ", choice " << choice;
  return s.str();
}

void check_conv(const ConvCase& k, int64_t batch, int choice, uint32_t seed) {
  const Program p = program_of(k, seed);
  const Floats inputs = noise(p, batch, seed);
  const bool equal = same(run(p, inputs, batch, seed, choice), reference(p, inputs, batch));
  check::report(equal, __FILE__, __LINE__, show(k, batch, choice));
}

}  // namespace

TEST(unpacking_gives_the_packed_weights) {
  // Fields written by the places that field_place() names come out where fragment_*() say.
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
        if (U::kOne)
          std::memcpy(&one, cell.data() + cuda::plane_offset(kBits, 1) + lane * 4, 4);
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

TEST(every_width_of_weights) {
  for (int bits = 2; bits <= 8; ++bits)
    check_conv({.c = 70, .o = 40, .bits = bits}, 2, -1, static_cast<uint32_t>(bits));
}

TEST(every_choice_of_tile_and_splits) {
  for (const int bits : {3, 8})
    for (int choice = 0; choice < 20; ++choice)
      check_conv({.c = 80, .h = 4, .w = 5, .o = 72, .bits = bits, .residual = true}, 2, choice,
                 static_cast<uint32_t>(choice));
}

TEST(tiles_that_overflow) {
  for (const int64_t o : {1, 15, 16, 17, 31, 33, 63, 64, 65, 96, 130, 257})
    check_conv({.c = 16, .h = 9, .w = 9, .o = o, .bits = 4, .residual = o % 2 == 1}, 2,
               static_cast<int>(o % 7), static_cast<uint32_t>(o));
}

TEST(few_input_channels) {
  for (const int64_t c : {1, 2, 3, 4, 5, 7, 8, 9})
    check_conv({.c = c, .h = 11, .w = 12, .o = 20, .kh = 5, .kw = 7, .sh = 2, .sw = 2, .pt = 2,
                .pl = 3, .pb = 2, .pr = 3, .bits = 5},
               2, -1, static_cast<uint32_t>(c));
}

TEST(random_convolutions) {
  std::mt19937 random(11);
  const auto pick = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<unsigned>(high - low + 1));
  };
  for (int round = 0; round < 120; ++round) {
    ConvCase k;
    k.groups = pick(0, 2) == 0 ? pick(2, 6) : 1;
    k.c = k.groups * pick(1, k.groups == 1 ? 70 : 20);
    k.o = k.groups * pick(1, k.groups == 1 ? 90 : 20);
    if (pick(0, 5) == 0) k.o = k.c = k.groups = pick(2, 40);
    k.h = pick(1, 9);
    k.w = pick(1, 9);
    k.kh = pick(1, 4);
    k.kw = pick(1, 4);
    k.sh = pick(1, 3);
    k.sw = pick(1, 3);
    k.dh = pick(1, 2);
    k.dw = pick(1, 2);
    k.transposed = pick(0, 3) == 0;
    const int64_t most = k.transposed ? 1 : 3;
    k.pt = pick(0, most), k.pl = pick(0, most), k.pb = pick(0, most), k.pr = pick(0, most);
    k.bits = static_cast<int>(pick(2, 8));
    k.residual = pick(0, 1) == 1;
    k.to_float = pick(0, 3) == 0;
    const int64_t eh = k.dh * (k.kh - 1) + 1, ew = k.dw * (k.kw - 1) + 1;
    if (!k.transposed && (k.h + k.pt + k.pb < eh || k.w + k.pl + k.pr < ew)) continue;
    if (k.transposed && ((k.h - 1) * k.sh + eh - k.pt - k.pb < 1 ||
                         (k.w - 1) * k.sw + ew - k.pl - k.pr < 1))
      continue;
    check_conv(k, pick(1, 3), static_cast<int>(pick(0, 11)), static_cast<uint32_t>(round));
  }
}

TEST(a_kernel_as_large_as_the_image) {
  for (const int64_t side : {2, 7, 17})
    check_conv({.c = 20, .h = side, .w = side, .o = 33, .kh = side, .kw = side, .pt = 0, .pl = 0,
                .pb = 0, .pr = 0, .bits = 3, .to_float = true},
               3, -1, 5);
}

TEST(large_kernels_run_directly) {
  check_conv({.c = 3, .h = 20, .w = 20, .o = 5, .kh = 17, .kw = 2, .bits = 8}, 1, -1, 9);
}

TEST(every_operation_of_a_program) {
  const Program p = programs::every_operation();
  for (const int64_t batch : {1, 3}) {
    const Floats inputs = noise(p, batch, 7);
    const Floats got = run(p, inputs, batch), expected = reference(p, inputs, batch);
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
          return bfloat ? std::bit_cast<float>(uint32_t{v} << 16) : cuda::emulation::half_to_float(v);
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
        const uint32_t grid[3] = {
            static_cast<uint32_t>((out + 15) / 16),
            static_cast<uint32_t>((rows + 8 * columns - 1) / (8 * columns)), 1};
        cuda::emulation::run(kernel.function, grid, kernel.threads, kernel.shared_bytes, &p);
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t o = 0; o < out; ++o) {
            double sum = 0.0, size = 0.0;
            for (int64_t k = 0; k < in; ++k) {
              const double term =
                  static_cast<double>(number(x[row * in + k])) * w[o * in + k];
              sum += term;
              size += std::fabs(term);
            }
            const double expected = sum * static_cast<double>(scale[o]) + static_cast<double>(bias[o]);
            const double got = static_cast<double>(number(y[row * out + o]));
            // float32 sums of 301 terms, then one rounding to 11 or 8 digits.
            const double tolerance = size * static_cast<double>(scale[o]) * 302 * 0x1p-24 +
                                     std::fabs(expected) * (bfloat ? 0x1p-8 : 0x1p-11) + 0x1p-24;
            CHECK(std::fabs(got - expected) <= tolerance);
          }
      }
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

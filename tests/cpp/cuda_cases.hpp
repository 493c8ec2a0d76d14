// Convolutions and inputs for the tests of the CUDA engine, in software and on a GPU.
#pragma once

#include <cmath>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "engine_programs.hpp"

namespace cuda_cases {

using namespace adalayer;
using namespace adalayer::engine;

using Floats = std::vector<std::vector<float>>;

inline Floats noise(const Program& p, int64_t batch, uint64_t seed) {
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

/// Where weights are zero.
enum class Zeros {
  None,
  Blocks16,   // blocks of 16 output channels x 64 input channels at a kernel position, most of them
  Blocks32,   // the same of 32 output channels
  TwoOfFour,  // of four neighbouring input channels at least two
  Both,       // 2:4 within blocks
  All,
};

/// One convolution from quantized noise to levels (shown as floats), or to floats.
struct ConvCase {
  int64_t c = 16, h = 5, w = 6, o = 16, kh = 3, kw = 3, sh = 1, sw = 1;
  int64_t pt = 1, pl = 1, pb = 1, pr = 1, dh = 1, dw = 1, groups = 1;
  int bits = 4;
  bool residual = false, to_float = false, transposed = false;
  Zeros zeros = Zeros::None;
  bool extreme = false;  // weights at the ends of their range
};

/// Sets weights [O][I][KH][KW] to zero.
inline void remove(std::vector<int8_t>& w, const ConvCase& k, int64_t group_in, uint32_t seed) {
  if (k.zeros == Zeros::None) return;
  std::mt19937 random(seed);
  const int64_t taps = k.kh * k.kw;
  const int64_t rows = k.zeros == Zeros::Blocks32 ? 32 : 16;
  const bool blocks = k.zeros != Zeros::TwoOfFour, fours = k.zeros >= Zeros::TwoOfFour;
  const auto at = [&](int64_t o, int64_t c, int64_t t) -> int8_t& {
    return w[static_cast<size_t>((o * group_in + c) * taps + t)];
  };
  for (int64_t first_o = 0; first_o < k.o; first_o += rows)
    for (int64_t first_c = 0; first_c < group_in; first_c += 64)
      for (int64_t t = 0; t < taps; ++t) {
        if (!blocks || random() % 4 == 0) continue;
        for (int64_t o = first_o; o < std::min(k.o, first_o + rows); ++o)
          for (int64_t c = first_c; c < std::min(group_in, first_c + 64); ++c)
            at(o, c, t) = 0;
      }
  for (int64_t o = 0; o < k.o && fours; ++o)
    for (int64_t first = 0; first < group_in; first += 4)
      for (int64_t t = 0; t < taps; ++t) {
        const uint32_t keep = random() % 4, other = random() % 4;  // often one place twice
        for (int64_t c = first; c < std::min(group_in, first + 4); ++c)
          if (k.zeros == Zeros::All || (c - first != keep && c - first != other)) at(o, c, t) = 0;
      }
}

inline Program program_of(const ConvCase& k, uint32_t seed) {
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
  if (k.extreme)
    for (int8_t& v : w)
      v = static_cast<int8_t>(random() % 8 == 0 ? lo + span - 1 : lo);
  w[0] = static_cast<int8_t>(lo);
  remove(w, k, group_in, seed);
  const auto weights =
      b.constant(ConstantKind::Weights,
                 formats::pack_canonical(w, k.bits, static_cast<uint32_t>(k.o),
                                         static_cast<uint32_t>(group_in),
                                         static_cast<uint32_t>(k.kh), static_cast<uint32_t>(k.kw)));
  std::vector<float> scale, bias;
  for (int64_t o = 0; o < k.o; ++o) {
    const float unit =
        1.0f / static_cast<float>((1 << (k.bits - 1)) * std::sqrt(static_cast<double>(reduction)));
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

inline std::string show(const ConvCase& k, int64_t batch, int choice) {
  std::ostringstream s;
  s << k.c << "x" << k.h << "x" << k.w << " -> " << k.o << ", kernel " << k.kh << "x" << k.kw
    << ", stride " << k.sh << "," << k.sw << ", pad " << k.pt << k.pl << k.pb << k.pr
    << ", dilation " << k.dh << "," << k.dw << ", groups " << k.groups << ", bits " << k.bits
    << (k.residual ? ", residual" : "") << (k.to_float ? ", to float" : "")
    << (k.transposed ? ", transposed" : "") << ", zeros " << static_cast<int>(k.zeros)
    << (k.extreme ? ", extreme" : "") << ", batch " << batch << ", choice " << choice;
  return s.str();
}

/// A case with its batch and the number of the kernel choice (-1: the expected one).
struct Run {
  ConvCase conv;
  int64_t batch;
  int choice;
};

inline std::vector<Run> every_width() {
  std::vector<Run> runs;
  for (int bits = 2; bits <= 8; ++bits)
    runs.push_back({{.c = 70, .o = 40, .bits = bits}, 2, -1});
  return runs;
}

inline std::vector<Run> every_choice(std::vector<int> widths) {
  std::vector<Run> runs;
  for (const int bits : widths)
    for (int choice = 0; choice < 40; ++choice)
      runs.push_back(
          {{.c = 80, .h = 4, .w = 5, .o = 72, .bits = bits, .residual = true}, 2, choice});
  return runs;
}

/// Every form of sparse weights at every width, with tails in every direction.
inline std::vector<Run> sparse_weights(const std::vector<int>& widths) {
  std::vector<Run> runs;
  const Zeros kinds[] = {Zeros::Blocks16, Zeros::Blocks32, Zeros::TwoOfFour, Zeros::Both,
                         Zeros::All};
  for (const int bits : widths)
    for (const Zeros zeros : kinds) {
      const bool odd = (bits + static_cast<int>(zeros)) % 2 == 1;
      const ConvCase k{.c = odd ? 150 : 128,
                       .h = 3,
                       .w = 4,
                       .o = odd ? 86 : 144,
                       .bits = bits,
                       .residual = odd,
                       .to_float = bits == 5,
                       .zeros = zeros,
                       .extreme = bits % 3 == 0};
      runs.push_back({k, 2, -1});
    }
  return runs;
}

inline std::vector<Run> overflowing_tiles() {
  std::vector<Run> runs;
  for (const int64_t o : {1, 15, 16, 17, 31, 33, 63, 64, 65, 96, 130, 257})
    runs.push_back({{.c = 16, .h = 9, .w = 9, .o = o, .bits = 4, .residual = o % 2 == 1},
                    2,
                    static_cast<int>(o % 7)});
  return runs;
}

inline std::vector<Run> few_input_channels() {
  std::vector<Run> runs;
  for (const int64_t c : {1, 2, 3, 4, 5, 7, 8, 9})
    runs.push_back({{.c = c,
                     .h = 11,
                     .w = 12,
                     .o = 20,
                     .kh = 5,
                     .kw = 7,
                     .sh = 2,
                     .sw = 2,
                     .pt = 2,
                     .pl = 3,
                     .pb = 2,
                     .pr = 3,
                     .bits = 5},
                    2,
                    -1});
  return runs;
}

/// Kernels as large as the image, and one that only the direct kernel can do.
inline std::vector<Run> unusual_kernels() {
  std::vector<Run> runs;
  for (const int64_t side : {2, 7, 17})
    runs.push_back({{.c = 20,
                     .h = side,
                     .w = side,
                     .o = 33,
                     .kh = side,
                     .kw = side,
                     .pt = 0,
                     .pl = 0,
                     .pb = 0,
                     .pr = 0,
                     .bits = 3,
                     .to_float = true},
                    3,
                    -1});
  runs.push_back({{.c = 3, .h = 20, .w = 20, .o = 5, .kh = 17, .kw = 2, .bits = 8}, 1, -1});
  return runs;
}

inline std::vector<Run> random_convolutions(int count, uint32_t seed) {
  std::mt19937 random(seed);
  const auto pick = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<unsigned>(high - low + 1));
  };
  std::vector<Run> runs;
  while (static_cast<int>(runs.size()) < count) {
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
    const bool fits = k.transposed ? (k.h - 1) * k.sh + eh - k.pt - k.pb >= 1 &&
                                         (k.w - 1) * k.sw + ew - k.pl - k.pr >= 1
                                   : k.h + k.pt + k.pb >= eh && k.w + k.pl + k.pr >= ew;
    if (fits) runs.push_back({k, pick(1, 3), static_cast<int>(pick(0, 11))});
  }
  return runs;
}

}  // namespace cuda_cases

// Programs for the tests of the engine, and .ada files that were changed on purpose.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "engine/container.hpp"
#include "engine/levels.hpp"
#include "engine/program.hpp"
#include "engine/token_ids.hpp"
#include "formats/canonical.hpp"

namespace programs {

using namespace adalayer;
using namespace adalayer::engine;

/// The grid of levels unless said otherwise, with zero point 10.
constexpr float kScale = 0.3f, kInverse = 1.0f / kScale;

/// Appends to a program.
struct Builder {
  Program p;

  int32_t value(const std::string& name, int64_t c, int64_t h, int64_t w,
                ValueKind kind = ValueKind::U8) {
    Value v;
    v.name = name;
    v.kind = kind;
    v.c = c;
    v.h = h;
    v.w = w;
    if (kind == ValueKind::U8) {
      v.scale = kScale;
      v.zero_point = 10;
    }
    p.values.push_back(v);
    return static_cast<int32_t>(p.values.size()) - 1;
  }
  template <typename T>
  int32_t constant(ConstantKind kind, const std::vector<T>& entries) {
    Constant c;
    c.kind = kind;
    c.bytes.resize(entries.size() * sizeof(T));
    if (!entries.empty()) std::memcpy(c.bytes.data(), entries.data(), c.bytes.size());
    p.constants.push_back(std::move(c));
    return static_cast<int32_t>(p.constants.size()) - 1;
  }
  int32_t floats(const std::vector<float>& v) { return constant(ConstantKind::F32, v); }
  int32_t ints(const std::vector<int32_t>& v) { return constant(ConstantKind::I32, v); }
  int32_t table(int multiplier) {
    std::vector<uint8_t> t(256);
    for (int q = 0; q < 256; ++q)
      t[q] = static_cast<uint8_t>(q * multiplier);
    return constant(ConstantKind::U8, t);
  }
  int32_t weights(uint32_t o, uint32_t i, uint32_t kh, uint32_t kw, int bits) {
    std::vector<int8_t> w(size_t{o} * i * kh * kw);
    const int span = 1 << bits;
    for (size_t k = 0; k < w.size(); ++k)
      w[k] = static_cast<int8_t>(static_cast<int>(k * 7 % span) - span / 2);
    return constant(ConstantKind::Weights, formats::pack_canonical(w, bits, o, i, kh, kw));
  }
  int32_t node(OpKind op, std::vector<int32_t> inputs, int32_t output,
               std::vector<int64_t> ints = {}, std::vector<float> floats = {},
               std::vector<int32_t> constants = {}) {
    p.nodes.push_back({op, std::string("layer.") + op_name(op), std::move(inputs), output,
                       std::move(ints), std::move(floats), std::move(constants)});
    return output;
  }
};

/// Every operation once at least but those of token_program(), float_program(),
/// recurrent_program(), reduced_program() and grouped_program(), convolutions in
/// all their forms; two inputs, three outputs.
inline Program every_operation() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr ValueKind F32 = ValueKind::F32;
  Builder b;
  const auto x = b.value("image", 4, 6, 5, F32);
  const auto z = b.value("extra", 4, 1, 1, F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", 4, 6, 5));
  const auto g = b.node(OpKind::Quantize, {z}, b.value("g", 4, 1, 1));
  const auto four = b.floats({0.01f, -0.02f, 0.03f, 0.015f});
  const auto bias = b.floats({0.5f, -1.0f, 2.0f, 0.0f});
  const auto table = b.table(3);

  const auto conv = b.node(OpKind::Conv, {q}, b.value("conv", 4, 3, 3),
                           {3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 10, 255, 10}, {kInverse, -kInf, kInf},
                           {b.weights(4, 4, 3, 3, 4), four, bias, -1});
  const auto grouped = b.node(OpKind::Conv, {conv, conv}, b.value("grouped", 4, 3, 3),
                              {2, 3, 1, 1, 1, 2, 1, 2, 2, 2, 2, 0, 255, 10}, {0.7f, 0, 0},
                              {b.weights(4, 2, 2, 3, 7), four, bias, table});
  const auto up = b.node(OpKind::ConvTranspose, {grouped}, b.value("up", 4, 6, 6),
                         {3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 0, 255, 10}, {kInverse, 0, 0},
                         {b.weights(4, 4, 3, 3, 2), four, bias, -1});
  const auto looked = b.node(OpKind::Lookup, {up}, b.value("lookup", 4, 6, 6), {}, {}, {table});
  const auto sum = b.node(OpKind::Add, {up, looked}, b.value("sum", 4, 6, 6), {0, 255, 10},
                          {kInverse, 0.3f, -0.2f}, {-1});
  const auto product = b.node(OpKind::Mul, {sum, g}, b.value("product", 4, 6, 6), {0, 255, 10},
                              {0.9f, 0.3f, 0.05f}, {table});
  const auto line = b.node(OpKind::Affine, {product}, b.value("line", 4, 6, 6), {3, 250, 10},
                           {kInverse}, {four, bias, -1});
  std::vector<float> field(4 * 6 * 6);
  for (size_t i = 0; i < field.size(); ++i)
    field[i] = static_cast<float>(i % 13) * 0.7f - 3.0f;
  const auto image_line = b.node(OpKind::AffineImage, {line}, b.value("image_line", 4, 6, 6),
                                 {0, 255, 10}, {1.1f}, {four, b.floats(field), table});
  const auto group =
      b.node(OpKind::GroupNorm, {image_line}, b.value("group", 4, 6, 6), {2, 0, 255, 10},
             {kInverse, 1e-5f}, {b.floats({9, 8, 7, 6}), b.floats({1, 2, -1, 0})});
  const auto both =
      b.node(OpKind::Concat, {group, sum}, b.value("both", 8, 6, 6), {}, {}, {table, -1});
  const auto most =
      b.node(OpKind::MaxPool, {both}, b.value("most", 8, 3, 3), {3, 3, 2, 2, 1, 1, 1, 1});
  const auto mean = b.node(OpKind::AvgPool, {both}, b.value("mean", 8, 3, 3),
                           {3, 3, 2, 2, 1, 1, 1, 1, 1, 0, 255, 10}, {kInverse, kScale}, {-1});
  const auto pooled = b.node(OpKind::AdaptiveAvgPool, {mean}, b.value("pooled", 8, 2, 2),
                             {0, 255, 10}, {1.2f, kScale}, {table});
  const auto part = b.node(OpKind::Slice, {most}, b.value("part", 4, 3, 3), {0, 1, 2});
  const auto mixed =
      b.node(OpKind::Gather, {part}, b.value("mixed", 4, 3, 3), {}, {}, {b.ints({3, 0, 2, 1})});
  const auto wide = b.node(OpKind::Pad, {mixed}, b.value("wide", 4, 5, 6), {1, 2, 1, 1, 10});
  const auto low = b.ints({0, 1, 3}), high = b.ints({1, 2, 4});
  const auto blend = b.floats({0.25f, 0.5f, 1.0f});
  std::vector<uint8_t> levels_of(4 * 2 * 6);
  for (size_t i = 0; i < levels_of.size(); ++i)
    levels_of[i] = static_cast<uint8_t>(i * 5);
  const auto fixed = b.node(OpKind::Constant, {}, b.value("fixed", 4, 2, 6), {}, {},
                            {b.constant(ConstantKind::U8, levels_of)});
  const auto joined =
      b.node(OpKind::Join, {fixed, wide}, b.value("joined", 4, 7, 6), {1}, {}, {-1, table});
  const auto smooth =
      b.node(OpKind::Resize, {joined}, b.value("smooth", 4, 3, 3), {1, 0, 255, 10},
             {kInverse, kScale, -10.0f * kScale}, {low, high, blend, low, high, blend});
  const auto nearest = b.node(OpKind::Resize, {smooth}, b.value("nearest", 4, 2, 2),
                              {0, 0, 255, 10}, {kInverse, 1.0f, 0.0f},
                              {b.ints({0, 2}), b.ints({0, 2}), b.floats({0, 0}), b.ints({1, 2}),
                               b.ints({1, 2}), b.floats({0, 0})});
  const auto normed = b.node(OpKind::LayerNorm, {nearest}, b.value("normed", 4, 2, 2), {0, 255, 10},
                             {kInverse, 1e-5f}, {b.floats({2, 3, 4, 5}), b.floats({0, 1, 0, -1})});
  const auto scaled = b.node(OpKind::RmsNorm, {normed}, b.value("scaled", 4, 2, 2), {0, 255, 10},
                             {kInverse, 1e-6f}, {b.floats({5, 4, 3, 2}), b.floats({0, 0, 1, 0})});
  // Width and channels change places, and rows are flipped.
  const auto turned = b.node(OpKind::Rearrange, {scaled}, b.value("turned", 2, 2, 4), {}, {},
                             {b.ints({0, 1}), b.ints({2, 0}), b.ints({0, 4, 8, 12})});
  // Two heads of eight positions, two keys hidden from each query of the first.
  std::vector<float> mask(128, 0.25f);
  for (size_t i = 0; i < 64; i += 4)
    mask[i] = -std::numeric_limits<float>::infinity();
  const auto attended =
      b.node(OpKind::Attention, {turned, turned, turned}, b.value("attended", 2, 2, 4),
             {2, 2, 0, 0, 0, 1, 0, 255, 10}, {kInverse, 0.01f}, {b.floats(mask)});
  const auto flat = b.node(OpKind::Reshape, {attended}, b.value("flat", 16, 1, 1));
  // Float outputs: a convolution with a residual, its softmax and its average.
  const auto logits = b.node(OpKind::Conv, {pooled, pooled}, b.value("logits", 8, 2, 2, F32),
                             {1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, {1.0f, -2.0f, kInf},
                             {b.weights(8, 8, 1, 1, 8), b.floats(std::vector<float>(8, 0.01f)),
                              b.floats(std::vector<float>(8, 0.0f)), -1});
  const auto gate = b.node(OpKind::Function, {logits}, b.value("gate", 8, 2, 2, F32), {3}, {0, 0});
  const auto mixed_floats =
      b.node(OpKind::Combine, {logits, gate}, b.value("product", 8, 2, 2, F32), {2});
  const auto soft = b.node(OpKind::Softmax, {mixed_floats}, b.value("soft", 8, 2, 2, F32));
  const auto bigger = b.node(
      OpKind::Resize, {soft}, b.value("bigger", 8, 3, 3, F32), {1, 0, 255, 0}, {1.0f, 1.0f, 0.0f},
      {b.ints({0, 0, 1}), b.ints({1, 1, 1}), blend, b.ints({0, 0, 1}), b.ints({1, 1, 1}), blend});
  const auto average = b.node(OpKind::AdaptiveAvgPool, {logits}, b.value("average", 8, 1, 1, F32),
                              {0, 255, 0}, {1.0f, 1.0f}, {-1});
  const auto levels = b.node(OpKind::Dequantize, {flat}, b.value("levels", 16, 1, 1, F32));
  b.p.inputs = {x, z};
  b.p.outputs = {bigger, average, levels};
  b.p.metadata = {{"classes", "[\"caf\xC3\xA9\", \"b\"]"}, {"preprocessing", "{}"}, {"", ""}};
  return b.p;
}

/// Token ids, two embeddings of them, of 7 and of 5 rows, and a linear layer over the tokens.
inline Program token_program() {
  Builder b;
  const auto ids = b.value("ids", 1, 1, 6, ValueKind::I32);
  const auto table = [&](int rows, int step) {
    std::vector<uint8_t> levels(static_cast<size_t>(rows) * 8);
    for (size_t k = 0; k < levels.size(); ++k)
      levels[k] = static_cast<uint8_t>(k * static_cast<size_t>(step));
    return b.constant(ConstantKind::U8, levels);
  };
  const auto x = b.node(OpKind::Embedding, {ids}, b.value("x", 8, 1, 6), {}, {}, {table(7, 37)});
  const auto y = b.node(OpKind::Embedding, {ids}, b.value("y", 8, 1, 6), {}, {}, {table(5, 91)});
  const auto sum = b.node(OpKind::Add, {x, y}, b.value("sum", 8, 1, 6), {0, 255, 10},
                          {kInverse, kScale, kScale}, {-1});
  const auto out =
      b.node(OpKind::Conv, {sum}, b.value("out", 3, 1, 6, ValueKind::F32),
             {1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, {1, -1e9f, 1e9f},
             {b.weights(3, 8, 1, 1, 4), b.floats({0.1f, 0.2f, 0.3f}), b.floats({0, 1, 2}), -1});
  b.p.inputs = {ids};
  b.p.outputs = {out};
  return b.p;
}

/// What works on floats or gives floats, and a mask of keys that is an input: a float convolution
/// whose weights are floats, one whose weights are packed, norms from levels and from floats.
inline Program float_program() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr ValueKind F32 = ValueKind::F32;
  Builder b;
  const auto x = b.value("x", 4, 4, 7, F32);
  const auto ids = b.value("mask", 1, 1, 6, ValueKind::I32);
  std::vector<float> weights(6 * 2 * 9);
  for (size_t i = 0; i < weights.size(); ++i)
    weights[i] = 0.1f * static_cast<float>(i % 17) - 0.8f;
  const auto six = b.floats({0.5f, -1.0f, 2.0f, 0.0f, 1.0f, 0.25f});
  const auto conv =
      b.node(OpKind::FloatConv, {x}, b.value("conv", 6, 3, 3, F32),
             {3, 3, 1, 1, 1, 0, 0, 0, 1, 2, 2}, {-kInf, 20.0f}, {b.floats(weights), -1, six});
  const auto packed = b.node(
      OpKind::FloatConv, {conv}, b.value("packed", 6, 3, 3, F32), {1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1},
      {-kInf, kInf}, {b.weights(6, 6, 1, 1, 4), b.floats(std::vector<float>(6, 0.05f)), six});
  const auto line = b.node(OpKind::Affine, {packed}, b.value("line", 6, 3, 3, F32), {0, 255, 0},
                           {1.0f}, {six, six, -1});
  const auto most =
      b.node(OpKind::MaxPool, {line}, b.value("most", 6, 2, 3, F32), {2, 1, 1, 1, 0, 0, 1, 1});
  std::vector<float> fixed_floats(36);
  for (size_t i = 0; i < fixed_floats.size(); ++i)
    fixed_floats[i] = 0.3f * static_cast<float>(i % 5);
  const auto fixed = b.node(OpKind::Constant, {}, b.value("fixed", 6, 2, 3, F32), {}, {},
                            {b.floats(fixed_floats)});
  const auto sum = b.node(OpKind::Combine, {most, fixed}, b.value("sum", 6, 2, 3, F32), {0});
  // Positions become one row: channels stay.
  const auto turned =
      b.node(OpKind::Rearrange, {sum}, b.value("turned", 6, 1, 6, F32), {}, {},
             {b.ints({0, 6, 12, 18, 24, 30}), b.ints({0}), b.ints({5, 4, 3, 2, 1, 0})});
  const auto gamma = b.floats({2, 3, 4, 5, 1, 2}), beta = b.floats({0, 1, 0, -1, 2, 0});
  const auto norm = [&](OpKind op, int32_t from, const char* name, std::vector<int64_t> ints) {
    const Value v = b.p.values[static_cast<size_t>(from)];
    return b.node(op, {from}, b.value(name, v.c, v.h, v.w, F32), std::move(ints), {1.0f, 1e-5f},
                  {gamma, beta});
  };
  const auto rows = norm(OpKind::LayerNorm, turned, "rows", {0, 255, 0});
  const auto roots = norm(OpKind::RmsNorm, rows, "roots", {0, 255, 0});
  const auto groups = norm(OpKind::GroupNorm, roots, "groups", {3, 0, 255, 0});
  const auto q = b.node(OpKind::Quantize, {groups}, b.value("q", 6, 1, 6));
  const auto mask =
      b.node(OpKind::Choose, {ids}, b.value("keys", 1, 1, 6, F32), {1}, {-kInf, 0.0f});
  std::vector<float> also(72, 0.5f);
  also[3] = -kInf;
  const auto attended = b.node(OpKind::Attention, {q, q, q, mask}, b.value("attended", 6, 1, 6),
                               {2, 2, 0, 0, 0, 1, 0, 255, 10}, {kInverse, 0.01f}, {b.floats(also)});
  const auto ends = b.node(OpKind::Attention, {attended, q, q, mask}, b.value("ends", 6, 1, 6, F32),
                           {3, 3, 0, 1, 0, 0, 0, 255, 0}, {1.0f, 0.01f}, {-1});
  const auto last = norm(OpKind::LayerNorm, attended, "last", {0, 255, 0});
  const auto last_roots = norm(OpKind::RmsNorm, attended, "last_roots", {0, 255, 0});
  const auto last_groups = norm(OpKind::GroupNorm, attended, "last_groups", {2, 0, 255, 0});
  b.p.inputs = {x, ids};
  b.p.outputs = {ends, last, last_roots, last_groups};
  return b.p;
}

/// Reductions of levels and floats, floats that are joined along every axis, and pairs of them of
/// different sizes: a response norm, in floats.
inline Program reduced_program() {
  constexpr ValueKind F32 = ValueKind::F32;
  Builder b;
  const auto x = b.value("x", 6, 3, 5, F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", 6, 3, 5));
  const auto along = [&](int32_t from, const char* name, std::vector<int64_t> ints) {
    const Value& v = b.p.values[static_cast<size_t>(from)];
    const int64_t c = ints[1] != 0 ? 1 : v.c, h = ints[2] != 0 ? 1 : v.h;
    const int64_t w = ints[3] != 0 ? 1 : v.w;
    return b.node(OpKind::Reduce, {from}, b.value(name, c, h, w, F32), std::move(ints));
  };
  const auto pair = [&](int64_t kind, int32_t left, int32_t right, const char* name, int64_t c,
                        int64_t h, int64_t w) {
    return b.node(OpKind::Combine, {left, right}, b.value(name, c, h, w, F32), {kind});
  };
  const auto lengths = along(q, "lengths", {1, 0, 1, 1});
  const auto mean = along(lengths, "average", {0, 1, 0, 0});
  const auto one =
      b.node(OpKind::Constant, {}, b.value("one", 1, 1, 1, F32), {}, {}, {b.floats({1e-6f})});
  const auto divisor = pair(0, mean, one, "divisor", 1, 1, 1);
  const auto shares = pair(3, lengths, divisor, "shares", 6, 1, 1);
  const auto scaled = pair(2, x, shares, "scaled", 6, 3, 5);
  const auto rows = along(q, "rows", {0, 0, 0, 1});
  const auto columns = along(scaled, "columns", {1, 1, 1, 0});
  const auto crossed = pair(1, rows, columns, "crossed", 6, 3, 5);
  const auto pixels = along(q, "pixels", {0, 1, 0, 0});
  const auto lines = along(x, "lines", {1, 0, 0, 1});
  const auto joined = [&](OpKind op, std::vector<int32_t> from, const char* name, int64_t c,
                          int64_t h, int64_t w, std::vector<int64_t> axis) {
    return b.node(op, std::move(from), b.value(name, c, h, w, F32), std::move(axis), {}, {-1, -1});
  };
  const auto deep = joined(OpKind::Concat, {scaled, pixels}, "deep", 7, 3, 5, {});
  const auto tall = joined(OpKind::Join, {shares, lines}, "tall", 6, 4, 1, {1});
  const auto wide = joined(OpKind::Join, {crossed, lines}, "wide", 6, 3, 6, {2});
  b.p.inputs = {x};
  b.p.outputs = {deep, tall, wide};
  return b.p;
}

/// Recurrent layers of all kinds: from floats and from what layers give, with and without a state
/// to begin with, forward and backward, onto the state's grid, another one, and in floats.
inline Program recurrent_program(int hidden = 5, int64_t steps = 6, int bits = 4) {
  constexpr ValueKind F32 = ValueKind::F32;
  Builder b;
  const int64_t n = hidden;
  const auto units = [&](int64_t gates, float first, float step) {
    std::vector<float> values(static_cast<size_t>(gates * n));
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = first + step * static_cast<float>(i % 7);
    return b.floats(values);
  };
  const auto out = static_cast<uint32_t>(n);
  // So that gates are seldom all open, or all closed.
  const float weight = 1.0f / (std::sqrt(static_cast<float>(n)) * static_cast<float>(1 << bits));
  const auto image = b.value("x", 4 * n, 1, steps, F32);
  const auto x = b.node(OpKind::Affine, {image}, b.value("scaled", 4 * n, 1, steps, F32),
                        {0, 255, 0}, {1.0f}, {units(4, 0.02f, 0.002f), units(4, -1.0f, 0.1f), -1});
  const auto state = b.value("state", n, 1, 1, F32), cell = b.value("cell", n, 1, 1, F32);
  const auto layer = [&](int64_t kind, std::vector<int32_t> inputs, int32_t to, bool reverse,
                         bool cells, int32_t table) {
    const int64_t gates = kind == 0 ? 4 : kind == 1 ? 3 : 1;
    const float inverse = table >= 0 ? 90.0f : kInverse;
    return b.node(OpKind::Recurrence, std::move(inputs), to, {kind, reverse, cells, 0, 255, 10},
                  {inverse},
                  {b.weights(static_cast<uint32_t>(gates * n), out, 1, 1, bits),
                   units(gates, 0.04f * weight, 0.01f * weight), units(gates, -0.5f, 0.2f), table});
  };
  const auto products = [&](int32_t from, int64_t gates, const char* name) {
    const auto channels = static_cast<uint32_t>(gates * n);
    return b.node(OpKind::Conv, {from}, b.value(name, gates * n, 1, steps, F32),
                  {1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, {1.0f, -1e9f, 1e9f},
                  {b.weights(channels, static_cast<uint32_t>(b.p.values[from].c), 1, 1, bits),
                   units(gates, 0.06f * weight, -0.02f * weight), units(gates, 0.25f, -0.1f), -1});
  };
  const auto lstm = layer(0, {x}, b.value("lstm", n, 1, steps), false, false, b.table(1));
  const auto back = layer(0, {x, state, cell}, b.value("back", n, 1, steps), true, false, -1);
  const auto both =
      b.node(OpKind::Concat, {lstm, back}, b.value("both", 2 * n, 1, steps), {}, {}, {-1, -1});
  const auto gru = layer(1, {products(both, 3, "of_gru"), state}, b.value("gru", n, 1, steps), true,
                         false, b.table(3));
  const auto plain =
      layer(2, {products(gru, 1, "of_tanh")}, b.value("tanh", n, 1, steps), false, false, -1);
  const auto of_relu = products(plain, 1, "of_relu");
  const auto relu = layer(3, {of_relu}, b.value("relu", n, 1, steps, F32), true, false, -1);
  const auto cells = layer(0, {products(plain, 4, "of_cells"), state, cell},
                           b.value("cells", 2 * n, 1, steps, F32), false, true, -1);
  const auto last = layer(1, {products(plain, 3, "of_last")}, b.value("last", n, 1, steps, F32),
                          false, false, -1);
  b.p.inputs = {image, state, cell};
  b.p.outputs = {cells, relu, last};
  return b.p;
}

/// Linear layers with weight groups: onto a table's grid, onto a grid, and in floats.
inline Program grouped_program(int64_t inputs = 40, int64_t outputs = 18, int64_t positions = 3,
                               int bits = 4, int64_t group = 32) {
  constexpr ValueKind F32 = ValueKind::F32;
  Builder b;
  const auto layer = [&](int32_t from, int32_t to, int32_t table, std::vector<float> floats) {
    const int64_t in = b.p.values[from].c, out = b.p.values[to].c;
    std::vector<float> scale(static_cast<size_t>(out * ((in + group - 1) / group)));
    for (size_t i = 0; i < scale.size(); ++i)
      scale[i] =
          0.02f * static_cast<float>(static_cast<int>(i % 5) - 1) / static_cast<float>(1 << bits);
    std::vector<float> bias(static_cast<size_t>(out));
    for (size_t i = 0; i < bias.size(); ++i)
      bias[i] = 0.5f * static_cast<float>(i % 9);
    return b.node(OpKind::Linear, {from}, to, {group, 3, 250, 10}, std::move(floats),
                  {b.weights(static_cast<uint32_t>(out), static_cast<uint32_t>(in), 1, 1, bits),
                   b.floats(scale), b.floats(bias), table});
  };
  const auto x = b.value("x", inputs, 1, positions, F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", inputs, 1, positions));
  const auto first = layer(q, b.value("first", outputs, 1, positions), b.table(1), {40.0f, 0, 0});
  const auto next = layer(first, b.value("next", inputs, 1, positions), -1, {kInverse, 0, 0});
  const auto last =
      layer(next, b.value("last", outputs, 1, positions, F32), -1, {1.0f, -2.0f, 3.0f});
  b.p.inputs = {x};
  b.p.outputs = {last};
  return b.p;
}

/// A network of most operations that follow the size, at h x w. It takes heights and widths of 8 to
/// 64 that are multiples of 2.
inline Program sized_network(int64_t h, int64_t w) {
  constexpr ValueKind F32 = ValueKind::F32;
  Builder b;
  const auto up = [](int64_t n) { return (n + 1) / 2; };
  const int64_t h2 = h / 2, w2 = w / 2, h4 = up(h2), w4 = up(w2);
  const auto eight = b.floats(std::vector<float>(8, 0.02f));
  const auto zeros = b.floats(std::vector<float>(8, 0.25f));
  const auto conv = [&](int32_t from, const char* name, int64_t c, int64_t oh, int64_t ow,
                        int64_t stride, int bits) {
    return b.node(OpKind::Conv, {from}, b.value(name, 8, oh, ow),
                  {3, 3, stride, stride, 1, 1, 1, 1, 1, 1, 1, 0, 255, 10}, {kInverse, 0, 0},
                  {b.weights(8, static_cast<uint32_t>(c), 3, 3, bits), eight, zeros, -1});
  };
  const auto x = b.value("x", 3, h, w, F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", 3, h, w));
  const auto a = conv(q, "a", 3, h2, w2, 2, 8);
  const auto c = conv(a, "c", 8, h2, w2, 1, 4);
  const auto sum = b.node(OpKind::Add, {a, c}, b.value("sum", 8, h2, w2), {0, 255, 10},
                          {kInverse, kScale, kScale}, {-1});
  // Rounded up.
  const auto most =
      b.node(OpKind::MaxPool, {sum}, b.value("most", 8, h4, w4), {2, 2, 2, 2, 0, 0, 1, 1});
  // As large as what comes from above.
  const auto nearest = [&](int64_t in, int64_t out) {
    std::vector<int32_t> low;
    for (int64_t i = 0; i < out; ++i)
      low.push_back(static_cast<int32_t>(std::min<int64_t>(
          static_cast<int64_t>(std::floor(static_cast<float>(i) *
                                          (static_cast<float>(in) / static_cast<float>(out)))),
          in - 1)));
    return b.ints(low);
  };
  const auto rows = nearest(h4, h2), columns = nearest(w4, w2);
  const auto nothing = [&](int64_t n) {
    return b.floats(std::vector<float>(static_cast<size_t>(n), 0.0f));
  };
  const auto wide =
      b.node(OpKind::Resize, {most}, b.value("wide", 8, h2, w2), {0, 0, 255, 10}, {kInverse, 1, 0},
             {rows, rows, nothing(h2), columns, columns, nothing(w2)});
  const auto both =
      b.node(OpKind::Concat, {wide, c}, b.value("both", 16, h2, w2), {}, {}, {-1, -1});
  // Two by two channels become pixels.
  std::vector<int32_t> channel, row, column;
  for (int64_t k = 0; k < 4; ++k)
    channel.push_back(static_cast<int32_t>(k * 4 * h2 * w2));
  for (int64_t y = 0; y < h; ++y)
    row.push_back(static_cast<int32_t>(y % 2 * 2 * h2 * w2 + y / 2 * w2));
  for (int64_t k = 0; k < w; ++k)
    column.push_back(static_cast<int32_t>(k % 2 * h2 * w2 + k / 2));
  const auto shuffled = b.node(OpKind::Rearrange, {both}, b.value("shuffled", 4, h, w), {}, {},
                               {b.ints(channel), b.ints(row), b.ints(column)});
  const auto cut = b.node(OpKind::Slice, {shuffled}, b.value("cut", 4, h - 3, w), {1, 2, 1});
  const auto pooled = b.node(OpKind::AdaptiveAvgPool, {cut}, b.value("pooled", 4, 1, 1),
                             {0, 255, 10}, {kInverse, kScale}, {-1});
  const auto dense = b.node(OpKind::Dequantize, {cut}, b.value("dense", 4, h - 3, w, F32));
  const auto means = b.node(OpKind::Dequantize, {pooled}, b.value("means", 4, 1, 1, F32));
  b.p.inputs = {x};
  b.p.outputs = {dense, means};
  return b.p;
}

// Numbers of nodes: 4 is the pool, 5 the resizing, 7 the order, 8 the slice; value 3 is "c".
inline const char* const kSizedRules = R"({"axes": [["height", 8, 64, 2], ["width", 8, 64, 2]],
 "inputs": [[0, 1]], "ports": [[null, 0, 1]],
 "nodes": {"4": {"window": ["up", "up"]},
           "5": {"mode": "nearest", "resize": [["like", 3], ["like", 3]]},
           "7": {"rearrange": [
             {"parts": [[4, [4, 1, 1, 1]]]},
             {"parts": [[[1, 1, 1, 0], [1, 1, 0, 1]], [2, [2, 1, 1, 1]]]},
             {"parts": [[[1, 1, 0, 1], 1], [2, [1, 1, 1, 1]]]}]},
           "8": {"leaves": 1}},
 "outputs": [{"shape": [4, [1, 1, 1, 0], [1, 1, 0, 1]], "atoms": null},
             {"shape": [4, 1, 1], "atoms": null}]})";

inline Program ranged(int64_t h = 16, int64_t w = 20, const std::string& rules = kSizedRules) {
  Program p = sized_network(h, w);
  p.metadata["adalayer.sizes"] = rules;
  return p;
}

/// Noise for every input of a program: ids that all its tables have, or 0 to 2 where no table reads
/// them, as the bits of floats.
inline std::vector<std::vector<float>> input_noise(const Program& p, int64_t batch,
                                                   const std::function<float()>& number) {
  const std::vector<int64_t> rows = table_rows(p);
  std::vector<std::vector<float>> data;
  for (size_t k = 0; k < p.inputs.size(); ++k) {
    const Value& value = p.values[static_cast<size_t>(p.inputs[k])];
    std::vector<float>& x =
        data.emplace_back(static_cast<size_t>(batch * value.c * value.h * value.w));
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = value.kind == ValueKind::F32
                 ? number()
                 : std::bit_cast<float>(static_cast<int32_t>(static_cast<int64_t>(i * 5 + k) %
                                                             (rows[k] < 0 ? 3 : rows[k])));
  }
  return data;
}

/// The smallest useful program: its file is short enough to damage it at every bit.
inline Program small_program() {
  Builder b;
  const auto x = b.value("x", 2, 1, 1, ValueKind::F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", 2, 1, 1));
  const auto y = b.node(OpKind::Conv, {q}, b.value("y", 2, 1, 1, ValueKind::F32),
                        {1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, {1, -1, 1},
                        {b.weights(2, 2, 1, 1, 3), b.floats({1, 2}), b.floats({0, 1}), -1});
  b.p.inputs = {x};
  b.p.outputs = {y};
  b.p.metadata = {{"classes", "[\"a\"]"}};
  return b.p;
}

/// Makes every checksum of a changed file right again, as far as its tables lead anywhere: what is
/// read then are the checks behind the checksums.
inline void repair_checksums(std::vector<uint8_t>& file) {
  AdaHeader h;
  if (file.size() < sizeof h) return;
  std::memcpy(&h, file.data(), sizeof h);
  const std::span<uint8_t> all(file);
  const uint64_t table_bytes = uint64_t{h.sections} * sizeof(AdaSection);
  if (table_bytes <= file.size() - sizeof h) {
    for (uint32_t k = 0; k < h.sections; ++k) {
      uint8_t* entry = file.data() + sizeof h + k * sizeof(AdaSection);
      AdaSection s;
      std::memcpy(&s, entry, sizeof s);
      if (s.offset > file.size() || s.bytes > file.size() - s.offset) continue;
      s.checksum = formats::checksum(all.subspan(s.offset, s.bytes));
      std::memcpy(entry, &s, sizeof s);
    }
    h.table_checksum = formats::checksum(all.subspan(sizeof h, table_bytes));
  }
  std::memcpy(file.data(), &h, sizeof h);
  h.checksum = formats::checksum(all.first(offsetof(AdaHeader, checksum)));
  std::memcpy(file.data(), &h, sizeof h);
}

/// A program whose weights have `drop` bits less (2 at least), with scales and grids of its own:
/// what a level of lower quality of it may be.
inline Program narrowed(Program p, int drop) {
  for (Constant& c : p.constants) {
    if (c.kind != ConstantKind::Weights) continue;
    const SharedBytes& stored = c.bytes;
    const formats::CanonicalHeader h = formats::read_header(stored);
    const int bits = std::max<int>(2, h.bits - drop);
    c.bytes = formats::pack_canonical(formats::unpack_canonical(stored, {bits, h.bits - bits}),
                                      bits, h.out_channels, h.group_in, h.kernel_h, h.kernel_w);
  }
  const float factor = 1.0f + 0.01f * static_cast<float>(drop);
  for (Value& v : p.values)
    if (v.name == "conv") v.scale *= factor;
  for (Node& n : p.nodes) {
    if (n.op != OpKind::Conv) continue;
    if (p.values[n.output].name == "conv") n.floats[0] = 1.0f / p.values[n.output].scale;
    Constant scale = p.constants[n.constants[1]];
    auto* numbers = reinterpret_cast<float*>(scale.bytes.data());  // a copy of its own
    for (size_t k = 0; k < scale.bytes.size() / 4; ++k)
      numbers[k] *= static_cast<float>(1 << drop) * factor;
    n.constants[1] = static_cast<int32_t>(p.constants.size());
    p.constants.push_back(std::move(scale));
  }
  return p;
}

/// Convolutions in the forms that have kernels of their own.
inline Program convolutions() {
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

/// Three levels of quality.
inline Program leveled() {
  Program p = convolutions();
  for (const int drop : {2, 4})
    add_level(p, narrowed(convolutions(), drop));
  return p;
}

}  // namespace programs

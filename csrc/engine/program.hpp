// The engine's program: a device-neutral, serialisable list of operations over u8 images.
//
// A program says what is computed, never how: no layout, no instruction set, no thread count. The
// planner (plan.hpp) derives those for the machine at hand. Values are numbered; node k writes
// exactly one value, and reads only values that program inputs or nodes before k wrote.
//
// Every value has four axes: the batch, which is dynamic, and c x h x w. A vector of n features is
// n x 1 x 1. The arithmetic of each operation is in reference/spec.hpp and
// reference/image_spec.hpp.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/shared_bytes.hpp"
#include "engine/operations.hpp"
#include "formats/canonical.hpp"
#include "reference/attention.hpp"
#include "reference/float_conv.hpp"
#include "reference/image_spec.hpp"
#include "reference/linear.hpp"
#include "reference/recurrence.hpp"
#include "reference/spec.hpp"

namespace adalayer::engine {

/// One tensor. For U8, real = (q - zero_point) * scale with q in 0 .. qmax. F32 values are NCHW at
/// the program's boundary (inputs and outputs) and inside. I32 values are program inputs of one
/// channel: token ids, which Embedding reads, or what Choose makes floats of.
struct Value {
  std::string name;
  ValueKind kind = ValueKind::U8;
  int64_t c = 0, h = 1, w = 1;
  float scale = 1.0f;
  int32_t zero_point = 0;
  int32_t qmax = 255;
};

/// Parameters are lists, in the order of the operation's entry in operations.hpp; validate() checks
/// each count and range. Of operands the real values count: levels on the grids of their values. No
/// level that a program computes exceeds the qmax of its value.
///
/// Constants as large as an image are in the order in which images lie in memory: rows, columns,
/// channels; those of float values channels, rows, columns.
struct Node {
  OpKind op = OpKind::Quantize;
  std::string name;  // of the layer, as the model calls it
  std::vector<int32_t> inputs;
  int32_t output = -1;
  std::vector<int64_t> ints;
  std::vector<float> floats;
  std::vector<int32_t> constants;
};

/// Bytes that nodes refer to by number. Weights are canonical (formats/canonical.hpp).
struct Constant {
  ConstantKind kind = ConstantKind::F32;
  SharedBytes bytes;
  formats::Planes planes = {};  // of weights: what a level of lower quality reads of them

  std::span<const float> f32() const {
    return {reinterpret_cast<const float*>(bytes.data()), bytes.size() / 4};
  }
  std::span<const int32_t> i32() const {
    return {reinterpret_cast<const int32_t*>(bytes.data()), bytes.size() / 4};
  }
};

/// The same network at a lower quality: what differs from the program. Operations, their order and
/// sizes do not; grids, scales, biases and tables may. Weights are planes of the program's.
struct Level {
  struct View {
    int32_t constant = -1;
    formats::Planes planes;
  };
  // Its nodes refer to them by the numbers behind those of the program's constants.
  std::vector<View> views;
  std::vector<std::pair<int32_t, Value>> values;  // by number, ascending
  std::vector<std::pair<int32_t, Node>> nodes;
};

struct Program {
  std::vector<Value> values;
  std::vector<Node> nodes;
  std::vector<Constant> constants;
  std::vector<int32_t> inputs;   // F32 and I32 values
  std::vector<int32_t> outputs;  // F32 values
  // "classes" and "preprocessing" (JSON texts) and whatever else the writer adds.
  std::map<std::string, std::string> metadata;
  std::vector<Level> levels;  // falling quality; the program itself is level 0 (levels.hpp)
};

/// Checks everything that execution relies on: counts and ranges of every node's parameters, value
/// and constant numbers, order, shapes, grids, constant sizes, accumulator bounds (law 1), and
/// limits on sizes (kMax...). Throws InvalidArgument naming the node; a program that passes can be
/// planned and run without further checks of its own data.
void validate(const Program& program);

constexpr int64_t kMaxNodes = 1 << 16;
constexpr int64_t kMaxPorts = 1 << 10;  // program inputs, and program outputs
constexpr int64_t kMaxConstants = 1 << 18;
constexpr int64_t kMaxLevels = 16;            // the program itself among them
constexpr int64_t kMaxElements = 1LL << 31;   // c * h * w of one value, its padding included
constexpr int64_t kMaxInterleaved = 1 << 12;  // of a transposed convolution: strides multiplied
constexpr int64_t kMaxName = 1 << 12;         // bytes of a name or of a metadata key
constexpr int64_t kMaxMetadata = 1 << 12;     // entries
constexpr int64_t kMaxText = 1 << 26;         // bytes of one metadata entry

// ---- named views of a node's parameters; the program has been validated ------------------------
// Pointers go into the program's constants.

struct ConvAttributes {
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  int64_t dilation_h, dilation_w, groups;
  int32_t lo, hi, zero_point;
  float f32_lo, f32_hi;
  int32_t weights, scale, bias, table;  // constants; table may be -1
};
/// Conv and ConvTranspose.
ConvAttributes conv_attributes(const Node& node);
/// Conv and FloatConv, at batch 1.
ConvShape conv_shape(const Program& program, const Node& node);

struct SliceAttributes {
  int axis;  // 0 = c, 1 = h, 2 = w
  int64_t begin, step;
};
SliceAttributes slice_attributes(const Node& node);

struct PadAttributes {
  int64_t top, left, bottom, right;
  uint8_t level;
};
PadAttributes pad_attributes(const Node& node);

/// Concat and Join: 0 = c, 1 = h, 2 = w.
int joined_axis(const Node& node);

struct ChooseAttributes {
  bool any;
  float zero, other;
};
ChooseAttributes choose_attributes(const Node& node);

/// The finish of any operation that has one, its table included.
U8Finish node_finish(const Program& program, const Node& node);
/// Of Conv, ConvTranspose, FloatConv, Recurrence and Linear.
const Constant& weights_of(const Program& program, const Node& node);
/// Of a constant that holds weights: bits of what is read, and what is read, [O][I][KH][KW]. Throw
/// CorruptData.
int weight_bits(const Constant& weights);
std::vector<int8_t> unpacked_weights(const Constant& weights);
/// What a Constant gives.
const Constant& held_values(const Program& program, const Node& node);
/// Of a Lookup.
const uint8_t* lookup_table(const Program& program, const Node& node);
/// Input channel of every output channel of a Gather.
std::span<const int32_t> gather_index(const Program& program, const Node& node);
/// Bytes of a 256-entry table; null for -1.
const uint8_t* table_bytes(const Program& program, int32_t constant);
ActivationGrid value_grid(const Value& value);

RearrangeSpec rearrange_spec(const Program& program, const Node& node);
/// Add and Mul.
PairSpec pair_spec(const Program& program, const Node& node);
AffineSpec affine_spec(const Program& program, const Node& node);
AffineImageSpec affine_image_spec(const Program& program, const Node& node);
/// MaxPool, AvgPool, AdaptiveAvgPool.
PoolSpec pool_spec(const Program& program, const Node& node);
ResizeSpec resize_spec(const Program& program, const Node& node);
/// LayerNorm and RmsNorm.
LayerNormSpec layer_norm_spec(const Program& program, const Node& node);
GroupNormSpec group_norm_spec(const Program& program, const Node& node);
FloatFunctionSpec function_spec(const Node& node);
FloatPair combine_pair(const Node& node);
ReduceSpec reduce_spec(const Program& program, const Node& node);
/// FloatConv, at batch 1. Its weights are null where they are packed.
FloatConvSpec float_conv_spec(const Program& program, const Node& node);
/// Packed weights of a FloatConv as floats; empty where they are floats.
std::vector<float> unpacked_floats(const Program& program, const Node& node);
AttentionShape attention_shape(const Program& program, const Node& node);
AttentionSpec attention_spec(const Program& program, const Node& node);
EmbeddingSpec embedding_spec(const Program& program, const Node& node);
RecurrenceSpec recurrence_spec(const Program& program, const Node& node);
LinearSpec linear_spec(const Program& program, const Node& node);

}  // namespace adalayer::engine

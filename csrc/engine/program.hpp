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
#include <vector>

#include "reference/attention.hpp"
#include "reference/float_conv.hpp"
#include "reference/image_spec.hpp"
#include "reference/spec.hpp"

namespace adalayer::engine {

enum class ValueKind : uint8_t { U8 = 0, F32 = 1, I32 = 2 };

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

/// Parameters of a node are lists, in the order that is given here; validate() checks each count
/// and range. "finish" stands for three ints (lo, hi, zero_point), lo and hi levels in 0..255 and
/// lo <= hi, of the grid before the table, and "inv" for 1 / scale of that grid; without a table it
/// is the output value's grid. Of operands the real values count: levels on the grids of their
/// values. [t] marks an optional constant: -1 in its place if absent. Parameters that a form of an
/// operation does not use are present all the same and in range.
///
/// Operations that move levels (Slice, Gather, Pad, MaxPool, Reshape, Rearrange, nearest Resize,
/// and Concat and Join where they have no table) have the grid of their input as the grid of their
/// output. No level that a program computes exceeds the qmax of its value.
///
/// Constants as large as an image are in the order in which images lie in memory: rows, columns,
/// channels; those of float values channels, rows, columns.
///
/// Norms and attention also give floats (u8 -> f32); norms, Affine, Rearrange and Constant also
/// work on floats (f32 -> f32). Then finish and inv are ignored, and there is no table.
///
/// operation   inputs      ints                                  floats             constants
enum class OpKind : uint8_t {
  // f32 -> u8 on the output value's grid.
  Quantize = 0,  // x        -                                    -                  -
  // u8 -> f32.
  Dequantize = 1,  // x      -                                    -                  -
  // u8 -> u8, or u8 -> f32 (then finish and inv are ignored, floats lo and hi, possibly infinite,
  // clamp, and there is no table).
  // A linear layer over c x h x w features flattened in NCHW order is a convolution with an h x w
  // kernel.
  Conv = 2,  //    x [res]   kh kw sh sw pt pl pb pr dh dw groups finish
  //                                                      inv lo hi    weights scale bias [table]
  // As Conv; ints: kh kw sh sw pt pl pb pr dh dw groups finish, where the output's size says how
  // far the output padding reaches: out(oy) collects iy * sh - pt + ky * dh = oy. Weights are
  // [O][I/groups][KH][KW], not flipped.
  ConvTranspose = 3,
  Lookup = 4,  // x         -                                    -                  table [256]
  // scale_a and scale_b are those of the operands' grids, up to a factor (a difference's -1).
  Add = 5,     // a b       finish                        inv scale_a scale_b       [table]
  Mul = 6,     // a b       finish                        inv scale_a scale_b       [table]
  Affine = 7,  // x         finish                              inv            scale bias [table]
  Concat = 8,  // x ...     -                                    -        one [table] per input
  // Every window of a pooling operation contains a position of the image. The averages also take
  // f32 to f32 (float_tail.hpp); then inv, ratio and finish are not used and there is no table.
  MaxPool = 9,   // x         kh kw sh sw pt pl dh dw              -                  -
  AvgPool = 10,  // x         kh kw sh sw pt pl pb pr count_padding finish inv ratio  [table]
  AdaptiveAvgPool = 11,  // x  finish                           inv ratio            [table]
  // begin and step along an axis (0 = c, 1 = h, 2 = w); the output's size ends it.
  Slice = 12,  // x         axis begin step                      -                  -
  // Output channel i is input channel index[i] (channel shuffle and any other permutation).
  Gather = 13,  // x         -                                    -                  index i32 [C]
  Pad = 14,     // x         top left bottom right level          -                  -
  // Tables as in ResizeSpec, all six always; also f32 -> f32. inv, scale, offset and finish are
  // used by bilinear u8 only.
  Resize = 15,     // x         bilinear finish               inv scale offset
                   //                                        low_h high_h part_h low_w high_w part_w
  LayerNorm = 16,  // x      finish                        inv eps               gamma beta
  // u8: c x h x w to (c*h*w) x 1 x 1 in NCHW order, or back: sizes from the values.
  Reshape = 17,  // x        -                                    -                  -
  // Over channels, f32 -> f32; a float tail with a stated tolerance.
  Softmax = 18,  // x        -                                    -                  -
  // Output element (c, y, x) is element channel[c] + row[y] + column[x] of the input, counted in
  // NCHW order; no entry is negative. Permuted axes, windows, pixel shuffles, flips, rolls,
  // borders.
  Rearrange = 19,  // x      -                                    -      channel row column: i32
  // f32 -> f32, behind the last quantized layer: a FloatFunction; a FloatPair of equal shapes.
  Function = 20,  // x       function                             a b                -
  Combine = 21,   // a b     pair                                 -                  -
  // softmax(scale q k^T + mask) v for every head (reference/attention.hpp); scale with those of the
  // grids of q and k. Channels are [head][..]; positions are tokens, of one sequence, or of one per
  // row of the image. The mask is f32 [rows or 1][heads or 1][queries][keys]. A fourth input is
  // f32, 1 x 1 x keys: a mask of the keys, of one sequence; the lower one of the two counts.
  Attention = 22,  // q k v [keys]  heads key_heads rows causal mask_rows mask_heads finish
                   //                                             inv scale          [mask]
  // As Affine; scale and bias have an entry per channel or per element of the image.
  AffineImage = 23,  // x    finish                              inv            scale bias [table]
  // The same levels, or floats, for every image: no inputs.
  Constant = 24,  // -       -                                    -      u8 or f32 [H*W*C]
  // As Concat, along an axis (1 = h, 2 = w).
  Join = 25,  //     x ...   axis                                 -        one [table] per input
  // i32 -> u8: position (y, x) gets the features of the row of the table that its id names, levels
  // on the output's grid. The table is [rows][C]; an id is 0 .. rows - 1 (token_ids.hpp).
  Embedding =
      26,  // ids    -                                    -                  table [rows * C]
  // As LayerNorm, with the input's zero point in the place of the mean.
  RmsNorm = 27,  // x        finish                        inv eps               gamma beta
  // Over h x w and the channels of each group.
  GroupNorm = 28,  // x      groups finish                       inv eps            gamma beta
  // f32 -> f32 (reference/float_conv.hpp). Weights are f32 [O][I/groups][KH][KW], or canonical ones
  // that the scale of their output channel multiplies; only these have a scale.
  FloatConv = 29,  // x      kh kw sh sw pt pl pb pr dh dw groups   lo hi     weights [scale] bias
  // i32 -> f32: the first float for 0, the second one for 1, and for all other numbers, if any are
  // allowed.
  Choose = 30,  //    x      any                                    zero other       -
};
constexpr int kOpKinds = 31;

/// Whether an operation has that number.
bool is_operation(uint32_t number);

/// "conv", "avg_pool", ...; and back, throwing InvalidArgument for an unknown name.
const char* op_name(OpKind op);
OpKind op_from_name(std::string_view name);

struct Node {
  OpKind op = OpKind::Quantize;
  std::string name;  // of the layer, as the model calls it
  std::vector<int32_t> inputs;
  int32_t output = -1;
  std::vector<int64_t> ints;
  std::vector<float> floats;
  std::vector<int32_t> constants;
};

enum class ConstantKind : uint8_t { Weights = 0, F32 = 1, I32 = 2, U8 = 3 };

/// Bytes that nodes refer to by number. Weights are canonical (formats/canonical.hpp).
struct Constant {
  ConstantKind kind = ConstantKind::F32;
  std::vector<uint8_t> bytes;

  std::span<const float> f32() const {
    return {reinterpret_cast<const float*>(bytes.data()), bytes.size() / 4};
  }
  std::span<const int32_t> i32() const {
    return {reinterpret_cast<const int32_t*>(bytes.data()), bytes.size() / 4};
  }
};

struct Program {
  std::vector<Value> values;
  std::vector<Node> nodes;
  std::vector<Constant> constants;
  std::vector<int32_t> inputs;   // F32 and I32 values
  std::vector<int32_t> outputs;  // F32 values
  // "classes" and "preprocessing" (JSON texts) and whatever else the writer adds.
  std::map<std::string, std::string> metadata;
};

/// Checks everything that execution relies on: counts and ranges of every node's parameters, value
/// and constant numbers, order, shapes, grids, constant sizes, accumulator bounds (law 1), and
/// limits on sizes (kMax...). Throws InvalidArgument naming the node; a program that passes can be
/// planned and run without further checks of its own data.
void validate(const Program& program);

constexpr int64_t kMaxNodes = 1 << 16;
constexpr int64_t kMaxPorts = 1 << 10;  // program inputs, and program outputs
constexpr int64_t kMaxConstants = 1 << 18;
constexpr int64_t kMaxAxis = 1 << 20;         // any of c, h, w; kernel, stride, padding, dilation
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

/// The finish of any operation that has one, its table included.
U8Finish node_finish(const Program& program, const Node& node);
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
/// FloatConv, at batch 1. Its weights are null where they are packed.
FloatConvSpec float_conv_spec(const Program& program, const Node& node);
/// Packed weights of a FloatConv as floats; empty where they are floats.
std::vector<float> unpacked_floats(const Program& program, const Node& node);
AttentionShape attention_shape(const Program& program, const Node& node);
AttentionSpec attention_spec(const Program& program, const Node& node);
EmbeddingSpec embedding_spec(const Program& program, const Node& node);

}  // namespace adalayer::engine

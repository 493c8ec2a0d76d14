// The table of operations: what each is called, which kinds of values it reads and gives, and its
// parameters by name. Whatever deals with parameters asks this table: validation (counts, ranges,
// kinds), views of nodes, the version of a file, programs written in Python, tests and fuzzing.
//
// Numbers of operations and places of parameters are part of the .ada format: only ever append.
// The arithmetic of each operation is in reference/spec.hpp and reference/image_spec.hpp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>

#include "reference/float_kinds.hpp"

namespace adalayer::engine {

enum class ValueKind : uint8_t { U8 = 0, F32 = 1, I32 = 2 };
enum class ConstantKind : uint8_t { Weights = 0, F32 = 1, I32 = 2, U8 = 3 };

const char* kind_name(ValueKind kind);
const char* kind_name(ConstantKind kind);

enum class OpKind : uint8_t {
  // Onto the output value's grid; and back.
  Quantize = 0,
  Dequantize = 1,
  // A linear layer over c x h x w features flattened in NCHW order is a convolution with an h x w
  // kernel.
  Conv = 2,
  // The output's size says how far the output padding reaches:
  // out(oy) collects iy * stride - pad + ky * dilation = oy. Weights are [O][I/groups][KH][KW], not
  // flipped.
  ConvTranspose = 3,
  Lookup = 4,
  Add = 5,
  Mul = 6,
  Affine = 7,
  Concat = 8,  // along channels
  // Every window of a pooling operation contains a position of the image.
  MaxPool = 9,
  AvgPool = 10,
  AdaptiveAvgPool = 11,
  // Of one axis (0 = c, 1 = h, 2 = w); the output's size ends it.
  Slice = 12,
  // Output channel i is input channel index[i] (channel shuffle and any other permutation).
  Gather = 13,
  Pad = 14,
  Resize = 15,  // tables as in ResizeSpec
  LayerNorm = 16,
  // c x h x w to (c*h*w) x 1 x 1 in NCHW order, or back: sizes from the values.
  Reshape = 17,
  Softmax = 18,  // over channels; a float tail with a stated tolerance
  // Output element (c, y, x) is element channel[c] + row[y] + column[x] of the input, counted in
  // NCHW order; no entry is negative. Permuted axes, windows, pixel shuffles, flips, rolls,
  // borders.
  Rearrange = 19,
  // Of floats, behind the last quantized layer or between layers: a FloatFunction; a FloatPair,
  // whose operands have the output's size along each axis, or 1.
  Function = 20,
  Combine = 21,
  // softmax(scale q k^T + mask) v for every head (reference/attention.hpp); scale with those of the
  // grids of q and k. Channels are [head][..]; positions are tokens, of one sequence, or of one per
  // row of the image. The mask is f32 [rows or 1][heads or 1][queries][keys]. A fourth input is
  // f32, 1 x 1 x keys: a mask of the keys, of one sequence; the lower one of the two counts.
  Attention = 22,
  AffineImage = 23,  // as Affine; scale and bias have an entry per channel or per element
  Constant = 24,     // the same levels, or floats, for every image
  Join = 25,         // as Concat, along height (1) or width (2)
  // Position (y, x) gets the features of the row of the table that its id names, levels on the
  // output's grid. The table is [rows][C]; an id is 0 .. rows - 1 (token_ids.hpp).
  Embedding = 26,
  RmsNorm = 27,    // as LayerNorm, with the input's zero point in the place of the mean
  GroupNorm = 28,  // over h x w and the channels of each group
  // reference/float_conv.hpp. Weights are f32 [O][I/groups][KH][KW], or canonical ones that the
  // scale of their output channel multiplies; only these have a scale.
  FloatConv = 29,
  // The first float for 0, the second one for 1, and for all other numbers, if any are allowed.
  Choose = 30,
  // A recurrent layer in one direction (reference/recurrence.hpp); positions are its steps. Inputs
  // are what the layer's inputs contribute to its gates, the state before the first step (1 x 1),
  // and of an LSTM the cell's; zeros where there are none. Weights are [gates * H][H]; the finish
  // is
  // the grid of the state, also where the result is floats.
  Recurrence = 31,
  Reduce = 32,  // a Reduction along whole axes, which have size 1 then
  // A 1x1 convolution with scales for groups of input channels (reference/linear.hpp):
  // [C][groups], of group_size input channels each; the last one may have fewer.
  Linear = 33,
};
constexpr int kOpKinds = 34;

constexpr int64_t kMaxAxis = 1 << 20;  // any of c, h, w; kernel, stride, padding, dilation

constexpr int64_t kNoUsual = std::numeric_limits<int64_t>::min();

/// A whole number from `low` to `high`. What else bounds it, such as groups dividing channels, is
/// in validate.cpp. `usual` is what a writer need not say.
struct IntParameter {
  std::string_view name;
  int64_t low, high;
  int64_t usual = kNoUsual;
};

struct FloatParameter {
  std::string_view name;
  bool has_usual = false;
  float usual = 0.0f;
};

/// Of one kind or the other. An optional one is -1 in its place if absent.
struct ConstantParameter {
  std::string_view name;
  ConstantKind kind, other = kind;
  bool optional = false;
};

/// What all inputs are, and the output, from a minor version of the format on.
struct Form {
  ValueKind inputs, output;
  uint16_t minor = 0;
};

constexpr int kAnyNumber = -1;  // one or more

/// "lo", "hi", "zero_point" among the ints, levels of the grid before the table with lo <= hi, and
/// "inv" as the first float, 1 / scale of that grid, are the finish of a result in levels
/// (reference/image_spec.hpp). Without a table it is the output value's grid; where the result is
/// floats, it is ignored, and there is no table. Parameters that a form of an operation does not
/// use are present all the same and in range.
struct Operation {
  std::string_view name;
  uint16_t minor = 0;  // of the format that it came with
  int inputs_min = 1, inputs_max = 1;
  std::span<const Form> forms = {};
  std::span<const IntParameter> ints = {};
  std::span<const FloatParameter> floats = {};
  std::span<const ConstantParameter> constants = {};
  bool table_per_input = false;  // [table], instead of constants
  bool same_shape = false;       // its output has the shape of its first input
  bool moves = false;            // levels as they are: its output has the grid of its first input

  /// Place of a parameter; -1 for none.
  constexpr int int_place(std::string_view wanted) const { return place(ints, wanted); }
  constexpr int float_place(std::string_view wanted) const { return place(floats, wanted); }
  constexpr int constant_place(std::string_view wanted) const { return place(constants, wanted); }
  constexpr int finish() const { return int_place("lo"); }
  constexpr int table() const { return constant_place("table"); }

 private:
  template <typename Parameter>
  static constexpr int place(std::span<const Parameter> all, std::string_view wanted) {
    for (size_t k = 0; k < all.size(); ++k)
      if (all[k].name == wanted) return static_cast<int>(k);
    return -1;
  }
};

namespace table {

template <typename T, size_t N, size_t M>
constexpr std::array<T, N + M> joined(const std::array<T, N>& a, const std::array<T, M>& b) {
  std::array<T, N + M> all{};
  for (size_t k = 0; k < N; ++k)
    all[k] = a[k];
  for (size_t k = 0; k < M; ++k)
    all[N + k] = b[k];
  return all;
}

constexpr ValueKind u8 = ValueKind::U8, f32 = ValueKind::F32, i32 = ValueKind::I32;
constexpr float kInf = std::numeric_limits<float>::infinity();

inline constexpr Form kToLevels[] = {{f32, u8}};
inline constexpr Form kToFloats[] = {{u8, f32}};
inline constexpr Form kLevels[] = {{u8, u8}};
inline constexpr Form kFloats[] = {{f32, f32}};
inline constexpr Form kLevelsToEither[] = {{u8, u8}, {u8, f32}};
inline constexpr Form kEach[] = {{u8, u8}, {f32, f32}};
inline constexpr Form kEachFrom3[] = {{u8, u8}, {f32, f32, 3}};
inline constexpr Form kEachFrom6[] = {{u8, u8}, {f32, f32, 6}};
inline constexpr Form kToFloat[] = {{u8, f32}, {f32, f32}};
inline constexpr Form kNorms[] = {{u8, u8}, {u8, f32, 3}, {f32, f32, 3}};
inline constexpr Form kAttention[] = {{u8, u8}, {u8, f32, 3}};
inline constexpr Form kIds[] = {{i32, u8}};
inline constexpr Form kChoices[] = {{i32, f32}};
inline constexpr Form kLinear[] = {{u8, u8, 6}, {u8, f32, 6}};
inline constexpr Form kRecurrence[] = {{f32, u8, 5}, {f32, f32, 5}};

using Ints1 = std::array<IntParameter, 1>;
inline constexpr std::array<IntParameter, 3> kFinish = {
    {{"lo", 0, 255, 0}, {"hi", 0, 255, 255}, {"zero_point", 0, 255, 0}}};
inline constexpr std::array<IntParameter, 11> kGeometry = {{{"kernel_h", 1, kMaxAxis},
                                                            {"kernel_w", 1, kMaxAxis},
                                                            {"stride_h", 1, kMaxAxis, 1},
                                                            {"stride_w", 1, kMaxAxis, 1},
                                                            {"pad_top", 0, kMaxAxis, 0},
                                                            {"pad_left", 0, kMaxAxis, 0},
                                                            {"pad_bottom", 0, kMaxAxis, 0},
                                                            {"pad_right", 0, kMaxAxis, 0},
                                                            {"dilation_h", 1, kMaxAxis, 1},
                                                            {"dilation_w", 1, kMaxAxis, 1},
                                                            {"groups", 1, kMaxAxis, 1}}};
inline constexpr auto kConvInts = joined(kGeometry, kFinish);
// A last window of a maximum may reach beyond the image, as far as a bottom padding would.
inline constexpr std::array<IntParameter, 8> kMaxPoolInts = {{{"kernel_h", 1, kMaxAxis},
                                                              {"kernel_w", 1, kMaxAxis},
                                                              {"stride_h", 1, kMaxAxis},
                                                              {"stride_w", 1, kMaxAxis},
                                                              {"pad_top", 0, kMaxAxis, 0},
                                                              {"pad_left", 0, kMaxAxis, 0},
                                                              {"dilation_h", 1, kMaxAxis, 1},
                                                              {"dilation_w", 1, kMaxAxis, 1}}};
inline constexpr auto kAvgPoolInts =
    joined(std::array<IntParameter, 9>{{{"kernel_h", 1, kMaxAxis},
                                        {"kernel_w", 1, kMaxAxis},
                                        {"stride_h", 1, kMaxAxis},
                                        {"stride_w", 1, kMaxAxis},
                                        {"pad_top", 0, kMaxAxis, 0},
                                        {"pad_left", 0, kMaxAxis, 0},
                                        {"pad_bottom", 0, kMaxAxis, 0},
                                        {"pad_right", 0, kMaxAxis, 0},
                                        {"count_padding", 0, 1, 1}}},
           kFinish);
inline constexpr IntParameter kSliceInts[] = {
    {"axis", 0, 2}, {"begin", 0, kMaxAxis}, {"step", 1, kMaxAxis, 1}};
inline constexpr IntParameter kPadInts[] = {{"top", 0, kMaxAxis},
                                            {"left", 0, kMaxAxis},
                                            {"bottom", 0, kMaxAxis},
                                            {"right", 0, kMaxAxis},
                                            {"level", 0, 255}};
inline constexpr auto kResizeInts = joined(Ints1{{{"bilinear", 0, 1}}}, kFinish);
inline constexpr IntParameter kFunctionInts[] = {{"function", 0, kFloatFunctions - 1}};
inline constexpr IntParameter kCombineInts[] = {{"pair", 0, kFloatPairs - 1}};
inline constexpr auto kAttentionInts =
    joined(std::array<IntParameter, 6>{{{"heads", 1, kMaxAxis},
                                        {"key_heads", 1, kMaxAxis},
                                        {"rows", 0, 1, 0},
                                        {"causal", 0, 1, 0},
                                        {"mask_rows", 0, 1, 0},
                                        {"mask_heads", 0, 1, 0}}},
           kFinish);
inline constexpr IntParameter kReduceInts[] = {
    {"kind", 0, kReductions - 1}, {"along_c", 0, 1, 0}, {"along_h", 0, 1, 0}, {"along_w", 0, 1, 0}};
inline constexpr IntParameter kJoinInts[] = {{"axis", 1, 2}};
inline constexpr auto kGroupNormInts = joined(Ints1{{{"groups", 1, kMaxAxis}}}, kFinish);
inline constexpr IntParameter kChooseInts[] = {{"any", 0, 1}};
inline constexpr auto kRecurrenceInts = joined(
    std::array<IntParameter, 3>{
        {{"kind", 0, kRecurrentKinds - 1}, {"reverse", 0, 1, 0}, {"cells", 0, 1, 0}}},
    kFinish);

inline constexpr auto kLinearInts = joined(Ints1{{{"group_size", 32, 128}}}, kFinish);

inline constexpr FloatParameter kInverse[] = {{"inv", true, 1.0f}};
// The clamp of a float result.
inline constexpr FloatParameter kConvFloats[] = {
    {"inv", true, 1.0f}, {"clamp_lo", true, -kInf}, {"clamp_hi", true, kInf}};
// Of the operands' grids, up to a factor (a difference's -1).
inline constexpr FloatParameter kPairFloats[] = {{"inv", true, 1.0f}, {"scale_a"}, {"scale_b"}};
inline constexpr FloatParameter kAverageFloats[] = {{"inv", true, 1.0f}, {"ratio", true, 1.0f}};
inline constexpr FloatParameter kResizeFloats[] = {
    {"inv", true, 1.0f}, {"scale", true, 1.0f}, {"offset", true, 0.0f}};
inline constexpr FloatParameter kNormFloats[] = {{"inv", true, 1.0f}, {"eps"}};
inline constexpr FloatParameter kFunctionFloats[] = {{"a", true, 0.0f}, {"b", true, 0.0f}};
inline constexpr FloatParameter kAttentionFloats[] = {{"inv", true, 1.0f}, {"scale"}};
inline constexpr FloatParameter kFloatConvFloats[] = {{"clamp_lo", true, -kInf},
                                                      {"clamp_hi", true, kInf}};
inline constexpr FloatParameter kChooseFloats[] = {{"zero"}, {"other"}};

constexpr ConstantKind F32 = ConstantKind::F32, I32 = ConstantKind::I32, U8 = ConstantKind::U8;
constexpr ConstantParameter one(std::string_view name, ConstantKind kind) { return {name, kind}; }
constexpr ConstantParameter optional(std::string_view name, ConstantKind kind) {
  return {name, kind, kind, true};
}
inline constexpr ConstantParameter kTable[] = {optional("table", U8)};
inline constexpr ConstantParameter kConvConstants[] = {one("weights", ConstantKind::Weights),
                                                       one("scale", F32), one("bias", F32),
                                                       optional("table", U8)};
inline constexpr ConstantParameter kLookupConstants[] = {one("table", U8)};
inline constexpr ConstantParameter kLineConstants[] = {one("scale", F32), one("bias", F32),
                                                       optional("table", U8)};
inline constexpr ConstantParameter kIndex[] = {one("index", I32)};
inline constexpr ConstantParameter kResizeConstants[] = {one("low_h", I32),  one("high_h", I32),
                                                         one("part_h", F32), one("low_w", I32),
                                                         one("high_w", I32), one("part_w", F32)};
inline constexpr ConstantParameter kNormConstants[] = {one("gamma", F32), one("beta", F32)};
inline constexpr ConstantParameter kRearrangeConstants[] = {one("channel", I32), one("row", I32),
                                                            one("column", I32)};
inline constexpr ConstantParameter kMask[] = {optional("mask", F32)};
inline constexpr ConstantParameter kHeld[] = {{"values", U8, F32}};
inline constexpr ConstantParameter kFloatConvConstants[] = {
    {"weights", F32, ConstantKind::Weights}, optional("scale", F32), one("bias", F32)};
inline constexpr ConstantParameter kRecurrenceConstants[] = {one("weights", ConstantKind::Weights),
                                                             one("scale", F32), one("bias", F32),
                                                             optional("table", U8)};

}  // namespace table

/// By number.
inline constexpr Operation kOperations[kOpKinds] = {
    {.name = "quantize", .forms = table::kToLevels, .same_shape = true},
    {.name = "dequantize", .forms = table::kToFloats, .same_shape = true},
    // A second input is the residual, which is added before the clamp.
    {.name = "conv",
     .inputs_max = 2,
     .forms = table::kLevelsToEither,
     .ints = table::kConvInts,
     .floats = table::kConvFloats,
     .constants = table::kConvConstants},
    {.name = "conv_transpose",
     .inputs_max = 2,
     .forms = table::kLevelsToEither,
     .ints = table::kConvInts,
     .floats = table::kConvFloats,
     .constants = table::kConvConstants},
    {.name = "lookup",
     .forms = table::kLevels,
     .constants = table::kLookupConstants,
     .same_shape = true},
    // A second operand of 1 x 1 has one level per channel.
    {.name = "add",
     .inputs_min = 2,
     .inputs_max = 2,
     .forms = table::kLevels,
     .ints = table::kFinish,
     .floats = table::kPairFloats,
     .constants = table::kTable,
     .same_shape = true},
    {.name = "mul",
     .inputs_min = 2,
     .inputs_max = 2,
     .forms = table::kLevels,
     .ints = table::kFinish,
     .floats = table::kPairFloats,
     .constants = table::kTable,
     .same_shape = true},
    {.name = "affine",
     .forms = table::kEachFrom3,
     .ints = table::kFinish,
     .floats = table::kInverse,
     .constants = table::kLineConstants,
     .same_shape = true},
    // Floats have no tables.
    {.name = "concat",
     .inputs_max = kAnyNumber,
     .forms = table::kEachFrom6,
     .table_per_input = true},
    {.name = "max_pool", .forms = table::kEachFrom3, .ints = table::kMaxPoolInts, .moves = true},
    {.name = "avg_pool",
     .forms = table::kEach,
     .ints = table::kAvgPoolInts,
     .floats = table::kAverageFloats,
     .constants = table::kTable},
    {.name = "adaptive_avg_pool",
     .forms = table::kEach,
     .ints = table::kFinish,
     .floats = table::kAverageFloats,
     .constants = table::kTable},
    {.name = "slice", .forms = table::kLevels, .ints = table::kSliceInts, .moves = true},
    {.name = "gather", .forms = table::kLevels, .constants = table::kIndex, .moves = true},
    {.name = "pad", .forms = table::kLevels, .ints = table::kPadInts, .moves = true},
    // Nearest: levels move, and finish, scale and offset are ignored, as they are for floats.
    {.name = "resize",
     .forms = table::kEach,
     .ints = table::kResizeInts,
     .floats = table::kResizeFloats,
     .constants = table::kResizeConstants},
    {.name = "layer_norm",
     .forms = table::kNorms,
     .ints = table::kFinish,
     .floats = table::kNormFloats,
     .constants = table::kNormConstants,
     .same_shape = true},
    {.name = "reshape", .forms = table::kLevels, .moves = true},
    {.name = "softmax", .forms = table::kFloats, .same_shape = true},
    {.name = "rearrange",
     .minor = 1,
     .forms = table::kEachFrom3,
     .constants = table::kRearrangeConstants,
     .moves = true},
    {.name = "function",
     .minor = 1,
     .forms = table::kFloats,
     .ints = table::kFunctionInts,
     .floats = table::kFunctionFloats,
     .same_shape = true},
    {.name = "combine",
     .minor = 1,
     .inputs_min = 2,
     .inputs_max = 2,
     .forms = table::kFloats,
     .ints = table::kCombineInts},
    {.name = "attention",
     .minor = 2,
     .inputs_min = 3,
     .inputs_max = 4,
     .forms = table::kAttention,
     .ints = table::kAttentionInts,
     .floats = table::kAttentionFloats,
     .constants = table::kMask},
    {.name = "affine_image",
     .minor = 2,
     .forms = table::kLevels,
     .ints = table::kFinish,
     .floats = table::kInverse,
     .constants = table::kLineConstants,
     .same_shape = true},
    {.name = "constant",
     .minor = 2,
     .inputs_min = 0,
     .inputs_max = 0,
     .forms = table::kEachFrom3,
     .constants = table::kHeld},
    {.name = "join",
     .minor = 2,
     .inputs_max = kAnyNumber,
     .forms = table::kEachFrom6,
     .ints = table::kJoinInts,
     .table_per_input = true},
    {.name = "embedding", .minor = 2, .forms = table::kIds, .constants = table::kLookupConstants},
    {.name = "rms_norm",
     .minor = 2,
     .forms = table::kNorms,
     .ints = table::kFinish,
     .floats = table::kNormFloats,
     .constants = table::kNormConstants,
     .same_shape = true},
    {.name = "group_norm",
     .minor = 2,
     .forms = table::kNorms,
     .ints = table::kGroupNormInts,
     .floats = table::kNormFloats,
     .constants = table::kNormConstants,
     .same_shape = true},
    {.name = "float_conv",
     .minor = 3,
     .forms = table::kFloats,
     .ints = table::kGeometry,
     .floats = table::kFloatConvFloats,
     .constants = table::kFloatConvConstants},
    {.name = "choose",
     .minor = 3,
     .forms = table::kChoices,
     .ints = table::kChooseInts,
     .floats = table::kChooseFloats,
     .same_shape = true},
    {.name = "recurrence",
     .minor = 5,
     .inputs_max = 3,
     .forms = table::kRecurrence,
     .ints = table::kRecurrenceInts,
     .floats = table::kInverse,
     .constants = table::kRecurrenceConstants},
    {.name = "reduce", .minor = 6, .forms = table::kToFloat, .ints = table::kReduceInts},
    {.name = "linear",
     .minor = 6,
     .forms = table::kLinear,
     .ints = table::kLinearInts,
     .floats = table::kConvFloats,
     .constants = table::kConvConstants},
};

constexpr const Operation& operation(OpKind op) { return kOperations[static_cast<size_t>(op)]; }

/// Whether an operation has that number.
constexpr bool is_operation(uint32_t number) { return number < kOpKinds; }

/// "conv", "avg_pool", ...; and back, throwing InvalidArgument for an unknown name.
const char* op_name(OpKind op);
OpKind op_from_name(std::string_view name);

// Places of parameters, found by the compiler: a name that the operation does not have is an error
// there.

consteval size_t int_of(OpKind op, std::string_view name) {
  const int k = operation(op).int_place(name);
  return k >= 0 ? static_cast<size_t>(k) : throw "no such int";
}
consteval size_t float_of(OpKind op, std::string_view name) {
  const int k = operation(op).float_place(name);
  return k >= 0 ? static_cast<size_t>(k) : throw "no such float";
}
consteval size_t constant_of(OpKind op, std::string_view name) {
  const int k = operation(op).constant_place(name);
  return k >= 0 ? static_cast<size_t>(k) : throw "no such constant";
}

}  // namespace adalayer::engine

#include "engine/node_check.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace adalayer::engine {

namespace {

/// "u8", "u8 or f32".
template <typename Kind>
std::string either(std::initializer_list<Kind> kinds) {
  std::string text;
  for (const Kind kind : kinds) {
    const std::string name = kind_name(kind);
    if (text.find(name) == std::string::npos) text += (text.empty() ? "" : " or ") + name;
  }
  return text;
}

}  // namespace

// -- what the table of operations says
// -------------------------------------------------------------

void NodeCheck::count(const char* what, size_t got, size_t expected) const {
  if (got != expected) bad("expected ", expected, ' ', what, ", got ", got);
}

void NodeCheck::form() const {
  const std::span<const Form> forms = operation_.forms;
  const Form &first = forms.front(), &last = forms.back();
  // (A mask of keys is of another kind than queries, keys and values.)
  const size_t inputs = node_.op == OpKind::Attention ? std::min<size_t>(3, node_.inputs.size())
                                                      : node_.inputs.size();
  for (size_t k = 0; k < inputs; ++k)
    if (std::none_of(forms.begin(), forms.end(), [&](const Form& f) {
          return f.inputs == in(k).kind && (k == 0 || f.inputs == in(0).kind);
        }))
      bad("expected ", k == 0 ? either({first.inputs, last.inputs}) : kind_name(in(0).kind),
          " input ", k, ", got ", kind_name(in(k).kind));
  std::string expected;
  for (const Form& f : forms) {
    if (inputs > 0 && f.inputs != in(0).kind) continue;
    if (f.output == out().kind) return;
    expected += (expected.empty() ? "" : " or ") + std::string(kind_name(f.output));
  }
  bad("expected ", expected, " output, got ", kind_name(out().kind));
}

void NodeCheck::ints() const {
  for (size_t k = 0; k < operation_.ints.size(); ++k) {
    const IntParameter& p = operation_.ints[k];
    const int64_t v = node_.ints[k];
    if (v < p.low || v > p.high) bad(p.name, " must be ", p.low, " to ", p.high, ", got ", v);
  }
}

void NodeCheck::constants() const {
  for (size_t k = 0; k < node_.constants.size(); ++k) {
    const ConstantParameter p =
        operation_.table_per_input
            ? ConstantParameter{"table", ConstantKind::U8, ConstantKind::U8, true}
            : operation_.constants[k];
    const int32_t number = node_.constants[k];
    if (p.optional && number == -1) continue;
    if (number < 0 || static_cast<size_t>(number) >= program_.constants.size())
      bad(p.name, ": constant ", number, " does not exist (there are ", program_.constants.size(),
          ")");
    const ConstantKind kind = program_.constants[number].kind;
    if (kind != p.kind && kind != p.other)
      bad(p.name, ": expected a constant of kind ", either({p.kind, p.other}), ", constant ",
          number, " is of kind ", kind_name(kind));
  }
}

void NodeCheck::finish() const {
  const int at = operation_.finish(), slot = operation_.table();
  const int64_t lo = node_.ints[at], hi = node_.ints[at + 1], zero_point = node_.ints[at + 2];
  if (hi < lo) bad("hi must be ", lo, " to 255, got ", hi);
  const float inv_scale = node_.floats[0];
  if (!std::isnormal(inv_scale) || inv_scale < 0.0f)
    bad("the inverse scale before the table must be positive and finite, got ", inv_scale);
  const int32_t number = slot < 0 ? -1 : node_.constants[slot];
  if (out().kind != ValueKind::U8) {
    if (number != -1) bad("a float output has no table");
    return;
  }
  if (node_.op == OpKind::Resize && !resize_spec(program_, node_).bilinear) return;
  if (number != -1) return table(number, lo, hi);
  if (zero_point != out().zero_point || hi > out().qmax)
    bad("without a table the zero point must be the output's ", out().zero_point,
        " and hi at most its qmax ", out().qmax, ", got ", zero_point, " and ", hi);
  if (inv_scale != 1.0f / out().scale)
    bad("without a table the inverse scale must be the output's ", 1.0f / out().scale, ", got ",
        inv_scale);
}

// -- parameters and shapes
// -------------------------------------------------------------------------

const Constant& NodeCheck::constant(std::string_view name) const {
  return program_.constants[node_.constants[operation_.constant_place(name)]];
}

void NodeCheck::floats(std::string_view name, int64_t size) const {
  const std::span<const float> values = constant(name).f32();
  if (static_cast<int64_t>(values.size()) != size)
    bad(name, ": expected ", size, " floats, got ", values.size());
  for (const float v : values)
    if (!std::isfinite(v)) bad(name, ": every entry must be finite, got ", v);
}

void NodeCheck::table(int32_t number, int64_t low, int64_t high) const {
  const Constant& c = program_.constants[number];
  if (c.bytes.size() != 256) bad("table: expected 256 entries, got ", c.bytes.size());
  for (int64_t q = low; q <= high; ++q)
    if (c.bytes[q] > out().qmax)
      bad("table: entry ", q, " is ", c.bytes[q], ", above the output's qmax ", out().qmax);
}

void NodeCheck::shape(const char* what, const Value& v, int64_t c, int64_t h, int64_t w) const {
  if (v.c != c || v.h != h || v.w != w)
    bad("expected ", what, " of ", c, " x ", h, " x ", w, ", got ", v.c, " x ", v.h, " x ", v.w);
}

void NodeCheck::same_grid(size_t k) const {
  const Value &a = in(k), &b = out();
  if (a.scale != b.scale || a.zero_point != b.zero_point || a.qmax != b.qmax)
    bad("levels are moved as they are, so the output must have the grid of input ", k, " (scale ",
        a.scale, ", zero point ", a.zero_point, ", qmax ", a.qmax, "), got ", b.scale, ", ",
        b.zero_point, ", ", b.qmax);
}

void NodeCheck::bounded(int64_t c, int64_t h, int64_t w) const {
  if (h > kMaxElements / c || w > kMaxElements / c / h)
    bad("expected at most ", kMaxElements, " elements with padding, got ", c, " x ", h, " x ", w);
}

// -- operations
// ------------------------------------------------------------------------------------

/// Add and Mul; the second operand may have one level per channel.
void NodeCheck::pair() const {
  const Value &a = in(0), &b = in(1);
  const bool per_channel = b.c == a.c && b.h == 1 && b.w == 1;
  if (!per_channel) shape("second input", b, a.c, a.h, a.w);
  for (const float v : node_.floats)
    if (!std::isfinite(v)) bad("scales must be finite, got ", v);
}

void NodeCheck::affine() const {
  floats("scale", in().c);
  floats("bias", in().c);
}

void NodeCheck::affine_image() const {
  const int64_t channels = in().c, elements = channels * in().h * in().w;
  for (const ConstantParameter& p : operation_.constants.first(2)) {
    const auto size = static_cast<int64_t>(constant(p.name).f32().size());
    if (size != channels && size != elements)
      bad(p.name, ": expected ", channels, " floats, one per channel, or ", elements,
          ", one per element, got ", size);
    floats(p.name, size);
  }
}

/// Concat and Join.
void NodeCheck::join() const {
  const int axis = joined_axis(node_);
  int64_t sizes[] = {out().c, out().h, out().w};
  sizes[axis] = 0;
  for (size_t k = 0; k < node_.inputs.size(); ++k) {
    const int64_t own[] = {in(k).c, in(k).h, in(k).w};
    shape("input", in(k), axis == 0 ? own[0] : out().c, axis == 1 ? own[1] : out().h,
          axis == 2 ? own[2] : out().w);
    sizes[axis] += own[axis];
    if (out().kind == ValueKind::F32) {
      if (node_.constants[k] != -1) bad("floats have no table");
    } else if (node_.constants[k] == -1)
      same_grid(k);
    else
      table(node_.constants[k], 0, in(k).qmax);
  }
  shape("output", out(), sizes[0], sizes[1], sizes[2]);
}

void NodeCheck::slice() const {
  const auto [axis, begin, step] = slice_attributes(node_);
  const int64_t size[] = {in().c, in().h, in().w};
  const int64_t got[] = {out().c, out().h, out().w};
  for (int k = 0; k < 3; ++k) {
    if (k != axis && got[k] != size[k])
      bad("axis ", k, " is not sliced: expected ", size[k], " there, got ", got[k]);
  }
  if (begin + (got[axis] - 1) * step >= size[axis])
    bad("the slice ends behind axis ", axis, " of size ", size[axis], ": begin ", begin, ", step ",
        step, ", ", got[axis], " of them");
}

void NodeCheck::gather() const {
  const std::span<const int32_t> index = gather_index(program_, node_);
  shape("output", out(), static_cast<int64_t>(index.size()), in().h, in().w);
  for (const int32_t i : index)
    if (i < 0 || i >= in().c) bad("index: expected channels 0 to ", in().c - 1, ", got ", i);
}

void NodeCheck::pad() const {
  const PadAttributes a = pad_attributes(node_);
  if (a.level > out().qmax) bad("level must be 0 to ", out().qmax, ", got ", int{a.level});
  shape("output", out(), in().c, in().h + a.top + a.bottom, in().w + a.left + a.right);
}

void NodeCheck::reshape() const {
  if (in().h * in().w != 1 && out().h * out().w != 1)
    bad("the input or the output must be n x 1 x 1");
  if (in().c * in().h * in().w != out().c * out().h * out().w)
    bad("expected ", in().c * in().h * in().w, " elements in the output, got ",
        out().c * out().h * out().w);
}

void NodeCheck::rearrange() const {
  const int64_t sizes[] = {out().c, out().h, out().w};
  int64_t last = 0;
  for (size_t k = 0; k < 3; ++k) {
    const std::string_view name = operation_.constants[k].name;
    const std::span<const int32_t> index = constant(name).i32();
    if (static_cast<int64_t>(index.size()) != sizes[k])
      bad(name, ": expected ", sizes[k], " entries, got ", index.size());
    for (const int32_t i : index)
      if (i < 0) bad(name, ": expected entries of 0 and more, got ", i);
    last += *std::max_element(index.begin(), index.end());
  }
  const int64_t elements = in().c * in().h * in().w;
  if (last >= elements)
    bad("expected sums of entries up to ", elements - 1, ", the input's last element, got ", last);
}

void NodeCheck::function() const {
  const FloatFunctionSpec s = function_spec(node_);
  if (s.function == FloatFunction::Clamp) {
    if (!(s.a <= s.b))
      bad("a clamp's lower bound must not exceed the upper, got ", s.a, " and ", s.b);
  } else if (!std::isfinite(s.a) || !std::isfinite(s.b)) {
    bad("a and b must be finite, got ", s.a, " and ", s.b);
  }
}

void NodeCheck::combine() const {
  const Value &a = in(0), &b = in(1);
  const auto fits = [&](int64_t x, int64_t y, int64_t result) {
    return result == std::max(x, y) && std::min(x, y) == (x == y ? x : 1);
  };
  if (!fits(a.c, b.c, out().c) || !fits(a.h, b.h, out().h) || !fits(a.w, b.w, out().w))
    bad("expected operands of the output's size along each axis, ", out().c, " x ", out().h, " x ",
        out().w, ", or of 1, got ", a.c, " x ", a.h, " x ", a.w, " and ", b.c, " x ", b.h, " x ",
        b.w);
}

void NodeCheck::reduce() const {
  const ReduceSpec s = reduce_spec(program_, node_);
  if (!s.along[0] && !s.along[1] && !s.along[2]) bad("expected an axis that it goes along");
  shape("output", out(), s.along[0] ? 1 : in().c, s.along[1] ? 1 : in().h, s.along[2] ? 1 : in().w);
}

void NodeCheck::attention() const {
  constexpr OpKind op = OpKind::Attention;
  const int64_t heads = node_.ints[int_of(op, "heads")];
  const int64_t key_heads = node_.ints[int_of(op, "key_heads")];
  const bool rows = node_.ints[int_of(op, "rows")] != 0;
  if (key_heads > heads) bad("key_heads must be 1 to ", heads, ", got ", key_heads);
  if (heads % key_heads != 0)
    bad("expected heads to be a multiple of key_heads, got ", heads, " and ", key_heads);
  const auto divisible = [&](const char* what, const Value& v, int64_t by) {
    if (v.c % by != 0) bad(what, ": expected a multiple of ", by, " channels, got ", v.c);
  };
  divisible("queries", in(0), heads);
  divisible("keys", in(1), key_heads);
  divisible("values", in(2), key_heads);
  const int64_t depth = in(0).c / heads, width = in(2).c / key_heads;
  shape("keys", in(1), depth * key_heads, rows ? in(0).h : in(1).h, in(1).w);
  if (rows) shape("values", in(2), in(2).c, in(1).h, in(1).w);
  if (in(1).h * in(1).w != in(2).h * in(2).w)
    bad("expected as many values as keys, got ", in(2).h * in(2).w, " and ", in(1).h * in(1).w);
  shape("output", out(), heads * width, in(0).h, in(0).w);
  const AttentionShape s = attention_shape(program_, node_);
  if (depth > kMostAttentionTerms || s.keys > kMostAttentionTerms)
    bad("expected at most ", kMostAttentionTerms, " channels per head, and keys, got ", depth,
        " and ", s.keys);
  const float scale = node_.floats[float_of(op, "scale")];
  if (!std::isfinite(scale)) bad("the scale must be finite, got ", scale);
  if (node_.inputs.size() == 4) {
    if (in(3).kind != ValueKind::F32)
      bad("expected an f32 mask of the keys, got ", kind_name(in(3).kind));
    if (s.sequences != 1) bad("a mask of the keys is of one sequence, got ", s.sequences);
    if (in(3).c * in(3).h * in(3).w != s.keys)
      bad("expected a mask of ", s.keys, " keys, got ", in(3).c * in(3).h * in(3).w);
  }
  if (node_.constants[constant_of(op, "mask")] == -1) return;
  // At most 2^31 / 2^20 times each other: sizes of values are bounded.
  const bool per_row = node_.ints[int_of(op, "mask_rows")] != 0;
  const bool per_head = node_.ints[int_of(op, "mask_heads")] != 0;
  const double entries = (per_row ? static_cast<double>(s.sequences) : 1.0) *
                         (per_head ? static_cast<double>(heads) : 1.0) *
                         static_cast<double>(s.queries) * static_cast<double>(s.keys);
  const std::span<const float> mask = constant("mask").f32();
  if (static_cast<double>(mask.size()) != entries)
    bad("mask: expected ", entries, " entries, got ", mask.size());
  for (const float v : mask)
    if (!(v < std::numeric_limits<float>::infinity()))
      bad("mask: expected finite entries or -infinity, got ", v);
}

/// What all norms have.
void NodeCheck::norm() const {
  const float eps = node_.floats[float_of(OpKind::LayerNorm, "eps")];
  if (!std::isfinite(eps) || eps <= 0.0f) bad("eps must be positive and finite, got ", eps);
  floats("gamma", in().c);
  floats("beta", in().c);
}

void NodeCheck::group_norm() const {
  norm();
  const int64_t groups = node_.ints[int_of(OpKind::GroupNorm, "groups")];
  if (groups > in().c) bad("groups must be 1 to ", in().c, ", got ", groups);
  if (in().c % groups != 0) bad("channels must be divisible by groups ", groups, ", got ", in().c);
  const int64_t count = in().c / groups * in().h * in().w;
  if (count > kMaxGroupNorm) bad("a group of ", count, " levels; expected at most ", kMaxGroupNorm);
}

/// Constant: what is the same for every image.
void NodeCheck::held() const {
  const int64_t elements = out().c * out().h * out().w;
  const ConstantKind wanted = out().kind == ValueKind::F32 ? ConstantKind::F32 : ConstantKind::U8;
  const Constant& c = constant("values");
  if (c.kind != wanted)
    bad("values: expected a constant of kind ", kind_name(wanted), ", got ", kind_name(c.kind));
  if (wanted == ConstantKind::F32) return floats("values", elements);
  if (static_cast<int64_t>(c.bytes.size()) != elements)
    bad("values: expected ", elements, ", one per element of the output, got ", c.bytes.size());
  const uint8_t most = *std::max_element(c.bytes.begin(), c.bytes.end());
  if (most > out().qmax) bad("values: ", int{most}, " is above the output's qmax ", out().qmax);
}

void NodeCheck::embedding() const {
  shape("output", out(), out().c, in().h, in().w);
  const std::vector<uint8_t>& table = constant("table").bytes;
  const auto channels = static_cast<size_t>(out().c);
  if (table.empty() || table.size() % channels != 0)
    bad("table: expected rows of ", channels, " levels, got ", table.size(), " levels");
  const size_t rows = table.size() / channels;
  if (rows > size_t{1} << 31) bad("table: expected at most 2^31 rows, got ", rows);
  const uint8_t most = *std::max_element(table.begin(), table.end());
  if (most > out().qmax)
    bad("table: expected levels up to the output's qmax ", out().qmax, ", got ", most);
}

void NodeCheck::choose() const {
  for (const float v : node_.floats)
    if (!(v < std::numeric_limits<float>::infinity()))
      bad("expected finite floats or -infinity, got ", v);
}

void NodeCheck::recurrence() const {
  constexpr OpKind op = OpKind::Recurrence;
  const auto kind = static_cast<RecurrentKind>(node_.ints[int_of(op, "kind")]);
  const bool lstm = kind == RecurrentKind::Lstm, cells = node_.ints[int_of(op, "cells")] != 0;
  if (cells && (!lstm || out().kind != ValueKind::F32)) bad("cells come out of an LSTM, as floats");
  if (cells && out().c % 2 != 0)
    bad("expected an even number of channels, states and cells, got ", out().c);
  const int64_t hidden = cells ? out().c / 2 : out().c, gates = recurrent_gates(kind);
  shape("products", in(), gates * hidden, out().h, out().w);
  const auto begins = static_cast<int>(node_.inputs.size()) - 1;
  if (begins != 0 && begins != (lstm ? 2 : 1))
    bad("expected ", lstm ? "a state and a cell" : "one state", " to begin with, or none, got ",
        begins);
  for (int k = 1; k <= begins; ++k)
    shape(k == 1 ? "a state" : "a cell", in(static_cast<size_t>(k)), hidden, 1, 1);
  packed_weights(gates * hidden, hidden, 1, 1);
  floats("scale", gates * hidden);
  floats("bias", gates * hidden);
}

void NodeCheck::linear() const {
  constexpr OpKind op = OpKind::Linear;
  shape("output", out(), out().c, in().h, in().w);
  packed_weights(out().c, in().c, 1, 1);
  const int64_t group = node_.ints[int_of(op, "group_size")];
  if (group != 32 && group != 64 && group != 128)
    bad("group_size must be 32, 64 or 128, got ", group);
  floats("scale", out().c * ((in().c + group - 1) / group));
  floats("bias", out().c);
  const float lo = node_.floats[float_of(op, "clamp_lo")];
  const float hi = node_.floats[float_of(op, "clamp_hi")];
  if (!(lo <= hi)) bad("clamp_lo must not exceed clamp_hi, got ", lo, " and ", hi);
}

void NodeCheck::run() const {
  const Operation& o = operation_;
  const auto inputs = static_cast<int>(node_.inputs.size());
  if (inputs < o.inputs_min || (o.inputs_max != kAnyNumber && inputs > o.inputs_max))
    bad("expected ", o.inputs_min, " to ", o.inputs_max, " inputs, got ", inputs);
  count("ints", node_.ints.size(), o.ints.size());
  count("floats", node_.floats.size(), o.floats.size());
  count("constants", node_.constants.size(),
        o.table_per_input ? node_.inputs.size() : o.constants.size());
  form();
  ints();
  constants();
  if (o.same_shape) shape("output", out(), in().c, in().h, in().w);
  if (o.moves && out().kind == ValueKind::U8) same_grid();
  if (o.finish() >= 0) finish();
  of_operation();
}

void NodeCheck::of_operation() const {
  switch (node_.op) {
    case OpKind::Quantize:
    case OpKind::Dequantize:
    case OpKind::Softmax:
      break;
    case OpKind::Conv:
      return convolution();
    case OpKind::ConvTranspose:
      return transposed_convolution();
    case OpKind::FloatConv:
      return float_convolution();
    case OpKind::Lookup:
      return table(node_.constants[constant_of(OpKind::Lookup, "table")], 0, in().qmax);
    case OpKind::Add:
    case OpKind::Mul:
      return pair();
    case OpKind::Affine:
      return affine();
    case OpKind::AffineImage:
      return affine_image();
    case OpKind::Concat:
    case OpKind::Join:
      return join();
    case OpKind::MaxPool:
      return max_pool();
    case OpKind::AvgPool:
      return avg_pool();
    case OpKind::AdaptiveAvgPool:
      return adaptive_avg_pool();
    case OpKind::Slice:
      return slice();
    case OpKind::Gather:
      return gather();
    case OpKind::Pad:
      return pad();
    case OpKind::Resize:
      return resize();
    case OpKind::Reshape:
      return reshape();
    case OpKind::Rearrange:
      return rearrange();
    case OpKind::Function:
      return function();
    case OpKind::Combine:
      return combine();
    case OpKind::Reduce:
      return reduce();
    case OpKind::Attention:
      return attention();
    case OpKind::LayerNorm:
    case OpKind::RmsNorm:
      return norm();
    case OpKind::GroupNorm:
      return group_norm();
    case OpKind::Constant:
      return held();
    case OpKind::Embedding:
      return embedding();
    case OpKind::Choose:
      return choose();
    case OpKind::Recurrence:
      return recurrence();
    case OpKind::Linear:
      return linear();
  }
}

}  // namespace adalayer::engine

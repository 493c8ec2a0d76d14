// validate(): what execution relies on, checked once. All sizes are bounded before they are
// multiplied, so no sum or product below leaves int64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "core/status.hpp"
#include "engine/program.hpp"
#include "formats/canonical.hpp"
#include "reference/reference.hpp"

namespace adalayer::engine {

namespace {

/// How many inputs, ints, floats and constants an operation has. kAny: one or more.
constexpr int kAny = -1;
struct Signature {
  int inputs_min, inputs_max, ints, floats, constants;
};
constexpr Signature kSignatures[kOpKinds] = {
    {1, 1, 0, 0, 0},        // Quantize
    {1, 1, 0, 0, 0},        // Dequantize
    {1, 2, 14, 3, 4},       // Conv
    {1, 2, 14, 3, 4},       // ConvTranspose
    {1, 1, 0, 0, 1},        // Lookup
    {2, 2, 3, 3, 1},        // Add
    {2, 2, 3, 3, 1},        // Mul
    {1, 1, 3, 1, 3},        // Affine
    {1, kAny, 0, 0, kAny},  // Concat
    {1, 1, 8, 0, 0},        // MaxPool
    {1, 1, 12, 2, 1},       // AvgPool
    {1, 1, 3, 2, 1},        // AdaptiveAvgPool
    {1, 1, 3, 0, 0},        // Slice
    {1, 1, 0, 0, 1},        // Gather
    {1, 1, 5, 0, 0},        // Pad
    {1, 1, 4, 3, 6},        // Resize
    {1, 1, 3, 2, 2},        // LayerNorm
    {1, 1, 0, 0, 0},        // Reshape
    {1, 1, 0, 0, 0},        // Softmax
    {1, 1, 0, 0, 3},        // Rearrange
    {1, 1, 1, 2, 0},        // Function
    {2, 2, 1, 0, 0},        // Combine
    {3, 4, 9, 2, 1},        // Attention
    {1, 1, 3, 1, 3},        // AffineImage
    {0, 0, 0, 0, 1},        // Constant
    {1, kAny, 1, 0, kAny},  // Join
    {1, 1, 0, 0, 1},        // Embedding
    {1, 1, 3, 2, 2},        // RmsNorm
    {1, 1, 4, 2, 2},        // GroupNorm
    {1, 1, 11, 2, 3},       // FloatConv
    {1, 1, 1, 2, 0},        // Choose
};

bool is_utf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const auto lead = static_cast<uint8_t>(text[i++]);
    if (lead < 0x80) continue;
    const int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
    if (lead < 0xC2 || lead > 0xF4 || text.size() - i < static_cast<size_t>(more)) return false;
    uint32_t code = lead & (0x3Fu >> more);
    for (int k = 0; k < more; ++k) {
      const auto next = static_cast<uint8_t>(text[i++]);
      if ((next & 0xC0) != 0x80) return false;
      code = code << 6 | (next & 0x3F);
    }
    // Longer forms than needed, surrogates, and codes beyond the last one.
    constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (code < kLeast[more] || (code >= 0xD800 && code < 0xE000) || code > 0x10FFFF) return false;
  }
  return true;
}

void check_text(const char* what, size_t index, std::string_view text, int64_t limit) {
  if (static_cast<int64_t>(text.size()) > limit)
    fail<InvalidArgument>(what, ' ', index, ": expected at most ", limit, " bytes of text, got ",
                          text.size());
  if (!is_utf8(text)) fail<InvalidArgument>(what, ' ', index, ": the text is not valid UTF-8");
}

void check_count(const char* what, size_t got, int64_t low, int64_t high) {
  if (static_cast<int64_t>(got) < low || static_cast<int64_t>(got) > high)
    fail<InvalidArgument>("expected ", low, " to ", high, ' ', what, ", got ", got);
}

void check_value(size_t index, const Value& v) {
  const auto bad = [&](const auto&... pieces) {
    fail<InvalidArgument>("value ", index, " (\"", v.name, "\"): ", pieces...);
  };
  if (static_cast<uint8_t>(v.kind) > static_cast<uint8_t>(ValueKind::I32))
    bad("unknown kind ", static_cast<uint8_t>(v.kind));
  for (const int64_t axis : {v.c, v.h, v.w})
    if (axis < 1 || axis > kMaxAxis)
      bad("each axis must be 1 to ", kMaxAxis, ", got ", v.c, " x ", v.h, " x ", v.w);
  if (v.c * v.h * v.w > kMaxElements)
    bad("expected at most ", kMaxElements, " elements, got ", v.c * v.h * v.w);
  if (v.kind == ValueKind::I32 && v.c != 1) bad("expected token ids of one channel, got ", v.c);
  if (v.kind != ValueKind::U8) return;
  if (!std::isnormal(v.scale) || v.scale < 0.0f || !std::isnormal(1.0f / v.scale))
    bad("the scale must be positive, finite and have a finite inverse, got ", v.scale);
  if (v.qmax < 1 || v.qmax > 255) bad("qmax must be 1 to 255, got ", v.qmax);
  if (v.zero_point < 0 || v.zero_point > v.qmax)
    bad("the zero point must be 0 to ", v.qmax, ", got ", v.zero_point);
}

const char* value_kind_name(ValueKind kind) {
  constexpr const char* kKinds[] = {"u8", "f32", "i32"};
  return kKinds[static_cast<size_t>(kind)];
}

const char* constant_kind_name(ConstantKind kind) {
  constexpr const char* kKinds[] = {"weights", "f32", "i32", "u8"};
  return kKinds[static_cast<size_t>(kind)];
}

/// Checks one node whose inputs are known to be written already.
class NodeCheck {
 public:
  NodeCheck(const Program& program, size_t index)
      : program_(program), index_(index), node_(program.nodes[index]) {}

  void run();

 private:
  template <typename... Pieces>
  [[noreturn]] void bad(const Pieces&... pieces) const {
    fail<InvalidArgument>("node ", index_, " (", op_name(node_.op), " \"", node_.name,
                          "\"): ", pieces...);
  }

  const Value& in(size_t k = 0) const { return program_.values[node_.inputs[k]]; }
  const Value& out() const { return program_.values[node_.output]; }

  // -- parameters
  void count(const char* what, size_t got, int expected) const {
    if (static_cast<int64_t>(got) != expected) bad("expected ", expected, ' ', what, ", got ", got);
  }
  int64_t ranged(size_t at, const char* what, int64_t low, int64_t high) const {
    const int64_t v = node_.ints[at];
    if (v < low || v > high) bad(what, " must be ", low, " to ", high, ", got ", v);
    return v;
  }
  const Constant& constant(size_t slot, const char* what, ConstantKind kind) const;
  void floats_constant(size_t slot, const char* what, int64_t size) const;
  /// A 256-entry table whose entries `low` to `high` are levels of the output.
  void table(size_t slot, int64_t low, int64_t high) const;
  void finish(size_t at, bool used, int32_t table_slot = -1) const;

  // -- shapes
  void kinds(ValueKind inputs, ValueKind output) const;
  void shape(const char* what, const Value& v, int64_t c, int64_t h, int64_t w) const;
  void same_shape() const { shape("output", out(), in().c, in().h, in().w); }
  void same_grid(size_t k = 0) const;
  void broadcast() const;
  void bounded(int64_t c, int64_t h, int64_t w) const;

  // -- operations
  void geometry() const;
  void output_of_convolution() const;
  void convolution(bool transposed) const;
  void float_conv() const;
  void canonical_weights(const Constant& weights) const;
  void window_axis(const char* axis, int64_t size, int64_t outputs, int64_t kernel, int64_t stride,
                   int64_t pad, int64_t dilation) const;
  void max_pool() const;
  void avg_pool() const;
  void average_bound(int64_t positions) const;
  void concat() const;
  void affine_image() const;
  void affine() const;
  void fixed() const;
  void join() const;
  void group_norm() const;
  void slice() const;
  void gather() const;
  void rearrange() const;
  void function() const;
  void attention() const;
  void norm(size_t finish_at = 0) const;
  void embedding() const;
  void pad() const;
  void resize() const;
  void resize_axis(const char* axis, size_t slot, int64_t size, int64_t outputs) const;

  const Program& program_;
  size_t index_;
  const Node& node_;
};

const Constant& NodeCheck::constant(size_t slot, const char* what, ConstantKind kind) const {
  const int32_t k = node_.constants[slot];
  if (k < 0 || static_cast<size_t>(k) >= program_.constants.size())
    bad(what, ": constant ", k, " does not exist (there are ", program_.constants.size(), ")");
  const Constant& c = program_.constants[k];
  if (c.kind != kind)
    bad(what, ": expected a constant of kind ", constant_kind_name(kind), ", constant ", k,
        " is of kind ", constant_kind_name(c.kind));
  return c;
}

void NodeCheck::floats_constant(size_t slot, const char* what, int64_t size) const {
  const Constant& c = constant(slot, what, ConstantKind::F32);
  if (static_cast<int64_t>(c.f32().size()) != size)
    bad(what, ": expected ", size, " floats, got ", c.f32().size());
  for (const float v : c.f32())
    if (!std::isfinite(v)) bad(what, ": every entry must be finite, got ", v);
}

void NodeCheck::table(size_t slot, int64_t low, int64_t high) const {
  const Constant& c = constant(slot, "table", ConstantKind::U8);
  if (c.bytes.size() != 256) bad("table: expected 256 entries, got ", c.bytes.size());
  for (int64_t q = low; q <= high; ++q)
    if (c.bytes[q] > out().qmax)
      bad("table: entry ", q, " is ", c.bytes[q], ", above the output's qmax ", out().qmax);
}

void NodeCheck::finish(size_t at, bool used, int32_t table_slot) const {
  const int64_t lo = ranged(at, "lo", 0, 255);
  const int64_t hi = ranged(at + 1, "hi", lo, 255);
  const int64_t zero_point = ranged(at + 2, "the zero point before the table", 0, 255);
  const float inv_scale = node_.floats[0];
  if (!std::isnormal(inv_scale) || inv_scale < 0.0f)
    bad("the inverse scale before the table must be positive and finite, got ", inv_scale);
  const bool has_table = table_slot >= 0 && node_.constants[table_slot] != -1;
  if (has_table && !used) bad("a float output has no table");
  if (!used) return;
  if (has_table) return table(table_slot, lo, hi);
  if (zero_point != out().zero_point || hi > out().qmax)
    bad("without a table the zero point must be the output's ", out().zero_point,
        " and hi at most its qmax ", out().qmax, ", got ", zero_point, " and ", hi);
  if (inv_scale != 1.0f / out().scale)
    bad("without a table the inverse scale must be the output's ", 1.0f / out().scale, ", got ",
        inv_scale);
}

void NodeCheck::kinds(ValueKind inputs, ValueKind output) const {
  const auto name = value_kind_name;
  for (size_t k = 0; k < node_.inputs.size(); ++k)
    if (in(k).kind != inputs)
      bad("expected ", name(inputs), " input ", k, ", got ", name(in(k).kind));
  if (out().kind != output) bad("expected ", name(output), " output, got ", name(out().kind));
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

void NodeCheck::broadcast() const {
  const Value &a = in(0), &b = in(1);
  const bool per_channel = b.c == a.c && b.h == 1 && b.w == 1;
  if (!per_channel) shape("second input", b, a.c, a.h, a.w);
  same_shape();
}

void NodeCheck::bounded(int64_t c, int64_t h, int64_t w) const {
  if (h > kMaxElements / c || w > kMaxElements / c / h)
    bad("expected at most ", kMaxElements, " elements with padding, got ", c, " x ", h, " x ", w);
}

/// Kernel, strides, padding, dilation and groups.
void NodeCheck::geometry() const {
  constexpr const char* kWhat[] = {"kernel height",       "kernel width",  "vertical stride",
                                   "horizontal stride",   "top padding",   "left padding",
                                   "bottom padding",      "right padding", "vertical dilation",
                                   "horizontal dilation", "groups"};
  for (size_t k = 0; k < 11; ++k)
    ranged(k, kWhat[k], k >= 4 && k < 8 ? 0 : 1, kMaxAxis);
  const int64_t groups = node_.ints[10];
  if (in().c % groups != 0 || out().c % groups != 0)
    bad("channels must be divisible by groups ", groups, ", got ", in().c, " in and ", out().c,
        " out");
}

void NodeCheck::output_of_convolution() const {
  const std::vector<int64_t>& i = node_.ints;
  const int64_t extent_h = i[8] * (i[0] - 1) + 1, extent_w = i[9] * (i[1] - 1) + 1;
  const int64_t padded_h = in().h + i[4] + i[6], padded_w = in().w + i[5] + i[7];
  bounded(in().c, padded_h, padded_w);
  if (padded_h < extent_h || padded_w < extent_w)
    bad("the padded input, ", padded_h, " x ", padded_w, ", is smaller than the dilated kernel, ",
        extent_h, " x ", extent_w);
  shape("output", out(), out().c, (padded_h - extent_h) / i[2] + 1,
        (padded_w - extent_w) / i[3] + 1);
}

void NodeCheck::canonical_weights(const Constant& weights) const {
  const formats::CanonicalHeader header = [&] {
    try {
      return formats::read_header(weights.bytes);
    } catch (const CorruptData& e) {
      bad(e.what());
    }
  }();
  const int64_t kernel_h = node_.ints[0], kernel_w = node_.ints[1], groups = node_.ints[10];
  if (header.out_channels != out().c || header.group_in != in().c / groups ||
      header.kernel_h != kernel_h || header.kernel_w != kernel_w)
    bad("expected weights of ", out().c, " x ", in().c / groups, " x ", kernel_h, " x ", kernel_w,
        ", got ", header.out_channels, " x ", header.group_in, " x ", header.kernel_h, " x ",
        header.kernel_w);
  try {
    check_accumulator(header.count() / out().c, header.bits);
  } catch (const InvalidArgument& e) {
    bad(e.what());
  }
}

void NodeCheck::convolution(bool transposed) const {
  const bool to_float = out().kind == ValueKind::F32;
  kinds(ValueKind::U8, out().kind);
  geometry();
  const Value &x = in(), &y = out();
  if (transposed) {
    const ConvAttributes a = conv_attributes(node_);
    const int64_t extent_h = a.dilation_h * (a.kernel_h - 1) + 1;
    const int64_t extent_w = a.dilation_w * (a.kernel_w - 1) + 1;
    if (std::min(a.stride_h, y.h) * std::min(a.stride_w, y.w) > kMaxInterleaved)
      bad("expected at most ", kMaxInterleaved,
          " outputs between neighbouring inputs, got strides ", a.stride_h, " and ", a.stride_w);
    const int64_t full_h = (x.h - 1) * a.stride_h + extent_h;
    const int64_t full_w = (x.w - 1) * a.stride_w + extent_w;
    bounded(std::max(x.c, y.c), full_h, full_w);
    const auto fits = [&](const char* axis, int64_t got, int64_t least, int64_t spread) {
      if (got < least || got >= least + spread)
        bad("expected an output ", axis, " of ", least, " to ", least + spread - 1, ", got ", got);
    };
    fits("height", y.h, full_h - a.pad_top - a.pad_bottom, std::max(a.stride_h, a.dilation_h));
    fits("width", y.w, full_w - a.pad_left - a.pad_right, std::max(a.stride_w, a.dilation_w));
  } else {
    output_of_convolution();
  }
  canonical_weights(constant(0, "weights", ConstantKind::Weights));
  floats_constant(1, "scale", y.c);
  floats_constant(2, "bias", y.c);
  finish(11, !to_float, 3);
  if (!(node_.floats[1] <= node_.floats[2]))
    bad("float lo must not exceed hi, got ", node_.floats[1], " and ", node_.floats[2]);
  if (node_.inputs.size() == 2) shape("residual", in(1), y.c, y.h, y.w);
}

void NodeCheck::float_conv() const {
  kinds(ValueKind::F32, ValueKind::F32);
  geometry();
  output_of_convolution();
  const int64_t positions = out().h * out().w;
  if (positions > kMaxElements / out().c)
    bad("expected at most ", kMaxElements, " outputs, got ", out().c, " x ", positions);
  if (node_.constants[1] != -1) {
    canonical_weights(constant(0, "weights", ConstantKind::Weights));
    floats_constant(1, "scale", out().c);
  } else {
    // (Of sizes that fit the padded input, each at most kMaxElements.)
    const int64_t taps = node_.ints[0] * node_.ints[1], group_in = in().c / node_.ints[10];
    const auto size = static_cast<int64_t>(constant(0, "weights", ConstantKind::F32).f32().size());
    if (size % out().c != 0 || size / out().c % group_in != 0 || size / out().c / group_in != taps)
      bad("weights: expected ", out().c, " x ", group_in, " x ", taps, " floats, got ", size);
    floats_constant(0, "weights", size);
  }
  floats_constant(2, "bias", out().c);
  if (!(node_.floats[0] <= node_.floats[1]))
    bad("lo must not exceed hi, got ", node_.floats[0], " and ", node_.floats[1]);
}

void NodeCheck::window_axis(const char* axis, int64_t size, int64_t outputs, int64_t kernel,
                            int64_t stride, int64_t pad, int64_t dilation) const {
  const auto empty = [&](int64_t window) {
    bad("window ", window, " of the output's ", axis, " contains no position of the image (", axis,
        ' ', size, ", kernel ", kernel, ", stride ", stride, ", padding ", pad, ", dilation ",
        dilation, ")");
  };
  // Windows that begin in the padding: their first position inside, if they have one.
  for (int64_t k = 0; k < outputs && k * stride < pad; ++k) {
    const int64_t skipped = (pad - k * stride + dilation - 1) / dilation;
    if (skipped >= kernel || k * stride - pad + skipped * dilation >= size) empty(k);
  }
  // The others begin inside or behind the image, the last one farthest out.
  if ((outputs - 1) * stride - pad >= size) empty(outputs - 1);
}

void NodeCheck::max_pool() const {
  kinds(in().kind, in().kind);
  if (in().kind == ValueKind::U8) same_grid();
  constexpr const char* kWhat[] = {"kernel height",     "kernel width",       "vertical stride",
                                   "horizontal stride", "top padding",        "left padding",
                                   "vertical dilation", "horizontal dilation"};
  for (size_t k = 0; k < 8; ++k)
    ranged(k, kWhat[k], k == 4 || k == 5 ? 0 : 1, kMaxAxis);
  const PoolSpec s = pool_spec(program_, node_);
  shape("output", out(), in().c, out().h, out().w);
  // A last window may reach beyond the image by what a bottom padding would hold.
  bounded(in().c, in().h + s.pad_top + s.dilation_h * (s.kernel_h - 1),
          in().w + s.pad_left + s.dilation_w * (s.kernel_w - 1));
  window_axis("height", in().h, out().h, s.kernel_h, s.stride_h, s.pad_top, s.dilation_h);
  window_axis("width", in().w, out().w, s.kernel_w, s.stride_w, s.pad_left, s.dilation_w);
}

void NodeCheck::average_bound(int64_t positions) const {
  if (positions > (int64_t{1} << 31) / 256)
    bad("a sum over ", positions, " levels could overflow int32");
  if (!std::isfinite(node_.floats[1])) bad("the ratio must be finite, got ", node_.floats[1]);
}

void NodeCheck::avg_pool() const {
  kinds(in().kind, in().kind);
  constexpr const char* kWhat[] = {"kernel height",     "kernel width", "vertical stride",
                                   "horizontal stride", "top padding",  "left padding",
                                   "bottom padding",    "right padding"};
  for (size_t k = 0; k < 8; ++k)
    ranged(k, kWhat[k], k >= 4 ? 0 : 1, kMaxAxis);
  ranged(8, "count_padding", 0, 1);
  finish(9, in().kind == ValueKind::U8, 0);
  const PoolSpec s = pool_spec(program_, node_);
  const int64_t padded_h = in().h + s.pad_top + s.pad_bottom;
  const int64_t padded_w = in().w + s.pad_left + s.pad_right;
  bounded(in().c, padded_h, padded_w);
  // Rounded down, or up with ceil_mode.
  const auto fits = [&](const char* axis, int64_t got, int64_t padded, int64_t kernel,
                        int64_t stride) {
    const int64_t span = padded - kernel;
    if (span < 0) bad("the padded ", axis, ' ', padded, " is smaller than the kernel ", kernel);
    if (got < span / stride + 1 || got > (span + stride - 1) / stride + 1)
      bad("expected an output ", axis, " of ", span / stride + 1, " to ",
          (span + stride - 1) / stride + 1, ", got ", got);
  };
  shape("output", out(), in().c, out().h, out().w);
  fits("height", out().h, padded_h, s.kernel_h, s.stride_h);
  fits("width", out().w, padded_w, s.kernel_w, s.stride_w);
  window_axis("height", in().h, out().h, s.kernel_h, s.stride_h, s.pad_top, 1);
  window_axis("width", in().w, out().w, s.kernel_w, s.stride_w, s.pad_left, 1);
  average_bound(std::min(s.kernel_h, in().h) * std::min(s.kernel_w, in().w));
}

void NodeCheck::concat() const {
  kinds(ValueKind::U8, ValueKind::U8);
  int64_t channels = 0;
  for (size_t k = 0; k < node_.inputs.size(); ++k) {
    shape("input", in(k), in(k).c, out().h, out().w);
    channels += in(k).c;
    if (node_.constants[k] == -1)
      same_grid(k);
    else
      table(k, 0, in(k).qmax);
  }
  shape("output", out(), channels, out().h, out().w);
}

void NodeCheck::affine_image() const {
  kinds(ValueKind::U8, ValueKind::U8);
  same_shape();
  finish(0, true, 2);
  const int64_t channels = in().c, elements = channels * in().h * in().w;
  constexpr const char* kWhat[] = {"scale", "bias"};
  for (size_t k = 0; k < 2; ++k) {
    const auto size = static_cast<int64_t>(constant(k, kWhat[k], ConstantKind::F32).f32().size());
    if (size != channels && size != elements)
      bad(kWhat[k], ": expected ", channels, " floats, one per channel, or ", elements,
          ", one per element, got ", size);
    floats_constant(k, kWhat[k], size);
  }
}

void NodeCheck::affine() const {
  kinds(in().kind, in().kind);
  same_shape();
  finish(0, in().kind == ValueKind::U8, 2);
  floats_constant(0, "scale", in().c);
  floats_constant(1, "bias", in().c);
}

/// Constant: what is the same for every image.
void NodeCheck::fixed() const {
  const int64_t elements = out().c * out().h * out().w;
  if (out().kind == ValueKind::F32) return floats_constant(0, "floats", elements);
  kinds(ValueKind::U8, ValueKind::U8);
  const Constant& c = constant(0, "levels", ConstantKind::U8);
  if (static_cast<int64_t>(c.bytes.size()) != elements)
    bad("levels: expected ", elements, ", one per element of the output, got ", c.bytes.size());
  const uint8_t most = *std::max_element(c.bytes.begin(), c.bytes.end());
  if (most > out().qmax) bad("levels: ", int{most}, " is above the output's qmax ", out().qmax);
}

void NodeCheck::join() const {
  kinds(ValueKind::U8, ValueKind::U8);
  const bool rows = ranged(0, "axis", 1, 2) == 1;
  int64_t size = 0;
  for (size_t k = 0; k < node_.inputs.size(); ++k) {
    shape("input", in(k), out().c, rows ? in(k).h : out().h, rows ? out().w : in(k).w);
    size += rows ? in(k).h : in(k).w;
    if (node_.constants[k] == -1)
      same_grid(k);
    else
      table(k, 0, in(k).qmax);
  }
  shape("output", out(), out().c, rows ? size : out().h, rows ? out().w : size);
}

void NodeCheck::group_norm() const {
  norm(1);
  const int64_t groups = ranged(0, "groups", 1, in().c);
  if (in().c % groups != 0) bad("channels must be divisible by groups ", groups, ", got ", in().c);
  const int64_t count = in().c / groups * in().h * in().w;
  if (count > kMaxGroupNorm) bad("a group of ", count, " levels; expected at most ", kMaxGroupNorm);
}

void NodeCheck::slice() const {
  kinds(ValueKind::U8, ValueKind::U8);
  same_grid();
  const int64_t axis = ranged(0, "axis", 0, 2);
  const int64_t begin = ranged(1, "begin", 0, kMaxAxis);
  const int64_t step = ranged(2, "step", 1, kMaxAxis);
  const int64_t size[] = {in().c, in().h, in().w};
  const int64_t got[] = {out().c, out().h, out().w};
  for (int64_t k = 0; k < 3; ++k) {
    if (k != axis && got[k] != size[k])
      bad("axis ", k, " is not sliced: expected ", size[k], " there, got ", got[k]);
  }
  if (begin + (got[axis] - 1) * step >= size[axis])
    bad("the slice ends behind axis ", axis, " of size ", size[axis], ": begin ", begin, ", step ",
        step, ", ", got[axis], " of them");
}

void NodeCheck::gather() const {
  kinds(ValueKind::U8, ValueKind::U8);
  same_grid();
  const auto index = constant(0, "index", ConstantKind::I32).i32();
  shape("output", out(), static_cast<int64_t>(index.size()), in().h, in().w);
  for (const int32_t i : index)
    if (i < 0 || i >= in().c) bad("index: expected channels 0 to ", in().c - 1, ", got ", i);
}

void NodeCheck::rearrange() const {
  kinds(in().kind, in().kind);
  if (in().kind == ValueKind::U8) same_grid();
  constexpr const char* kWhat[] = {"channels", "rows", "columns"};
  const int64_t sizes[] = {out().c, out().h, out().w};
  int64_t last = 0;
  for (size_t k = 0; k < 3; ++k) {
    const auto index = constant(k, kWhat[k], ConstantKind::I32).i32();
    if (static_cast<int64_t>(index.size()) != sizes[k])
      bad(kWhat[k], ": expected ", sizes[k], " entries, got ", index.size());
    for (const int32_t i : index)
      if (i < 0) bad(kWhat[k], ": expected entries of 0 and more, got ", i);
    last += *std::max_element(index.begin(), index.end());
  }
  const int64_t elements = in().c * in().h * in().w;
  if (last >= elements)
    bad("expected sums of entries up to ", elements - 1, ", the input's last element, got ", last);
}

void NodeCheck::function() const {
  ranged(0, "the function", 0, kFloatFunctions - 1);
  const FloatFunctionSpec s = function_spec(node_);
  if (s.function == FloatFunction::Clamp) {
    if (!(s.a <= s.b))
      bad("a clamp's lower bound must not exceed the upper, got ", s.a, " and ", s.b);
  } else if (!std::isfinite(s.a) || !std::isfinite(s.b)) {
    bad("a and b must be finite, got ", s.a, " and ", s.b);
  }
}

void NodeCheck::attention() const {
  for (size_t k = 0; k < 3; ++k)
    if (in(k).kind != ValueKind::U8)
      bad("expected u8 input ", k, ", got ", value_kind_name(in(k).kind));
  constexpr const char* kFlags[] = {"rows", "causal", "mask_rows", "mask_heads"};
  const int64_t heads = ranged(0, "heads", 1, kMaxAxis);
  const int64_t key_heads = ranged(1, "key_heads", 1, heads);
  for (size_t k = 0; k < 4; ++k)
    ranged(2 + k, kFlags[k], 0, 1);
  finish(6, out().kind == ValueKind::U8);
  if (heads % key_heads != 0)
    bad("expected heads to be a multiple of key_heads, got ", heads, " and ", key_heads);
  const auto divisible = [&](const char* what, const Value& v, int64_t by) {
    if (v.c % by != 0) bad(what, ": expected a multiple of ", by, " channels, got ", v.c);
  };
  divisible("queries", in(0), heads);
  divisible("keys", in(1), key_heads);
  divisible("values", in(2), key_heads);
  const bool rows = node_.ints[2] != 0;
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
  if (!std::isfinite(node_.floats[1])) bad("the scale must be finite, got ", node_.floats[1]);
  if (node_.inputs.size() == 4) {
    if (in(3).kind != ValueKind::F32)
      bad("expected an f32 mask of the keys, got ", value_kind_name(in(3).kind));
    if (s.sequences != 1) bad("a mask of the keys is of one sequence, got ", s.sequences);
    if (in(3).c * in(3).h * in(3).w != s.keys)
      bad("expected a mask of ", s.keys, " keys, got ", in(3).c * in(3).h * in(3).w);
  }
  if (node_.constants[0] == -1) return;
  // At most 2^31 / 2^20 times each other: sizes of values are bounded.
  const double entries = (node_.ints[4] != 0 ? static_cast<double>(s.sequences) : 1.0) *
                         (node_.ints[5] != 0 ? static_cast<double>(heads) : 1.0) *
                         static_cast<double>(s.queries) * static_cast<double>(s.keys);
  const auto mask = constant(0, "mask", ConstantKind::F32).f32();
  if (static_cast<double>(mask.size()) != entries)
    bad("mask: expected ", entries, " entries, got ", mask.size());
  for (const float v : mask)
    if (!(v < std::numeric_limits<float>::infinity()))
      bad("mask: expected finite entries or -infinity, got ", v);
}

/// What all norms have.
void NodeCheck::norm(size_t finish_at) const {
  // Of floats floats, of levels either.
  kinds(in().kind, in().kind == ValueKind::F32 ? in().kind : out().kind);
  same_shape();
  finish(finish_at, out().kind == ValueKind::U8);
  if (!std::isfinite(node_.floats[1]) || node_.floats[1] <= 0.0f)
    bad("eps must be positive and finite, got ", node_.floats[1]);
  floats_constant(0, "gamma", in().c);
  floats_constant(1, "beta", in().c);
}

void NodeCheck::embedding() const {
  kinds(ValueKind::I32, ValueKind::U8);
  shape("output", out(), out().c, in().h, in().w);
  const std::vector<uint8_t>& table = constant(0, "table", ConstantKind::U8).bytes;
  const auto channels = static_cast<size_t>(out().c);
  if (table.empty() || table.size() % channels != 0)
    bad("table: expected rows of ", channels, " levels, got ", table.size(), " levels");
  const size_t rows = table.size() / channels;
  if (rows > size_t{1} << 31) bad("table: expected at most 2^31 rows, got ", rows);
  const uint8_t most = *std::max_element(table.begin(), table.end());
  if (most > out().qmax)
    bad("table: expected levels up to the output's qmax ", out().qmax, ", got ", most);
}

void NodeCheck::pad() const {
  kinds(ValueKind::U8, ValueKind::U8);
  same_grid();
  constexpr const char* kWhat[] = {"top", "left", "bottom", "right"};
  for (size_t k = 0; k < 4; ++k)
    ranged(k, kWhat[k], 0, kMaxAxis);
  ranged(4, "level", 0, out().qmax);
  shape("output", out(), in().c, in().h + node_.ints[0] + node_.ints[2],
        in().w + node_.ints[1] + node_.ints[3]);
}

void NodeCheck::resize_axis(const char* axis, size_t slot, int64_t size, int64_t outputs) const {
  for (size_t k = 0; k < 2; ++k) {
    const auto rows = constant(slot + k, axis, ConstantKind::I32).i32();
    if (static_cast<int64_t>(rows.size()) != outputs)
      bad(axis, ": expected ", outputs, " positions, got ", rows.size());
    for (const int32_t i : rows)
      if (i < 0 || i >= size) bad(axis, ": expected positions 0 to ", size - 1, ", got ", i);
  }
  floats_constant(slot + 2, axis, outputs);
  for (const float part : constant(slot + 2, axis, ConstantKind::F32).f32())
    if (part < 0.0f || part > 1.0f) bad(axis, ": parts must be 0 to 1, got ", part);
}

void NodeCheck::resize() const {
  kinds(in().kind, in().kind);
  const bool bilinear = ranged(0, "bilinear", 0, 1) != 0;
  const bool levels = in().kind == ValueKind::U8;
  finish(1, levels && bilinear);
  if (levels && !bilinear) same_grid();
  for (const float v : node_.floats)
    if (!std::isfinite(v)) bad("scale and offset must be finite, got ", v);
  shape("output", out(), in().c, out().h, out().w);
  resize_axis("rows", 0, in().h, out().h);
  resize_axis("columns", 3, in().w, out().w);
}

void NodeCheck::run() {
  const Signature& s = kSignatures[static_cast<size_t>(node_.op)];
  const auto inputs = static_cast<int64_t>(node_.inputs.size());
  if (inputs < s.inputs_min || (s.inputs_max != kAny && inputs > s.inputs_max))
    bad("expected ", s.inputs_min, " to ", s.inputs_max, " inputs, got ", inputs);
  count("ints", node_.ints.size(), s.ints);
  count("floats", node_.floats.size(), s.floats);
  count("constants", node_.constants.size(),
        s.constants == kAny ? static_cast<int>(inputs) : s.constants);

  constexpr ValueKind u8 = ValueKind::U8, f32 = ValueKind::F32;
  for (size_t k = 0; k < node_.inputs.size(); ++k)
    if (in(k).kind == ValueKind::I32 && node_.op != OpKind::Embedding && node_.op != OpKind::Choose)
      bad("expected levels or floats as input ", k,
          ", got whole numbers, which only embedding and choose read");
  if (out().kind == ValueKind::I32) bad("its output is i32: only program inputs are");
  switch (node_.op) {
    case OpKind::Quantize:
      kinds(f32, u8);
      same_shape();
      break;
    case OpKind::Dequantize:
      kinds(u8, f32);
      same_shape();
      break;
    case OpKind::Conv:
      convolution(false);
      break;
    case OpKind::ConvTranspose:
      convolution(true);
      break;
    case OpKind::Lookup:
      kinds(u8, u8);
      same_shape();
      table(0, 0, in().qmax);
      break;
    case OpKind::Add:
    case OpKind::Mul:
      kinds(u8, u8);
      broadcast();
      finish(0, true, 0);
      for (const float v : node_.floats)
        if (!std::isfinite(v)) bad("scales must be finite, got ", v);
      break;
    case OpKind::Affine:
      affine();
      break;
    case OpKind::Concat:
      concat();
      break;
    case OpKind::MaxPool:
      max_pool();
      break;
    case OpKind::AvgPool:
      avg_pool();
      break;
    case OpKind::AdaptiveAvgPool:
      kinds(in().kind, in().kind);
      shape("output", out(), in().c, out().h, out().w);
      finish(0, in().kind == u8, 0);
      average_bound(in().h * in().w);
      break;
    case OpKind::Slice:
      slice();
      break;
    case OpKind::Gather:
      gather();
      break;
    case OpKind::Pad:
      pad();
      break;
    case OpKind::Resize:
      resize();
      break;
    case OpKind::LayerNorm:
      norm();
      break;
    case OpKind::Reshape:
      kinds(u8, u8);
      same_grid();
      if (in().h * in().w != 1 && out().h * out().w != 1)
        bad("the input or the output must be n x 1 x 1");
      if (in().c * in().h * in().w != out().c * out().h * out().w)
        bad("expected ", in().c * in().h * in().w, " elements in the output, got ",
            out().c * out().h * out().w);
      break;
    case OpKind::Softmax:
      kinds(f32, f32);
      same_shape();
      break;
    case OpKind::Rearrange:
      rearrange();
      break;
    case OpKind::Function:
      kinds(f32, f32);
      same_shape();
      function();
      break;
    case OpKind::Attention:
      attention();
      break;
    case OpKind::Combine:
      kinds(f32, f32);
      shape("second input", in(1), in().c, in().h, in().w);
      same_shape();
      ranged(0, "the pair", 0, kFloatPairs - 1);
      break;
    case OpKind::AffineImage:
      affine_image();
      break;
    case OpKind::Constant:
      fixed();
      break;
    case OpKind::Join:
      join();
      break;
    case OpKind::GroupNorm:
      group_norm();
      break;
    case OpKind::Embedding:
      embedding();
      break;
    case OpKind::RmsNorm:
      norm();
      break;
    case OpKind::FloatConv:
      float_conv();
      break;
    case OpKind::Choose:
      kinds(ValueKind::I32, f32);
      same_shape();
      ranged(0, "any", 0, 1);
      for (const float v : node_.floats)
        if (!(v < std::numeric_limits<float>::infinity()))
          bad("expected finite floats or -infinity, got ", v);
      break;
  }
}

/// Numbers of values: each exists, is written once, and before it is read.
void check_order(const Program& p) {
  const auto exists = [&](int32_t v) { return v >= 0 && static_cast<size_t>(v) < p.values.size(); };
  std::vector<uint8_t> written(p.values.size(), 0);
  for (const int32_t v : p.inputs) {
    if (!exists(v)) fail<InvalidArgument>("program input: value ", v, " does not exist");
    if (p.values[v].kind == ValueKind::U8)
      fail<InvalidArgument>("program input \"", p.values[v].name, "\" must be f32 or i32");
    if (written[v]++)
      fail<InvalidArgument>("program input \"", p.values[v].name, "\" is listed twice");
  }
  for (size_t k = 0; k < p.nodes.size(); ++k) {
    const Node& n = p.nodes[k];
    const auto bad = [&](const auto&... pieces) {
      fail<InvalidArgument>("node ", k, " (", op_name(n.op), " \"", n.name, "\"): ", pieces...);
    };
    if (!is_operation(static_cast<uint32_t>(n.op)))
      bad("operation ", static_cast<uint8_t>(n.op), " is unknown to this version");
    for (const int32_t v : n.inputs) {
      if (!exists(v)) bad("input value ", v, " does not exist");
      if (!written[v]) bad("input value ", v, " is not written before it is read");
    }
    if (!exists(n.output)) bad("output value ", n.output, " does not exist");
    if (written[n.output]++) bad("output value ", n.output, " is written twice");
  }
  for (size_t v = 0; v < p.values.size(); ++v)
    if (!written[v])
      fail<InvalidArgument>("value ", v, " (\"", p.values[v].name, "\") is never written");
  for (const int32_t v : p.inputs)
    written[v] = 0;
  for (const int32_t v : p.outputs) {
    if (!exists(v)) fail<InvalidArgument>("program output: value ", v, " does not exist");
    if (p.values[v].kind != ValueKind::F32)
      fail<InvalidArgument>("program output \"", p.values[v].name, "\" must be f32");
    if (!written[v])
      fail<InvalidArgument>("program output \"", p.values[v].name,
                            "\" is a program input or listed twice");
    written[v] = 0;
  }
}

}  // namespace

void validate(const Program& p) {
  check_count("nodes", p.nodes.size(), 1, kMaxNodes);
  check_count("program inputs", p.inputs.size(), 1, kMaxPorts);
  check_count("program outputs", p.outputs.size(), 1, kMaxPorts);
  check_count("values", p.values.size(), 1, kMaxNodes + kMaxPorts);
  check_count("constants", p.constants.size(), 0, kMaxConstants);
  check_count("metadata entries", p.metadata.size(), 0, kMaxMetadata);
  // Texts first: messages below quote names.
  for (size_t k = 0; k < p.values.size(); ++k)
    check_text("name of value", k, p.values[k].name, kMaxName);
  for (size_t k = 0; k < p.nodes.size(); ++k)
    check_text("name of node", k, p.nodes[k].name, kMaxName);
  size_t entry = 0;
  for (const auto& [key, text] : p.metadata) {
    check_text("metadata key", entry, key, kMaxName);
    check_text("metadata entry", entry++, text, kMaxText);
  }
  for (size_t k = 0; k < p.constants.size(); ++k) {
    const Constant& c = p.constants[k];
    if (static_cast<uint8_t>(c.kind) > static_cast<uint8_t>(ConstantKind::U8))
      fail<InvalidArgument>("constant ", k, ": unknown kind ", static_cast<uint8_t>(c.kind));
    const bool words = c.kind == ConstantKind::F32 || c.kind == ConstantKind::I32;
    if (words && c.bytes.size() % 4 != 0)
      fail<InvalidArgument>("constant ", k, ": expected a multiple of 4 bytes, got ",
                            c.bytes.size());
  }
  for (size_t k = 0; k < p.values.size(); ++k)
    check_value(k, p.values[k]);
  check_order(p);
  for (size_t k = 0; k < p.nodes.size(); ++k)
    NodeCheck(p, k).run();
}

}  // namespace adalayer::engine

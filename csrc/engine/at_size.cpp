#include "engine/at_size.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/status.hpp"
#include "engine/limits.hpp"

namespace adalayer::engine {
namespace {

/// Height and width, one after the other.
constexpr const char* kAxes[] = {"height", "width"};

struct ResizeTables {
  std::vector<int32_t> low, high;
  std::vector<float> part;
};

/// Input pixels per output pixel, in float32 as torch has it.
float resize_step(int64_t in, int64_t out, const ResizeAxis& axis, ResizeMode mode) {
  if (mode == ResizeMode::LinearAligned)
    return out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.0f;
  if (axis.kind == ResizeAxis::Kind::Factor) return static_cast<float>(1.0 / axis.factor);
  return static_cast<float>(in) / static_cast<float>(out);
}

/// As ops/resizing.py makes them for the size that is compiled.
ResizeTables resize_tables(int64_t in, int64_t out, float step, ResizeMode mode) {
  ResizeTables t;
  const auto last = static_cast<int32_t>(in - 1);
  for (int64_t i = 0; i < out; ++i) {
    const auto index = static_cast<float>(i);
    if (mode == ResizeMode::Nearest || mode == ResizeMode::NearestExact) {
      const float at = mode == ResizeMode::Nearest ? index : index + 0.5f;
      const int32_t low = std::min(static_cast<int32_t>(std::floor(at * step)), last);
      t.low.push_back(low);
      t.high.push_back(low);
      t.part.push_back(0.0f);
      continue;
    }
    float position = step * index;
    if (mode == ResizeMode::Linear) {
      const float middle = step * (index + 0.5f);
      position = std::max(middle - 0.5f, 0.0f);
    }
    const int32_t low = std::min(static_cast<int32_t>(position), last);
    t.low.push_back(low);
    t.high.push_back(std::min(low + 1, last));
    t.part.push_back(std::clamp(position - static_cast<float>(low), 0.0f, 1.0f));
  }
  return t;
}

/// Positions 0 .. n-1 with a border of others, as numpy.pad has them.
std::vector<int64_t> bordered(int64_t n, const RearrangeAxis& axis) {
  std::vector<int64_t> at;
  for (int64_t i = -axis.before; i < n + axis.after; ++i) {
    int64_t k = i;
    if (axis.border == BorderMode::Edge) k = std::clamp<int64_t>(i, 0, n - 1);
    if (axis.border == BorderMode::Reflect) k = i < 0 ? -i : i >= n ? 2 * (n - 1) - i : i;
    if (axis.border == BorderMode::Wrap) k = i < 0 ? i + n : i >= n ? i - n : i;
    at.push_back(k);
  }
  return at;
}

class Resized {
 public:
  Resized(const Program& program, const SizeRules& rules, int64_t memory_bytes)
      : from_(program), rules_(rules), memory_bytes_(memory_bytes), to_(program) {}

  Program run(std::span<const int64_t> sizes) {
    rules_.check(sizes);
    to_.metadata.clear();  // it describes the program that was compiled
    to_.levels.clear();    // of that size, too; at_level() comes first
    for (size_t k = 0; k < from_.inputs.size(); ++k) {
      Value& v = to_.values[from_.inputs[k]];
      const PortAxes& port = rules_.inputs[k];
      if (port.h >= 0) v.h = sizes[static_cast<size_t>(port.h)];
      if (port.w >= 0) v.w = sizes[static_cast<size_t>(port.w)];
    }
    for (index_ = 0; index_ < from_.nodes.size(); ++index_) {
      try {
        place();
      } catch (const InvalidArgument& e) {
        const Node& n = node();
        fail<InvalidArgument>("node ", index_, " (", op_name(n.op), " \"", n.name,
                              "\"): ", e.what());
      }
    }
    validate(to_);
    return std::move(to_);
  }

 private:
  template <typename... Pieces>
  [[noreturn]] static void bad(const Pieces&... pieces) {
    fail<InvalidArgument>(pieces...);
  }

  Node& node() { return to_.nodes[index_]; }
  const Value& in(size_t k = 0) { return to_.values[node().inputs[k]]; }
  const Value& old_in(size_t k = 0) { return from_.values[node().inputs[k]]; }
  Value& out() { return to_.values[node().output]; }
  const Value& old_out() { return from_.values[node().output]; }
  const NodeRule* rule() const {
    const auto found = rules_.nodes.find(index_);
    return found == rules_.nodes.end() ? nullptr : &found->second;
  }
  bool same_input() { return in().h == old_in().h && in().w == old_in().w; }
  static int64_t side(const Value& v, size_t axis) { return axis == 0 ? v.h : v.w; }
  static int64_t& side(Value& v, size_t axis) { return axis == 0 ? v.h : v.w; }
  int64_t& integer(std::string_view name) {
    return node().ints[static_cast<size_t>(operation(node().op).int_place(name))];
  }

  /// A constant in the place of the compiled one.
  template <class T>
  void replace(std::string_view name, ConstantKind kind, const std::vector<T>& entries) {
    std::vector<uint8_t> bytes(entries.size() * sizeof(T));
    if (!entries.empty()) std::memcpy(bytes.data(), entries.data(), bytes.size());
    made_ += static_cast<double>(bytes.size());
    check_memory(made_, memory_bytes_);
    node().constants[static_cast<size_t>(operation(node().op).constant_place(name))] =
        static_cast<int32_t>(to_.constants.size());
    to_.constants.push_back({kind, SharedBytes(std::move(bytes))});
  }

  /// The output's height and width. (Channels never change.)
  void give(int64_t h, int64_t w) {
    for (const int64_t size : {h, w})
      if (size < 1 || size > kMaxAxis)
        bad("the output would be ", h, " x ", w, ", expected 1 to ", kMaxAxis, " each");
    out().h = h;
    out().w = w;
  }

  void place() {
    switch (node().op) {
      case OpKind::Conv:
      case OpKind::FloatConv: {
        ConvShape s = conv_shape(to_, node());
        return give(s.out_h(), s.out_w());
      }
      case OpKind::ConvTranspose:
        return transposed();
      case OpKind::MaxPool:
      case OpKind::AvgPool:
        return pool();
      case OpKind::AdaptiveAvgPool: {
        const bool* keeps = rule() == nullptr ? nullptr : rule()->keeps.data();
        return give(keeps != nullptr && keeps[0] ? in().h : out().h,
                    keeps != nullptr && keeps[1] ? in().w : out().w);
      }
      case OpKind::Concat:
      case OpKind::Join:
        return join();
      case OpKind::Slice:
        return slice();
      case OpKind::Pad: {
        const PadAttributes a = pad_attributes(node());
        return give(in().h + a.top + a.bottom, in().w + a.left + a.right);
      }
      case OpKind::Resize:
        return resize();
      case OpKind::Reshape:
        if (!same_input())
          bad("its ", in().c * in().h * in().w, " features follow the image's size, where ",
              old_in().c * old_in().h * old_in().w, " were compiled");
        return;
      case OpKind::Rearrange:
        return rearrange();
      case OpKind::Reduce: {
        const ReduceSpec s = reduce_spec(to_, node());
        return give(s.along[1] ? 1 : in().h, s.along[2] ? 1 : in().w);
      }
      case OpKind::Combine:
        return give(std::max(in(0).h, in(1).h), std::max(in(0).w, in(1).w));
      case OpKind::Constant:
        return;  // the same at every size: whoever needs another one is refused below
      case OpKind::Attention:
      case OpKind::Embedding:
      case OpKind::Gather:
      case OpKind::Quantize:
      case OpKind::Dequantize:
      case OpKind::Lookup:
      case OpKind::Add:
      case OpKind::Mul:
      case OpKind::Affine:
      case OpKind::LayerNorm:
      case OpKind::RmsNorm:
      case OpKind::GroupNorm:
      case OpKind::Softmax:
      case OpKind::Function:
      case OpKind::AffineImage:
      case OpKind::Choose:
      case OpKind::Recurrence:
      case OpKind::Linear:
        return give(in().h, in().w);
    }
    bad("it is unknown at other sizes");
  }

  void transposed() {
    // What the compiled output had beyond the least one is the output padding.
    const ConvAttributes a = conv_attributes(node());
    const auto size = [](int64_t n, int64_t old, int64_t old_size, int64_t stride) {
      return old_size + (n - old) * stride;
    };
    give(size(in().h, old_in().h, old_out().h, a.stride_h),
         size(in().w, old_in().w, old_out().w, a.stride_w));
  }

  void pool() {
    const PoolSpec s = pool_spec(to_, node());
    const int64_t kernel[] = {s.kernel_h, s.kernel_w}, stride[] = {s.stride_h, s.stride_w};
    const int64_t before[] = {s.pad_top, s.pad_left};
    const int64_t dilation[] = {s.dilation_h, s.dilation_w};
    // (torch pads a maximum equally on both sides, and the program says it once.)
    const bool maximum = node().op == OpKind::MaxPool;
    const int64_t after[] = {maximum ? s.pad_top : s.pad_bottom,
                             maximum ? s.pad_left : s.pad_right};
    int64_t found[2];
    for (size_t axis = 0; axis < 2; ++axis) {
      const WindowSize window = rule() == nullptr ? WindowSize::Down : rule()->window[axis];
      const int64_t n = side(in(), axis);
      if (window == WindowSize::Whole) {
        integer(axis == 0 ? "kernel_h" : "kernel_w") = n;
        integer(axis == 0 ? "stride_h" : "stride_w") = n;
        found[axis] = 1;
        continue;
      }
      const int64_t span = n + before[axis] + after[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
      if (span < 0)
        bad("the padded ", kAxes[axis], ' ', n + before[axis] + after[axis],
            " is smaller than the kernel ", dilation[axis] * (kernel[axis] - 1) + 1);
      found[axis] = span / stride[axis] + 1;
      if (window == WindowSize::Up) {
        found[axis] = (span + stride[axis] - 1) / stride[axis] + 1;
        // The last window begins inside the image, or in the padding before it.
        if ((found[axis] - 1) * stride[axis] >= n + before[axis]) --found[axis];
      }
    }
    give(found[0], found[1]);
  }

  void join() {
    const int axis = joined_axis(node());
    int64_t h = in().h, w = in().w;
    if (axis != 0) {
      int64_t sum = 0;
      for (size_t k = 0; k < node().inputs.size(); ++k)
        sum += axis == 1 ? in(k).h : in(k).w;
      (axis == 1 ? h : w) = sum;
    }
    give(h, w);
  }

  void slice() {
    const SliceAttributes a = slice_attributes(node());
    if (a.axis == 0) return give(in().h, in().w);
    const auto axis = static_cast<size_t>(a.axis - 1);
    const int64_t size = side(in(), axis);
    int64_t begin = a.begin, count = side(old_out(), axis);
    if (const NodeRule* r = rule()) {
      if (r->from_back) begin = size - *r->from_back;
      if (begin < 0) bad("it begins ", *r->from_back, " before the end of ", size);
      if (r->leaves) count = (size - *r->leaves - begin + a.step - 1) / a.step;
      integer("begin") = begin;
    }
    if (count < 1 || begin + (count - 1) * a.step >= size)
      bad("nothing is left of a ", kAxes[axis], " of ", size);
    give(axis == 0 ? count : in().h, axis == 1 ? count : in().w);
  }

  void resize() {
    const NodeRule* r = rule();
    if (r == nullptr || !r->mode) {
      if (same_input()) return;
      bad("how its size follows from the image's is not known");
    }
    int64_t found[2];
    for (size_t axis = 0; axis < 2; ++axis) {
      const ResizeAxis& a = r->resize[axis];
      const int64_t n = side(in(), axis);
      int64_t& size = found[axis];
      size = side(old_out(), axis);
      if (a.kind == ResizeAxis::Kind::Factor)
        size = static_cast<int64_t>(
            std::min(static_cast<double>(n) * a.factor, static_cast<double>(kMaxAxis) + 1.0));
      if (a.kind == ResizeAxis::Kind::Ratio) {
        if (n * a.numerator % a.denominator != 0)
          bad("a ", kAxes[axis], " of ", n, " cannot be resized by ", a.numerator, '/',
              a.denominator);
        size = n * a.numerator / a.denominator;
      }
      if (a.kind == ResizeAxis::Kind::Like) {
        // (Values are placed in order, but program inputs and earlier results alone are.)
        if (!placed(a.like)) bad("value ", a.like, " comes later");
        size = side(to_.values[a.like], axis);
      }
    }
    give(found[0], found[1]);
    for (size_t axis = 0; axis < 2; ++axis) {
      const int64_t n = side(in(), axis), size = found[axis];
      const ResizeTables t =
          resize_tables(n, size, resize_step(n, size, r->resize[axis], *r->mode), *r->mode);
      replace(axis == 0 ? "low_h" : "low_w", ConstantKind::I32, t.low);
      replace(axis == 0 ? "high_h" : "high_w", ConstantKind::I32, t.high);
      replace(axis == 0 ? "part_h" : "part_w", ConstantKind::F32, t.part);
    }
  }

  bool placed(int32_t value) const {
    if (std::find(from_.inputs.begin(), from_.inputs.end(), value) != from_.inputs.end())
      return true;
    return std::any_of(from_.nodes.begin(),
                       from_.nodes.begin() + static_cast<std::ptrdiff_t>(index_),
                       [&](const Node& n) { return n.output == value; });
  }

  /// Numbers of elements along one axis of the output.
  std::vector<int32_t> positions(const RearrangeAxis& axis) {
    std::vector<int64_t> at = {0};
    for (const AxisPart& part : axis.parts) {
      const int64_t count = part.count.at(in().h, in().w), step = part.step.at(in().h, in().w);
      if (count < 1 || count > kMaxAxis / static_cast<int64_t>(at.size()))
        bad("expected an output of at most ", kMaxAxis, " along each axis");
      std::vector<int64_t> longer;
      longer.reserve(at.size() * static_cast<size_t>(count));
      for (const int64_t first : at)
        for (int64_t i = 0; i < count; ++i)
          longer.push_back(first + i * step);
      at = std::move(longer);
    }
    const auto n = static_cast<int64_t>(at.size());
    if (axis.border == BorderMode::Reflect && std::max(axis.before, axis.after) >= n)
      bad("a border of ", std::max(axis.before, axis.after), " is reflected in ", n);
    if (axis.border == BorderMode::Wrap && std::max(axis.before, axis.after) > n)
      bad("a border of ", std::max(axis.before, axis.after), " goes round ", n);
    if (axis.border != BorderMode::None && n + axis.before + axis.after > kMaxAxis)
      bad("expected an output of at most ", kMaxAxis, " along each axis");
    std::vector<int32_t> table;
    const auto add = [&](int64_t position) {
      if (position > INT32_MAX) bad("expected at most ", kMaxElements, " elements");
      table.push_back(static_cast<int32_t>(position));
    };
    if (axis.border == BorderMode::None)
      for (const int64_t position : at)
        add(position);
    else
      for (const int64_t k : bordered(n, axis))
        add(at[static_cast<size_t>(k)]);
    return table;
  }

  void rearrange() {
    const NodeRule* r = rule();
    if (r == nullptr) {
      if (same_input()) return;
      bad("how its order follows from the image's size is not known");
    }
    const std::vector<int32_t> channel = positions(r->rearrange[0]),
                               row = positions(r->rearrange[1]),
                               column = positions(r->rearrange[2]);
    if (static_cast<int64_t>(channel.size()) != out().c)
      bad("it would give ", channel.size(), " channels, where ", out().c, " were compiled");
    give(static_cast<int64_t>(row.size()), static_cast<int64_t>(column.size()));
    replace("channel", ConstantKind::I32, channel);
    replace("row", ConstantKind::I32, row);
    replace("column", ConstantKind::I32, column);
  }

  const Program& from_;
  const SizeRules& rules_;
  int64_t memory_bytes_;
  Program to_;
  size_t index_ = 0;
  double made_ = 0.0;
};

}  // namespace

Program at_size(const Program& program, const SizeRules& rules, std::span<const int64_t> sizes,
                int64_t memory_bytes) {
  if (!rules.any())
    fail<InvalidArgument>("the program was compiled for one size, and says nothing about others");
  return Resized(program, rules, memory_bytes).run(sizes);
}

}  // namespace adalayer::engine

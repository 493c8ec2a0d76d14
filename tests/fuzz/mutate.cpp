#include "fuzz/mutate.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/status.hpp"
#include "engine/container.hpp"
#include "engine_programs.hpp"
#include "formats/canonical.hpp"

namespace fuzz {
namespace {

using namespace adalayer;
using namespace adalayer::engine;

// Copies and appended nodes must not make programs too long to be run.
constexpr size_t kMostNodes = 60;

class Mutator {
 public:
  explicit Mutator(unsigned seed) : random_(seed) {}

  int64_t pick(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  bool one_in(int64_t n) { return pick(1, n) == 1; }
  template <class T>
  T& any(std::vector<T>& list) {
    return list[static_cast<size_t>(pick(0, static_cast<int64_t>(list.size()) - 1))];
  }

  void change(Program& p) {
    switch (pick(0, 13)) {
      case 0:
      case 1:
        return change_value(p);
      case 2:
      case 3:
      case 4:
        return change_numbers(p);
      case 5:
        return reconnect(p);
      case 6:
        return change_nodes(p);
      case 7:
        return change_constant(p);
      case 8:
      case 9:
        return new_weights(p);
      case 10:
        return change_ports(p);
      case 11:
        return change_text(p);
      default:
        return change_geometry(p);
    }
  }

 private:
  int64_t number(int64_t old) {
    constexpr int64_t kEdges[] = {-1,        0,
                                  1,         2,
                                  3,         4,
                                  7,         8,
                                  15,        16,
                                  17,        31,
                                  32,        33,
                                  63,        64,
                                  65,        127,
                                  128,       255,
                                  256,       1 << 15,
                                  1 << 20,   1 << 24,
                                  1 << 16,   (1 << 20) + 1,
                                  1000,      1 << 30,
                                  INT32_MAX, INT32_MIN,
                                  1LL << 40};
    switch (pick(0, 3)) {
      case 0:
        return kEdges[pick(0, static_cast<int64_t>(std::size(kEdges)) - 1)];
      case 1:
        return pick(0, 40);
      default:
        return static_cast<int64_t>(static_cast<uint64_t>(old) +
                                    static_cast<uint64_t>(pick(-2, 2)));
    }
  }
  int32_t small(int64_t old) { return static_cast<int32_t>(number(old)); }
  float real(float old) {
    constexpr float kEdges[] = {0.0f,   -0.0f,    1.0f,      -1.0f, 1e-40f, 1e-38f, 1e38f, 3e38f,
                                -3e38f, INFINITY, -INFINITY, NAN,   0.5f,   255.0f, 1e9f};
    if (one_in(2)) return kEdges[pick(0, static_cast<int64_t>(std::size(kEdges)) - 1)];
    return old * static_cast<float>(pick(-3, 5));
  }
  template <class T>
  void lengthen_or_cut(std::vector<T>& list) {
    if (!list.empty() && one_in(2))
      list.pop_back();
    else
      list.push_back(list.empty() ? T{} : list.back());
  }

  void change_value(Program& p) {
    if (p.values.empty()) return;
    Value& v = any(p.values);
    switch (pick(0, 6)) {
      case 0:
        v.c = std::max<int64_t>(0, number(v.c));
        return;
      case 1:
        v.h = std::max<int64_t>(0, number(v.h));
        return;
      case 2:
        v.w = std::max<int64_t>(0, number(v.w));
        return;
      case 3:
        v.scale = real(v.scale);
        return;
      case 4:
        v.zero_point = small(v.zero_point);
        return;
      case 5:
        v.qmax = small(v.qmax);
        return;
      default:
        v.kind = static_cast<ValueKind>(pick(0, 2));
    }
  }

  void change_numbers(Program& p) {
    if (p.nodes.empty()) return;
    Node& n = any(p.nodes);
    if (one_in(20)) return lengthen_or_cut(n.ints);
    if (one_in(20)) return lengthen_or_cut(n.floats);
    if (!n.floats.empty() && one_in(4)) {
      float& f = any(n.floats);
      f = real(f);
    } else if (!n.ints.empty()) {
      const auto k = static_cast<size_t>(pick(0, std::ssize(n.ints) - 1));
      n.ints[k] = one_in(3) ? at_a_bound(n.op, k) : number(n.ints[k]);
    }
  }

  /// The ends of what a parameter may be, and what lies just beyond.
  int64_t at_a_bound(OpKind op, size_t place) {
    if (!is_operation(static_cast<uint32_t>(op)) || place >= operation(op).ints.size()) return 0;
    const IntParameter& p = operation(op).ints[place];
    return (one_in(2) ? p.low : p.high) + pick(-1, 1);
  }

  void reconnect(Program& p) {
    if (p.nodes.empty()) return;
    Node& n = any(p.nodes);
    std::vector<int32_t>& list = one_in(2) ? n.inputs : n.constants;
    if (one_in(10)) return lengthen_or_cut(list);
    if (one_in(10)) {
      n.output = small(n.output);
      return;
    }
    if (list.empty()) return;
    const bool inputs = &list == &n.inputs;
    const auto count = static_cast<int64_t>(inputs ? p.values.size() : p.constants.size());
    any(list) =
        static_cast<int32_t>(one_in(10) ? number(0) : pick(-1, std::max<int64_t>(0, count)));
  }

  /// Nodes come, go and become others. A copy writes a value of its own.
  void change_nodes(Program& p) {
    if (p.nodes.empty()) return;
    const int64_t at = pick(0, static_cast<int64_t>(p.nodes.size()) - 1);
    Node& n = p.nodes[static_cast<size_t>(at)];
    switch (pick(0, 3)) {
      case 0:
        n.op = static_cast<OpKind>(pick(0, kOpKinds - 1));
        return;
      case 1:
        p.nodes.erase(p.nodes.begin() + at);
        return;
      case 2:
        std::swap(n, any(p.nodes));
        return;
      default:
        break;
    }
    if (p.nodes.size() >= kMostNodes || n.output < 0 ||
        static_cast<size_t>(n.output) >= p.values.size())
      return;
    Node copy = n;
    const Value value = p.values[static_cast<size_t>(copy.output)];
    p.values.push_back(value);
    // Behind the first: it may read what that one wrote.
    if (!copy.inputs.empty() && one_in(2)) any(copy.inputs) = copy.output;
    copy.output = static_cast<int32_t>(p.values.size()) - 1;
    p.nodes.insert(p.nodes.begin() + at + 1, std::move(copy));
  }

  void change_constant(Program& p) {
    if (p.constants.empty()) return;
    Constant& c = any(p.constants);
    if (one_in(20)) {
      c.kind = static_cast<ConstantKind>(pick(0, 3));
      return;
    }
    const size_t size = c.bytes.size();
    // Sizes are checked; most changes should be of the contents.
    c.bytes.resize(size + 16);
    const size_t changed = LLVMFuzzerMutate(c.bytes.data(), size, size + 16);
    c.bytes.resize(one_in(5) ? changed : size);
    if (c.kind == ConstantKind::Weights && c.bytes.size() >= sizeof(formats::CanonicalHeader))
      right_hash(c.bytes);
  }

  /// Makes the content hash right again, as repair_checksums() does with the file's.
  static void right_hash(std::vector<uint8_t>& bytes) {
    constexpr size_t kHashed = offsetof(formats::CanonicalHeader, content_hash);
    std::vector<uint8_t> text(bytes.begin(), bytes.begin() + kHashed);
    text.insert(text.end(), bytes.begin() + sizeof(formats::CanonicalHeader), bytes.end());
    const uint64_t hash = formats::checksum(text);
    std::memcpy(bytes.data() + kHashed, &hash, sizeof hash);
  }

  const Value* input_of(const Program& p, const Node& n) const {
    if (n.inputs.empty() || n.inputs[0] < 0 || static_cast<size_t>(n.inputs[0]) >= p.values.size())
      return nullptr;
    return &p.values[static_cast<size_t>(n.inputs[0])];
  }
  Value* output_of(Program& p, const Node& n) const {
    if (n.output < 0 || static_cast<size_t>(n.output) >= p.values.size()) return nullptr;
    return &p.values[static_cast<size_t>(n.output)];
  }
  static bool is_conv(const Node& n) {
    const Operation& o = operation(OpKind::Conv);
    return (n.op == OpKind::Conv || n.op == OpKind::ConvTranspose) &&
           n.ints.size() >= o.ints.size() && n.constants.size() >= o.constants.size();
  }

  /// Weights, scales and biases of the sizes that a convolution wants now.
  void new_weights(Program& p) {
    if (p.nodes.empty()) return;
    Node& n = any(p.nodes);
    const Value* x = input_of(p, n);
    const Value* y = output_of(p, n);
    if (!is_conv(n) || x == nullptr || y == nullptr) return;
    fit_weights(p, n, x->c, y->c);
  }

  void fit_weights(Program& p, Node& n, int64_t in, int64_t out) {
    const int64_t groups = n.ints[int_of(OpKind::Conv, "groups")];
    const int64_t kernel_h = n.ints[int_of(OpKind::Conv, "kernel_h")];
    const int64_t kernel_w = n.ints[int_of(OpKind::Conv, "kernel_w")];
    for (const int64_t size : {groups, kernel_h, kernel_w, in, out})
      if (size < 1 || size > 4096) return;
    const int64_t count = out * (in / groups) * kernel_h * kernel_w;
    if (count < 1 || count > 20000) return;
    const int bits = static_cast<int>(pick(2, 8));
    std::vector<int8_t> weights(static_cast<size_t>(count), 0);
    const bool sparse = one_in(3);
    for (int8_t& w : weights)
      if (!sparse || one_in(4))
        w = static_cast<int8_t>(pick(-(1 << (bits - 1)), (1 << (bits - 1)) - 1));
    const auto add = [&](ConstantKind kind, std::vector<uint8_t> bytes) {
      p.constants.push_back({kind, std::move(bytes)});
      return static_cast<int32_t>(p.constants.size()) - 1;
    };
    n.constants[constant_of(OpKind::Conv, "weights")] =
        add(ConstantKind::Weights,
            formats::pack_canonical(
                weights, bits, static_cast<uint32_t>(out), static_cast<uint32_t>(in / groups),
                static_cast<uint32_t>(kernel_h), static_cast<uint32_t>(kernel_w)));
    for (const size_t slot :
         {constant_of(OpKind::Conv, "scale"), constant_of(OpKind::Conv, "bias")}) {
      std::vector<float> floats(static_cast<size_t>(out));
      for (float& f : floats)
        f = static_cast<float>(pick(-100, 100)) / 500.0f;
      std::vector<uint8_t> bytes(floats.size() * 4);
      std::memcpy(bytes.data(), floats.data(), bytes.size());
      n.constants[slot] = add(ConstantKind::F32, std::move(bytes));
    }
  }

  /// A kernel, stride, padding or channel count changes, and what has to follow it does.
  void change_geometry(Program& p) {
    if (p.nodes.empty()) return;
    Node& n = any(p.nodes);
    const Value* x = input_of(p, n);
    Value* y = output_of(p, n);
    if (x == nullptr || y == nullptr) return;
    const bool conv = is_conv(n);
    const bool pool =
        n.op == OpKind::MaxPool && n.ints.size() >= operation(OpKind::MaxPool).ints.size();
    if (!conv && !pool) return;
    const Operation& o = operation(n.op);
    const auto last = static_cast<size_t>(conv ? o.finish() : std::ssize(o.ints));
    for (int64_t changes = pick(1, 3); changes > 0; --changes) {
      const auto k = static_cast<size_t>(pick(0, static_cast<int64_t>(last) - 1));
      n.ints[k] = pick(o.ints[k].low, one_in(8) ? 24 : 4);
    }
    for (size_t k = 0; k < last; ++k)
      if (n.ints[k] < 0 || n.ints[k] > 4096) return;
    const auto of = [&](const char* name) { return n.ints[o.int_place(name)]; };
    if (conv && one_in(3)) y->c = pick(1, 70);
    if (conv && of("groups") > 1 && one_in(2)) y->c = of("groups") * pick(1, 4);
    const auto size = [&](int64_t in, int64_t kernel, int64_t stride, int64_t dilation,
                          int64_t padding) {
      const int64_t extent = dilation * (kernel - 1) + 1, step = std::max<int64_t>(1, stride);
      const int64_t out = n.op == OpKind::ConvTranspose ? (in - 1) * step + extent - padding
                                                        : (in + padding - extent) / step + 1;
      return std::max<int64_t>(0, out);
    };
    const int64_t above = of("pad_top"), left = of("pad_left");
    y->h = size(x->h, of("kernel_h"), of("stride_h"), of("dilation_h"),
                above + (conv ? of("pad_bottom") : above));
    y->w = size(x->w, of("kernel_w"), of("stride_w"), of("dilation_w"),
                left + (conv ? of("pad_right") : left));
    if (conv)
      fit_weights(p, n, x->c, y->c);
    else
      y->c = x->c;
  }

  void change_ports(Program& p) {
    std::vector<int32_t>& ports = one_in(2) ? p.inputs : p.outputs;
    if (one_in(3)) return lengthen_or_cut(ports);
    if (!ports.empty())
      any(ports) = static_cast<int32_t>(pick(-1, static_cast<int64_t>(p.values.size())));
  }

  void change_text(Program& p) {
    static const std::pair<const char*, const char*> kTexts[] = {
        {"adalayer.inputs", R"([["x", [2, 1, 1]]])"},
        {"adalayer.order", "[0]"},
        {"adalayer.outputs", "[[0, [2], [[2, 1]]]]"},
        {"adalayer.leaves", R"([{"tensor": 0}, {"constant": null}])"},
        {"adalayer.structure", R"({"dict": {"a": {"tuple": [0, 1]}}})"},
        {"preprocessing", R"({"mean": [0.5, 1], "std": [1, 2e-1]})"},
        {"classes", R"(["a", "\u00e9\ud83d\ude00"])"},
    };
    const auto& [key, fresh] = kTexts[pick(0, static_cast<int64_t>(std::size(kTexts)) - 1)];
    if (one_in(6)) {
      p.metadata.erase(key);
      return;
    }
    std::string& text = p.metadata[key];
    if (text.empty() || one_in(8)) text = fresh;
    if (one_in(3)) return;
    const size_t size = text.size();
    text.resize(size + 20);
    text.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(text.data()), size, text.size()));
  }

  std::mt19937 random_;
};

}  // namespace

size_t mutate_file(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  Mutator m(seed);
  if (size > 0 && !m.one_in(4)) {
    try {
      Program p = parse({data, size});
      for (int64_t changes = m.pick(1, 4); changes > 0; --changes)
        m.change(p);
      const std::vector<uint8_t> file = serialize(p);
      if (file.size() <= max_size) {
        std::memcpy(data, file.data(), file.size());
        return file.size();
      }
    } catch (const Error&) {
      // Not a file whose tables can be read: its bytes are changed.
    }
  }
  const size_t changed = LLVMFuzzerMutate(data, size, max_size);
  if (m.one_in(8)) return changed;
  std::vector<uint8_t> file(data, data + changed);
  programs::repair_checksums(file);
  std::memcpy(data, file.data(), file.size());
  return file.size();
}

}  // namespace fuzz

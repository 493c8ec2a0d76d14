// Tests of csrc/engine: what validate() refuses, and the .ada file: round trips, damage, versions,
// disks that are full.
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <new>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "engine/container.hpp"
#include "engine/engine.hpp"
#include "engine/interpret.hpp"
#include "engine_programs.hpp"

using namespace adalayer;
using namespace adalayer::engine;
using namespace programs;

// ---- the largest allocation of a piece of code --------------------------------------------------

namespace {
size_t g_largest = 0;
}

// Not inlined: g++ 12 would see free() of what operator new returned, and warn.
[[gnu::noinline]] void* operator new(size_t size) {
  g_largest = std::max(g_largest, size);
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  g_largest = std::max(g_largest, size);
  return std::malloc(size == 0 ? 1 : size);
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace {

namespace fs = std::filesystem;

/// What became of a program or file: refused with one of our errors, or accepted.
enum class Outcome { Refused, Accepted };

Outcome outcome(const std::function<void()>& f) {
  try {
    f();
  } catch (const InvalidArgument&) {
    return Outcome::Refused;
  } catch (const CorruptData&) {
    return Outcome::Refused;
  }
  return Outcome::Accepted;
}

bool refused(const Program& p) {
  return outcome([&] { validate(p); }) == Outcome::Refused;
}
bool refused(const std::vector<uint8_t>& file) {
  return outcome([&] { read_program(file); }) == Outcome::Refused;
}

/// Runs a valid program on noise if it is small enough for a test.
std::vector<std::vector<float>> run(const Program& p, int64_t batch) {
  int64_t i = 0;
  const auto data =
      input_noise(p, batch, [&] { return static_cast<float>(i++ * 37 % 101) - 50.0f; });
  std::vector<InputTensor> inputs;
  for (const auto& x : data)
    inputs.push_back({x.data(), Layout::NCHW});
  return interpret(p, inputs, batch);
}

bool is_small(const Program& p) {
  int64_t elements = 0;
  for (const Value& v : p.values)
    elements += v.c * v.h * v.w;
  int64_t taps = 1;
  for (const Node& n : p.nodes)
    if (n.op == OpKind::MaxPool || n.op == OpKind::AvgPool)
      taps = std::max(taps, n.ints[0] * n.ints[1]);
  return elements < 100000 && taps < 1000;
}

/// A folder of its own, removed at the end.
class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "ada-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) fail("no temporary folder");
    path_ = name;
  }
  ~Folder() { fs::remove_all(path_); }
  fs::path operator/(const char* name) const { return path_ / name; }
  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(path_))
      out.push_back(entry.path().filename().string());
    return out;
  }

 private:
  fs::path path_;
};

/// The program with one change, and the message that it must give.
void check_refused(const char* text, const std::function<void(Program&)>& change) {
  Program p = every_operation();
  change(p);
  CHECK_THROWS(validate(p), InvalidArgument, text);
}

Node& find(Program& p, OpKind op) {
  return *std::find_if(p.nodes.begin(), p.nodes.end(), [&](const Node& n) { return n.op == op; });
}
Value& output_of(Program& p, OpKind op) { return p.values[find(p, op).output]; }

AdaSection section(const std::vector<uint8_t>& file, const char* id) {
  for (size_t k = 0; k < 6; ++k) {
    AdaSection s;
    std::memcpy(&s, file.data() + sizeof(AdaHeader) + k * sizeof s, sizeof s);
    if (std::memcmp(s.id, id, 4) == 0) return s;
  }
  fail("no section ", id);
}

template <typename T>
void poke(std::vector<uint8_t>& file, uint64_t at, T value) {
  std::memcpy(file.data() + at, &value, sizeof value);
}

}  // namespace

// ---- validation ---------------------------------------------------------------------------------

TEST(every_operation_is_valid_and_runs) {
  const Program p = every_operation();
  validate(p);
  std::set<OpKind> kinds;
  const Program tokens = token_program(), floats = float_program();
  for (const Program* all : {&p, &tokens, &floats})
    for (const Node& n : all->nodes)
      kinds.insert(n.op);
  size_t operations = 0;
  for (uint32_t k = 0; k < kOpKinds; ++k)
    operations += is_operation(k) ? 1 : 0;
  CHECK_EQ(kinds.size(), operations);
  const auto outputs = run(p, 2);
  CHECK_EQ(outputs.size(), p.outputs.size());
  CHECK_EQ(outputs[0].size(), size_t{2 * 8 * 3 * 3});
  for (const auto& y : outputs)
    for (const float v : y)
      CHECK(std::isfinite(v));
  CHECK_EQ(run(p, 0)[0].size(), size_t{0});
}

TEST(levels_stay_below_qmax) {
  Program p = every_operation();
  std::vector<float> x(4 * 6 * 5), z(4);
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<float>(static_cast<int>(i * 31 % 97) - 40) * 3.0f;
  const InputTensor inputs[] = {{x.data(), Layout::NHWC}, {z.data(), Layout::NCHW}};
  output_of(p, OpKind::Quantize).qmax = 63;
  find(p, OpKind::Conv).ints[12] = 255;
  const auto tensors = interpret_values(p, inputs, 1);
  for (size_t v = 0; v < p.values.size(); ++v)
    for (const uint8_t q : tensors[v].levels)
      CHECK(q <= p.values[v].qmax);
}

TEST(operation_names_go_back_and_forth) {
  for (uint32_t k = 0; k < kOpKinds; ++k)
    if (is_operation(k))
      CHECK_EQ(op_from_name(op_name(static_cast<OpKind>(k))), static_cast<OpKind>(k));
  CHECK_THROWS(op_from_name("convolve"), InvalidArgument, "unknown operation \"convolve\"");
  CHECK_EQ(std::string(op_name(static_cast<OpKind>(200))), std::string("unknown"));
}

TEST(refusals_say_what_is_wrong) {
  check_refused("expected 14 ints, got 13",
                [](Program& p) { find(p, OpKind::Conv).ints.pop_back(); });
  check_refused("(conv \"layer.conv\")", [](Program& p) { find(p, OpKind::Conv).ints.clear(); });
  check_refused("expected 3 floats", [](Program& p) { find(p, OpKind::Add).floats.clear(); });
  check_refused("expected 6 constants",
                [](Program& p) { find(p, OpKind::Resize).constants.pop_back(); });
  check_refused("inputs", [](Program& p) { find(p, OpKind::Add).inputs.pop_back(); });
  check_refused("inputs", [](Program& p) { find(p, OpKind::Concat).inputs.clear(); });
  check_refused("does not exist", [](Program& p) { p.nodes[0].inputs[0] = 999; });
  check_refused("does not exist", [](Program& p) { p.nodes[0].output = -1; });
  check_refused("not written before", [](Program& p) { std::swap(p.nodes[2], p.nodes[3]); });
  check_refused("is never written", [](Program& p) { p.values.push_back(p.values[2]); });
  check_refused("written twice", [](Program& p) { p.nodes.push_back(p.nodes[0]); });
  check_refused("listed twice", [](Program& p) { p.outputs.push_back(p.outputs[0]); });
  check_refused("listed twice", [](Program& p) { p.inputs.push_back(p.inputs[0]); });
  check_refused("is a program input", [](Program& p) { p.outputs = {p.inputs[0]}; });
  check_refused("must be f32", [](Program& p) { p.outputs = {p.nodes[0].output}; });
  check_refused("program outputs", [](Program& p) { p.outputs.clear(); });
  check_refused("unknown to this version",
                [](Program& p) { p.nodes[1].op = static_cast<OpKind>(kOpKinds); });
  check_refused("unknown kind", [](Program& p) { p.values[0].kind = static_cast<ValueKind>(7); });
  check_refused("unknown kind",
                [](Program& p) { p.constants[0].kind = static_cast<ConstantKind>(9); });
  check_refused("multiple of 4", [](Program& p) { p.constants[0].bytes.pop_back(); });
  check_refused("each axis", [](Program& p) { p.values[1].h = 0; });
  check_refused("each axis", [](Program& p) { p.values[1].w = kMaxAxis + 1; });
  check_refused("elements", [](Program& p) { p.values[1].c = p.values[1].h = kMaxAxis; });
  check_refused("the scale must be", [](Program& p) { output_of(p, OpKind::Quantize).scale = 0; });
  check_refused("the scale must be",
                [](Program& p) { output_of(p, OpKind::Quantize).scale = 1e-40f; });
  check_refused("zero point", [](Program& p) { output_of(p, OpKind::Quantize).zero_point = 256; });
  check_refused("qmax", [](Program& p) { output_of(p, OpKind::Quantize).qmax = 256; });
  check_refused("expected weights of",
                [](Program& p) { find(p, OpKind::Conv).constants[0] = p.nodes[3].constants[0]; });
  check_refused("packed weight: the magic",
                [](Program& p) { p.constants[find(p, OpKind::Conv).constants[0]].bytes[0] ^= 1; });
  check_refused("of kind weights", [](Program& p) { find(p, OpKind::Conv).constants[0] = 0; });
  check_refused("of kind f32", [](Program& p) {
    find(p, OpKind::Conv).constants[1] = find(p, OpKind::Conv).constants[0];
  });
  check_refused("does not exist", [](Program& p) { find(p, OpKind::Conv).constants[1] = -1; });
  check_refused("finite", [](Program& p) {
    const float inf = INFINITY;
    std::memcpy(p.constants[0].bytes.data(), &inf, 4);
  });
  check_refused("divisible by groups", [](Program& p) { find(p, OpKind::Conv).ints[10] = 3; });
  check_refused("smaller than the dilated kernel",
                [](Program& p) { find(p, OpKind::Conv).ints[8] = 100; });
  check_refused("expected output of", [](Program& p) { find(p, OpKind::Conv).ints[2] = 1; });
  check_refused("expected an output height",
                [](Program& p) { find(p, OpKind::ConvTranspose).ints[4] = 5; });
  check_refused("elements with padding", [](Program& p) {
    Node& n = find(p, OpKind::Conv);
    n.ints[4] = n.ints[5] = n.ints[6] = n.ints[7] = kMaxAxis;
  });
  check_refused("hi must be", [](Program& p) { find(p, OpKind::Conv).ints[12] = 9; });
  check_refused("without a table the zero point",
                [](Program& p) { find(p, OpKind::Conv).ints[13] = 11; });
  check_refused("without a table the zero point",
                [](Program& p) { output_of(p, OpKind::Conv).qmax = 254; });
  check_refused("above the output's qmax",
                [](Program& p) { output_of(p, OpKind::Lookup).qmax = 100; });
  check_refused("256 entries", [](Program& p) {
    p.constants[find(p, OpKind::Lookup).constants[0]].bytes.resize(255);
  });
  check_refused("a float output has no table", [](Program& p) {
    for (Node& n : p.nodes)
      if (n.op == OpKind::Conv) n.constants[3] = find(p, OpKind::Lookup).constants[0];
  });
  check_refused("expected second input of",
                [](Program& p) { find(p, OpKind::Mul).inputs[1] = p.nodes[2].output; });
  check_refused("contains no position", [](Program& p) { find(p, OpKind::MaxPool).ints[4] = 3; });
  check_refused("contains no position", [](Program& p) { find(p, OpKind::MaxPool).ints[2] = 4; });
  check_refused("expected an output height",
                [](Program& p) { find(p, OpKind::AvgPool).ints[6] = 4; });
  check_refused("grid of input", [](Program& p) { output_of(p, OpKind::MaxPool).scale = 2.0f; });
  check_refused("the slice ends behind", [](Program& p) { find(p, OpKind::Slice).ints[1] = 2; });
  check_refused("is not sliced", [](Program& p) { find(p, OpKind::Slice).ints[0] = 1; });
  check_refused("expected channels 0 to 3", [](Program& p) {
    poke(p.constants[find(p, OpKind::Gather).constants[0]].bytes, 4, int32_t{4});
  });
  const auto rows = [](Program& p) -> std::vector<uint8_t>& {
    return p.constants[find(p, OpKind::Rearrange).constants[1]].bytes;
  };
  check_refused("up to 15, the input's last element, got 16",
                [&](Program& p) { poke(rows(p), 4, int32_t{3}); });
  check_refused("entries of 0 and more", [&](Program& p) { poke(rows(p), 0, int32_t{-1}); });
  check_refused("row: expected 2 entries, got 3", [&](Program& p) { rows(p).resize(12); });
  check_refused("got 3221225469", [&](Program& p) {
    for (const int32_t c : find(p, OpKind::Rearrange).constants)
      poke(p.constants[c].bytes, 0, int32_t{0x3FFFFFFF});
  });
  check_refused("function must be 0 to 5",
                [](Program& p) { find(p, OpKind::Function).ints[0] = 6; });
  check_refused("must not exceed the upper", [](Program& p) {
    Node& n = find(p, OpKind::Function);
    n.ints[0] = 0;
    n.floats[1] = -1.0f;
  });
  check_refused("a and b must be finite", [](Program& p) {
    find(p, OpKind::Function).floats[0] = std::numeric_limits<float>::infinity();
  });
  check_refused("pair must be 0 to 2", [](Program& p) { find(p, OpKind::Combine).ints[0] = 3; });
  check_refused("expected second input of 8 x 2 x 2",
                [](Program& p) { find(p, OpKind::Combine).inputs[1] = p.inputs[1]; });
  const auto bytes = [](Program& p, OpKind op, size_t slot) -> std::vector<uint8_t>& {
    return p.constants[find(p, op).constants[slot]].bytes;
  };
  check_refused("bias: expected 4 floats, one per channel, or 144, one per element, got 143",
                [&](Program& p) { bytes(p, OpKind::AffineImage, 1).resize(4 * 143); });
  check_refused("bias: every entry must be finite",
                [&](Program& p) { poke(bytes(p, OpKind::AffineImage, 1), 40, INFINITY); });
  check_refused("values: expected 48, one per element of the output, got 47",
                [&](Program& p) { bytes(p, OpKind::Constant, 0).pop_back(); });
  check_refused("values: 235 is above the output's qmax 234",
                [](Program& p) { output_of(p, OpKind::Constant).qmax = 234; });
  check_refused("expected 0 to 0 inputs, got 1", [](Program& p) {
    find(p, OpKind::Constant).inputs.push_back(find(p, OpKind::Conv).output);
  });
  check_refused("axis must be 1 to 2, got 0",
                [](Program& p) { find(p, OpKind::Join).ints[0] = 0; });
  check_refused("expected input of", [](Program& p) { find(p, OpKind::Join).ints[0] = 2; });
  check_refused("expected output of 4 x 7 x 6",
                [](Program& p) { output_of(p, OpKind::Join).h = 8; });
  check_refused("grid of input 0", [](Program& p) { output_of(p, OpKind::Constant).scale = 2.0f; });
  check_refused("above the output's qmax", [](Program& p) {
    Node& n = find(p, OpKind::Join);
    n.constants[0] = n.constants[1];
    output_of(p, OpKind::Join).qmax = 99;
  });
  check_refused("divisible by groups 3, got 4",
                [](Program& p) { find(p, OpKind::GroupNorm).ints[0] = 3; });
  check_refused("groups must be 1 to 4",
                [](Program& p) { find(p, OpKind::GroupNorm).ints[0] = 5; });
  check_refused("eps must be", [](Program& p) { find(p, OpKind::GroupNorm).floats[1] = -1.0f; });
  const auto attention = [](size_t at, int64_t number) {
    return [=](Program& p) { find(p, OpKind::Attention).ints[at] = number; };
  };
  check_refused("heads must be 1 to", attention(0, 0));
  check_refused("key_heads must be 1 to 2", attention(1, 3));
  check_refused("queries: expected a multiple of 3 channels, got 2", [&](Program& p) {
    attention(0, 3)(p);
    attention(1, 3)(p);
  });
  check_refused("expected keys of 1 x", attention(1, 1));
  check_refused("mask: expected 64 entries, got 128", attention(5, 0));
  check_refused("mask: expected 128 entries, got 127", [](Program& p) {
    p.constants[find(p, OpKind::Attention).constants[0]].bytes.resize(127 * 4);
  });
  check_refused("mask: expected finite entries or -infinity, got nan", [](Program& p) {
    poke(p.constants[find(p, OpKind::Attention).constants[0]].bytes, 4,
         std::numeric_limits<float>::quiet_NaN());
  });
  check_refused("expected finite entries or -infinity, got inf", [](Program& p) {
    poke(p.constants[find(p, OpKind::Attention).constants[0]].bytes, 4,
         std::numeric_limits<float>::infinity());
  });
  check_refused("the scale must be finite", [](Program& p) {
    find(p, OpKind::Attention).floats[1] = std::numeric_limits<float>::infinity();
  });
  check_refused("expected as many values as keys", [](Program& p) {
    find(p, OpKind::Attention).inputs[2] = find(p, OpKind::LayerNorm).output;
  });
  check_refused("expected positions 0 to 6", [](Program& p) {
    poke(p.constants[find(p, OpKind::Resize).constants[0]].bytes, 4, int32_t{-1});
  });
  check_refused("parts must be 0 to 1", [](Program& p) {
    poke(p.constants[find(p, OpKind::Resize).constants[2]].bytes, 4, 1.5f);
  });
  check_refused("eps must be", [](Program& p) { find(p, OpKind::LayerNorm).floats[1] = 0.0f; });
  check_refused("eps must be", [](Program& p) { find(p, OpKind::RmsNorm).floats[1] = -1.0f; });
  check_refused("the inverse scale before the table",
                [](Program& p) { find(p, OpKind::Mul).floats[0] = 0.0f; });
  check_refused("without a table the inverse scale",
                [](Program& p) { find(p, OpKind::Conv).floats[0] *= 2.0f; });
  check_refused("elements in the output", [](Program& p) { output_of(p, OpKind::Reshape).c = 15; });
  check_refused("not valid UTF-8", [](Program& p) { p.nodes[0].name = "\xC0\x80"; });
  check_refused("not valid UTF-8", [](Program& p) { p.values[0].name = "a\xED\xA0\x80"; });
  check_refused("not valid UTF-8", [](Program& p) { p.metadata["k"] = "\xE2\x82"; });
  check_refused("bytes of text", [](Program& p) { p.nodes[0].name.assign(kMaxName + 1, 'x'); });
}

TEST(programs_that_are_not_valid_are_written_and_read) {
  const auto kept = [](const std::function<void(Program&)>& change) {
    Program p = every_operation();
    change(p);
    const Program back = parse(serialize(p));
    CHECK_EQ(back.nodes.size(), p.nodes.size());
    CHECK(serialize(back) == serialize(p));
  };
  for (const int32_t number : {-1, 1 << 20, std::numeric_limits<int32_t>::min()}) {
    kept([&](Program& p) {
      for (Node& n : p.nodes)
        n.output = number;
    });
    kept([&](Program& p) {
      for (Node& n : p.nodes)
        n.inputs.assign(n.inputs.size(), number);
    });
  }
  kept([](Program& p) {
    for (Node& n : p.nodes)
      n.inputs.clear();
  });
}

// ---- what the table of operations says ----------------------------------------------------------

TEST(the_table_of_operations_holds_together) {
  std::set<std::string_view> names;
  for (int k = 0; k < kOpKinds; ++k) {
    const auto op = static_cast<OpKind>(k);
    const Operation& o = operation(op);
    CHECK_MSG(names.insert(o.name).second, o.name);
    CHECK(op_from_name(o.name) == op);
    CHECK_MSG(!o.forms.empty(), o.name);
    std::set<std::string_view> parameters;
    for (const IntParameter& p : o.ints)
      CHECK_MSG(parameters.insert(p.name).second && p.low < p.high &&
                    (p.usual == kNoUsual || (p.usual >= p.low && p.usual <= p.high)),
                o.name);
    for (const FloatParameter& p : o.floats)
      CHECK_MSG(parameters.insert(p.name).second, o.name);
    for (const ConstantParameter& p : o.constants)
      CHECK_MSG(parameters.insert(p.name).second, o.name);
    // node_finish() takes these as neighbours.
    if (o.finish() >= 0)
      CHECK_MSG(o.int_place("hi") == o.finish() + 1 &&
                    o.int_place("zero_point") == o.finish() + 2 && o.float_place("inv") == 0,
                o.name);
  }
  CHECK(std::string(op_name(static_cast<OpKind>(kOpKinds))) == "unknown");
}

TEST(every_parameter_has_its_range_and_every_list_its_length) {
  std::set<OpKind> met;
  int refusals = 0;
  for (const Program& whole : {every_operation(), token_program(), float_program()}) {
    for (size_t k = 0; k < whole.nodes.size(); ++k) {
      const Operation& o = operation(whole.nodes[k].op);
      met.insert(whole.nodes[k].op);
      const auto refuses = [&](const std::string& text, const std::function<void(Node&)>& change) {
        Program p = whole;
        change(p.nodes[k]);
        CHECK_THROWS(validate(p), InvalidArgument, text);
        ++refusals;
      };
      const auto lengths = [&](const char* what, auto member) {
        refuses(what, [&](Node& n) { (n.*member).emplace_back(); });
        if (!(whole.nodes[k].*member).empty())
          refuses(what, [&](Node& n) { (n.*member).pop_back(); });
      };
      lengths(" ints, got ", &Node::ints);
      lengths(" floats, got ", &Node::floats);
      lengths(" constants, got ", &Node::constants);
      for (size_t i = 0; i < o.ints.size(); ++i)
        for (const int64_t beyond : {o.ints[i].low - 1, o.ints[i].high + 1})
          refuses(std::string(o.ints[i].name) + " must be ", [&](Node& n) { n.ints[i] = beyond; });
      for (size_t c = 0; c < o.constants.size(); ++c) {
        const ConstantParameter& parameter = o.constants[c];
        const std::string name(parameter.name);
        for (const int32_t number : {-2, static_cast<int32_t>(whole.constants.size())})
          refuses(name + ": constant ", [&](Node& n) { n.constants[c] = number; });
        if (!parameter.optional)
          refuses(name + ": constant -1 does not", [&](Node& n) { n.constants[c] = -1; });
        for (size_t other = 0; other < whole.constants.size(); ++other)
          if (whole.constants[other].kind != parameter.kind &&
              whole.constants[other].kind != parameter.other)
            refuses(name + ": expected a constant of kind ",
                    [&](Node& n) { n.constants[c] = static_cast<int32_t>(other); });
      }
      const auto wrong = [&](ValueKind kind, auto member) {
        return std::none_of(o.forms.begin(), o.forms.end(),
                            [&](const Form& f) { return f.*member == kind; });
      };
      for (const ValueKind kind : {ValueKind::U8, ValueKind::F32, ValueKind::I32}) {
        Program p = whole;
        Value& y = p.values[p.nodes[k].output];
        if (!wrong(kind, &Form::output) || y.c * y.h * y.w == 0) continue;
        y.kind = kind;
        if (kind == ValueKind::I32) y.c = 1;
        CHECK(refused(p));
        ++refusals;
      }
    }
  }
  CHECK_EQ(met.size(), static_cast<size_t>(kOpKinds));
  CHECK(refusals > 1000);
}

TEST(token_ids_are_what_they_must_be) {
  const auto refused_with = [](const char* text, const std::function<void(Program&)>& change) {
    Program p = token_program();
    change(p);
    CHECK_THROWS(validate(p), InvalidArgument, text);
  };
  validate(token_program());
  const auto table = [](Program& p) -> std::vector<uint8_t>& {
    return p.constants[find(p, OpKind::Embedding).constants[0]].bytes;
  };
  refused_with("expected token ids of one channel, got 6",
               [](Program& p) { std::swap(p.values[0].c, p.values[0].w); });
  refused_with("expected i32 input 0, got f32",
               [](Program& p) { p.values[0].kind = ValueKind::F32; });
  refused_with("must be f32 or i32", [](Program& p) { p.values[0].kind = ValueKind::U8; });
  refused_with("expected u8 output, got f32",
               [](Program& p) { output_of(p, OpKind::Embedding).kind = ValueKind::F32; });
  refused_with("expected u8 output, got i32", [](Program& p) {
    Value& v = output_of(p, OpKind::Add);
    v.kind = ValueKind::I32;
    v.c = 1;
  });
  refused_with("expected u8 input 1, got i32",
               [](Program& p) { find(p, OpKind::Add).inputs[1] = p.inputs[0]; });
  refused_with("expected output of 8 x 1 x 6",
               [](Program& p) { output_of(p, OpKind::Embedding).w = 5; });
  refused_with("expected rows of 8 levels, got 55", [&](Program& p) { table(p).resize(55); });
  refused_with("expected rows of 8 levels, got 0", [&](Program& p) { table(p).clear(); });
  refused_with("up to the output's qmax 100, got",
               [](Program& p) { output_of(p, OpKind::Embedding).qmax = 100; });
  refused_with("of kind u8", [](Program& p) {
    find(p, OpKind::Embedding).constants[0] = find(p, OpKind::Conv).constants[1];
  });
}

TEST(floats_are_what_they_must_be) {
  const auto refused_with = [](const char* text, const std::function<void(Program&)>& change) {
    Program p = float_program();
    change(p);
    CHECK_THROWS(validate(p), InvalidArgument, text);
  };
  validate(float_program());
  const auto conv = [](Program& p) -> Node& { return find(p, OpKind::FloatConv); };
  refused_with("weights: expected 6 x 2 x 9 floats, got 107", [&](Program& p) {
    p.constants[conv(p).constants[0]].bytes.resize(size_t{107} * 4);
  });
  refused_with("weights: expected 6 x 2 x 6 floats, got 108", [&](Program& p) {
    conv(p).ints[1] = 2;
    output_of(p, OpKind::FloatConv).w = 5;
  });
  refused_with("every entry must be finite", [&](Program& p) {
    const float bad = NAN;
    std::memcpy(p.constants[conv(p).constants[0]].bytes.data(), &bad, 4);
  });
  refused_with("bias: expected 6 floats, got 36",
               [&](Program& p) { conv(p).constants[2] = find(p, OpKind::Constant).constants[0]; });
  refused_with("of kind weights", [&](Program& p) { conv(p).constants[1] = conv(p).constants[2]; });
  refused_with("channels must be divisible by groups 5", [&](Program& p) { conv(p).ints[10] = 5; });
  refused_with("expected output of 6 x 3 x 3",
               [&](Program& p) { output_of(p, OpKind::FloatConv).h = 4; });
  refused_with("clamp_lo must not exceed clamp_hi",
               [&](Program& p) { conv(p).floats = {1.0f, -1.0f}; });
  refused_with("expected u8 input 0, got f32", [](Program& p) {
    find(p, OpKind::Attention).inputs[0] = find(p, OpKind::GroupNorm).output;
  });
  refused_with("expected a mask of 6 keys, got 5", [](Program& p) {
    p.values[p.inputs[1]].w = 5;
    output_of(p, OpKind::Choose).w = 5;
  });
  refused_with("expected an f32 mask of the keys, got u8", [](Program& p) {
    Node& attention = find(p, OpKind::Attention);
    attention.inputs[3] = attention.inputs[0];
  });
  refused_with("a mask of the keys is of one sequence", [](Program& p) {
    // Six rows of one token each.
    for (Value& v : p.values)
      if (v.c == 6 && v.h == 1 && v.w == 6) std::swap(v.h, v.w);
    for (Node& n : p.nodes) {
      if (n.op == OpKind::Rearrange) std::swap(n.constants[1], n.constants[2]);
      if (n.op == OpKind::Attention) n.ints[2] = 1;
    }
  });
  refused_with("expected finite floats or -infinity",
               [](Program& p) { find(p, OpKind::Choose).floats[1] = INFINITY; });
  refused_with("values: expected 36 floats", [](Program& p) {
    Node& fixed = find(p, OpKind::Constant);
    fixed.constants[0] = find(p, OpKind::Affine).constants[0];
  });
  refused_with("expected f32 output, got u8",
               [](Program& p) { output_of(p, OpKind::RmsNorm).kind = ValueKind::U8; });
}

TEST(ids_that_no_table_has_are_an_error_of_the_call) {
  const Program p = token_program();
  for (const auto& [id, text] :
       {std::pair{5, "input 0 ('ids'): expected ids of 0 to 4, got 5 in sample 1, position 3"},
        std::pair{-1, "got -1 in sample 1"}, std::pair{INT32_MIN, "got -2147483648"}}) {
    std::vector<int32_t> ids(12, 4);
    const InputTensor inputs[] = {{ids.data(), Layout::NCHW}};
    const size_t outputs = interpret(p, inputs, 2)[0].size();
    ids[9] = id;
    CHECK_THROWS(interpret(p, inputs, 2), InvalidArgument, text);
    std::vector<float> out(outputs);
    float* const results[] = {out.data()};
    const Engine engine{Program(p)};
    CHECK_THROWS(engine.run(inputs, 2, results, 1), InvalidArgument, text);
    engine.run(inputs, 1, results, 2);
  }
}

TEST(masks_of_zeros_and_ones) {
  Program p = float_program();
  find(p, OpKind::Choose).ints[0] = 0;
  const Engine engine{Program(p)};
  std::vector<float> x(4 * 4 * 7, 0.5f);
  std::vector<int32_t> mask = {0, 1, 1, 0, 1, 0};
  const InputTensor inputs[] = {{x.data(), Layout::NCHW}, {mask.data(), Layout::NCHW}};
  const auto want = interpret(p, inputs, 1);
  std::vector<std::vector<float>> got;
  std::vector<float*> outputs;
  for (const auto& y : want)
    outputs.push_back(got.emplace_back(y.size()).data());
  engine.run(inputs, 1, outputs, 1);
  CHECK(got == want);
  mask[4] = 2;
  CHECK_THROWS(engine.run(inputs, 1, outputs, 1), InvalidArgument,
               "input 1 ('mask'): expected ids of 0 to 1, got 2 in sample 0, position 4");
}

TEST(accumulator_bound) {
  // 255 * 128 * K reaches 2^31 from K = 65794 on.
  for (const int64_t k : {65793, 65794}) {
    Builder b;
    const auto x = b.value("x", k, 1, 1, ValueKind::F32);
    const auto q = b.node(OpKind::Quantize, {x}, b.value("q", k, 1, 1));
    const auto y =
        b.node(OpKind::Conv, {q}, b.value("y", 1, 1, 1, ValueKind::F32),
               {1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, {1, -1, 1},
               {b.weights(1, static_cast<uint32_t>(k), 1, 1, 8), b.floats({1}), b.floats({0}), -1});
    b.p.inputs = {x};
    b.p.outputs = {y};
    if (k == 65793)
      validate(b.p);
    else
      CHECK_THROWS(validate(b.p), InvalidArgument, "overflow the int32 accumulator");
  }
}

TEST(no_parameter_may_be_absurd) {
  const Program good = every_operation();
  const auto each = [&](auto&& change) {
    for (size_t k = 0; k < good.nodes.size(); ++k) {
      Program p = good;
      change(p.nodes[k], [&](const std::string& what) {
        CHECK_MSG(refused(p), std::string(op_name(p.nodes[k].op)) + " " + what);
      });
    }
  };
  each([&](Node& n, auto&& check) {
    for (size_t i = 0; i < n.ints.size(); ++i) {
      const int64_t before = n.ints[i];
      for (const int64_t v : {INT64_MIN, INT64_MAX, int64_t{-1}, int64_t{1} << 32}) {
        n.ints[i] = v;
        check("int " + std::to_string(i));
      }
      n.ints[i] = before;
    }
    for (size_t i = 0; i < n.floats.size(); ++i) {
      const float before = n.floats[i];
      n.floats[i] = NAN;
      check("float " + std::to_string(i));
      n.floats[i] = before;
    }
    for (auto* list : {&n.inputs, &n.constants})
      for (int32_t& i : *list) {
        const int32_t before = i;
        for (const int32_t v : {INT32_MIN, INT32_MAX, -2, 1 << 20}) {
          i = v;
          check("number");
        }
        i = before;
      }
  });
}

TEST(every_shape_is_checked) {
  for (const Program& good : {every_operation(), token_program(), float_program()})
    for (size_t v = 0; v < good.values.size(); ++v)
      for (int axis = 0; axis < 3; ++axis)
        for (const int by : {-1, 1, 1000}) {
          Program p = good;
          Value& value = p.values[v];
          // Averages may round up, and adaptive ones may have any size.
          if (axis > 0 && by > 0 && (value.name == "mean" || value.name == "average")) continue;
          (axis == 0 ? value.c : axis == 1 ? value.h : value.w) += by;
          CHECK_MSG(refused(p), value.name + " axis " + std::to_string(axis));
        }
}

TEST(changed_programs_are_refused_or_run) {
  // Values near the borders of validity, where a check that is off by one would show.
  std::mt19937 random(7);
  const Program good = every_operation();
  int accepted = 0;
  for (int round = 0; round < 4000; ++round) {
    Program p = good;
    const int changes = 1 + static_cast<int>(random() % 2);
    for (int k = 0; k < changes; ++k) {
      Node& n = p.nodes[random() % p.nodes.size()];
      Value& v = p.values[random() % p.values.size()];
      switch (random() % 5) {
        case 0:
        case 1:
          if (!n.ints.empty()) n.ints[random() % n.ints.size()] = static_cast<int>(random() % 9);
          break;
        case 2:
          (random() % 2 != 0 ? v.h : v.w) = 1 + static_cast<int>(random() % 9);
          break;
        case 3:
          if (!n.inputs.empty()) n.inputs[0] = static_cast<int32_t>(random() % p.values.size());
          break;
        default:
          if (!n.constants.empty())
            n.constants[random() % n.constants.size()] =
                static_cast<int32_t>(random() % p.constants.size());
      }
    }
    if (refused(p)) continue;
    ++accepted;
    run(p, 1);
  }
  CHECK(accepted > 100);
}

// ---- the file -----------------------------------------------------------------------------------

TEST(round_trip) {
  for (const Program& p : {every_operation(), small_program(), token_program(), float_program()}) {
    const auto file = write_program(p);
    const Program back = read_program(file);
    CHECK(write_program(back) == file);
    CHECK_EQ(back.nodes.size(), p.nodes.size());
    for (size_t k = 0; k < p.nodes.size(); ++k) {
      const Node &a = p.nodes[k], &b = back.nodes[k];
      CHECK(a.op == b.op && a.name == b.name && a.inputs == b.inputs && a.output == b.output);
      CHECK(a.ints == b.ints && a.floats == b.floats && a.constants == b.constants);
    }
    for (size_t k = 0; k < p.values.size(); ++k) {
      const Value &a = p.values[k], &b = back.values[k];
      CHECK(a.name == b.name && a.kind == b.kind && a.c == b.c && a.h == b.h && a.w == b.w);
      CHECK(a.scale == b.scale && a.zero_point == b.zero_point && a.qmax == b.qmax);
    }
    for (size_t k = 0; k < p.constants.size(); ++k)
      CHECK(p.constants[k].kind == back.constants[k].kind &&
            p.constants[k].bytes == back.constants[k].bytes);
    CHECK(p.inputs == back.inputs && p.outputs == back.outputs && p.metadata == back.metadata);
    CHECK(run(p, 1) == run(back, 1));
  }
}

TEST(constants_lie_on_multiples_of_64) {
  const Program p = every_operation();
  const auto file = write_program(p);
  for (const Constant& c : p.constants) {
    bool found = false;
    for (uint64_t at = 0; at + c.bytes.size() <= file.size(); at += 64)
      found = found || std::equal(c.bytes.begin(), c.bytes.end(), file.begin() + at);
    CHECK(found);
  }
}

TEST(invalid_programs_are_not_written) {
  Program p = small_program();
  p.nodes[0].inputs[0] = 17;
  CHECK_THROWS(write_program(p), InvalidArgument, "does not exist");
}

TEST(every_truncation_is_refused) {
  const auto file = write_program(small_program());
  for (size_t n = 0; n < file.size(); ++n)
    CHECK(refused(std::vector<uint8_t>(file.begin(), file.begin() + n)));
  auto longer = file;
  longer.push_back(0);
  CHECK(refused(longer));
  // Also where the header tells the new size.
  for (size_t n = sizeof(AdaHeader); n < file.size(); ++n) {
    std::vector<uint8_t> shorter(file.begin(), file.begin() + n);
    poke(shorter, offsetof(AdaHeader, file_bytes), uint64_t{n});
    repair_checksums(shorter);
    CHECK(refused(shorter));
  }
}

TEST(every_flipped_bit_is_noticed) {
  const auto file = write_program(small_program());
  for (size_t i = 0; i < file.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      auto damaged = file;
      damaged[i] ^= static_cast<uint8_t>(1 << bit);
      CHECK_MSG(refused(damaged), "byte " + std::to_string(i));
    }
}

TEST(damage_names_its_section) {
  const auto file = write_program(every_operation());
  for (const char* id : {"VALS", "NODE", "PORT", "CNST", "DATA", "META"}) {
    auto damaged = file;
    damaged[section(file, id).offset] ^= 1;
    CHECK_THROWS(read_program(damaged), CorruptData, std::string("section ") + id);
  }
  CHECK_THROWS(read_program(std::vector<uint8_t>(10)), CorruptData, "at least 64 bytes, got 10");
  CHECK_THROWS(read_program(std::vector<uint8_t>(100)), CorruptData, "magic");
}

TEST(other_versions) {
  const Program p = every_operation();
  const auto file = write_program(p);
  auto major = file;
  poke(major, offsetof(AdaHeader, major), uint16_t{2});
  CHECK_THROWS(read_program(major), CorruptData,
               "format version 2.2 is not supported; this library reads 1.x");
  poke(major, offsetof(AdaHeader, major), uint16_t{0});
  CHECK_THROWS(read_program(major), CorruptData, "format version 0.2 is not supported");

  // A later minor version: reserved bytes in use, a new section behind the others, and new fields
  // at the end of the section META.
  const auto extended = [&](uint16_t minor) {
    constexpr size_t kOld = 6, kTable = sizeof(AdaHeader);
    std::vector<uint8_t> out(kTable + (kOld + 1) * sizeof(AdaSection));
    AdaHeader h;
    std::memcpy(&h, file.data(), sizeof h);
    h.minor = minor;
    h.sections = kOld + 1;
    h.reserved[3] = 5;
    for (size_t k = 0; k <= kOld; ++k) {
      AdaSection s;
      out.resize((out.size() + 63) / 64 * 64);
      const uint64_t offset = out.size();
      if (k < kOld) {
        std::memcpy(&s, file.data() + kTable + k * sizeof s, sizeof s);
        out.insert(out.end(), file.begin() + s.offset, file.begin() + s.offset + s.bytes);
        if (k == kOld - 1) out.insert(out.end(), {1, 2, 3});
      } else {
        std::memcpy(s.id, "NEWS", 4);
        out.insert(out.end(), {4, 5, 6});
      }
      s.reserved = 9;
      s.offset = offset;
      s.bytes = out.size() - offset;
      std::memcpy(out.data() + kTable + k * sizeof s, &s, sizeof s);
    }
    h.file_bytes = out.size();
    std::memcpy(out.data(), &h, sizeof h);
    repair_checksums(out);
    return out;
  };
  CHECK(write_program(read_program(extended(kAdaMinor + 1))) == file);
  CHECK_THROWS(read_program(extended(0)), CorruptData, "reserved");

  // An operation of the future.
  auto future = file;
  poke(future, offsetof(AdaHeader, minor), static_cast<uint16_t>(kAdaMinor + 1));
  poke(future, section(file, "NODE").offset + 8, uint32_t{kOpKinds});
  repair_checksums(future);
  CHECK_THROWS(read_program(future), CorruptData,
               "operation 31 is unknown to format 1.4; the file is of format 1.5");

  // A file has the least version that its operations need.
  CHECK_EQ(int{read_ada_header(file, file.size()).minor}, 2);
  const auto tokens = write_program(token_program());
  CHECK_EQ(int{read_ada_header(tokens, tokens.size()).minor}, 2);
  const auto floats = write_program(float_program());
  CHECK_EQ(int{read_ada_header(floats, floats.size()).minor}, 3);
  Builder b;
  const auto x = b.value("x", 2, 1, 1, ValueKind::F32);
  const auto y = b.value("y", 2, 1, 1, ValueKind::F32);
  b.node(OpKind::Function, {x}, y, {3}, {0, 0});
  b.p.inputs = {x};
  b.p.outputs = {y};
  const auto earlier = write_program(b.p);
  CHECK_EQ(int{read_ada_header(earlier, earlier.size()).minor}, 1);
  const auto small = write_program(small_program());
  CHECK_EQ(int{read_ada_header(small, small.size()).minor}, 0);
}

TEST(longer_records_of_a_later_version) {
  // META with one byte more in its only record.
  const Program p = small_program();
  const auto file = write_program(p);
  const AdaSection meta = section(file, "META");
  auto longer = file;
  longer.push_back(77);
  poke(longer, meta.offset + 4, static_cast<uint32_t>(meta.bytes - 8 + 1));
  AdaSection changed = meta;
  ++changed.bytes;
  poke(longer, sizeof(AdaHeader) + 5 * sizeof(AdaSection), changed);
  poke(longer, offsetof(AdaHeader, file_bytes), uint64_t{longer.size()});
  repair_checksums(longer);
  CHECK_THROWS(read_program(longer), CorruptData, "an entry has 1 bytes too many");
  poke(longer, offsetof(AdaHeader, minor), static_cast<uint16_t>(kAdaMinor + 1));
  repair_checksums(longer);
  CHECK(read_program(longer).metadata == p.metadata);
}

TEST(forged_headers) {
  const auto file = write_program(small_program());
  const auto forged = [&](uint64_t at, auto value) {
    auto f = file;
    poke(f, at, value);
    repair_checksums(f);
    return f;
  };
  constexpr size_t kTable = sizeof(AdaHeader);
  for (const uint64_t v : {uint64_t{0}, uint64_t{65}, UINT64_MAX, uint64_t{1} << 63}) {
    CHECK_THROWS(read_program(forged(offsetof(AdaHeader, file_bytes), v)), CorruptData, "header");
    CHECK_THROWS(read_program(forged(offsetof(AdaHeader, table_offset), v)), CorruptData, "header");
    CHECK_THROWS(read_program(forged(kTable + offsetof(AdaSection, offset), v)), CorruptData,
                 "section VALS");
    CHECK_THROWS(read_program(forged(kTable + offsetof(AdaSection, bytes), v)), CorruptData,
                 "section");
  }
  CHECK_THROWS(read_program(forged(offsetof(AdaHeader, sections), UINT32_MAX)), CorruptData,
               "at most 64 sections");
  CHECK_THROWS(read_program(forged(offsetof(AdaHeader, sections), uint32_t{64})), CorruptData,
               "section table");
  CHECK_THROWS(read_program(forged(offsetof(AdaHeader, sections), uint32_t{0})), CorruptData,
               "section table");
  CHECK_THROWS(read_program(forged(kTable, 'X')), CorruptData, "section VALS is missing");
  CHECK_THROWS(read_program(forged(kTable + sizeof(AdaSection), section(file, "VALS"))),
               CorruptData, "expected offset");
}

TEST(forged_numbers_are_refused_without_large_allocations) {
  const auto file = write_program(every_operation());
  const uint64_t first = section(file, "VALS").offset;
  std::mt19937 random(3);
  for (uint64_t at = first; at + 4 <= file.size(); ++at)
    for (const uint32_t v : {UINT32_MAX, 0x7FFFFFFFu, 0x10000u, 0u}) {
      auto forged = file;
      poke(forged, at, v);
      repair_checksums(forged);
      g_largest = 0;
      const bool accepted = !refused(forged);
      CHECK(g_largest <= 16 * file.size());
      if (!accepted) continue;
      const Program p = read_program(forged);
      // A constant or a name, where any number may stand. The payload of packed weights has a hash
      // of its own, which is checked when it is unpacked.
      if (is_small(p) && random() % 64 == 0) outcome([&] { run(p, 1); });
    }
  const AdaSection values = section(file, "VALS");
  for (const char* id : {"VALS", "NODE", "PORT", "CNST", "META"}) {
    auto forged = file;
    poke(forged, section(file, id).offset, UINT32_MAX);
    repair_checksums(forged);
    CHECK_THROWS(read_program(forged), CorruptData, "expected at most");
  }
  auto forged = file;
  poke(forged, values.offset, uint32_t{60000});
  repair_checksums(forged);
  CHECK_THROWS(read_program(forged), CorruptData, "bytes are left");
}

TEST(random_damage_behind_the_checksums) {
  // A small fuzzer: whatever is accepted is valid and runs.
  const auto file = write_program(every_operation());
  std::mt19937 random(11);
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    auto damaged = file;
    const int changes = 1 + static_cast<int>(random() % 3);
    for (int k = 0; k < changes; ++k) {
      uint8_t& byte = damaged[random() % damaged.size()];
      byte = random() % 2 != 0 ? static_cast<uint8_t>(random()) : static_cast<uint8_t>(byte + 1);
    }
    repair_checksums(damaged);
    Program p;
    if (outcome([&] { p = read_program(damaged); }) == Outcome::Refused) continue;
    ++accepted;
    if (is_small(p) && random() % 16 == 0) outcome([&] { run(p, 1); });
  }
  CHECK(accepted > 100);
}

// ---- on disk ------------------------------------------------------------------------------------

TEST(save_and_load) {
  const Folder folder;
  const Program p = every_operation();
  save_program(small_program(), folder / "m.ada");
  save_program(p, folder / "m.ada");
  CHECK(write_program(load_program(folder / "m.ada")) == write_program(p));
  CHECK_EQ(folder.names().size(), size_t{1});
}

TEST(load_refuses_what_is_no_file) {
  const Folder folder;
  CHECK_THROWS(load_program(folder / "absent.ada"), FileError, "No such file");
  CHECK_THROWS(load_program(folder / ""), FileError, "Is a directory");
  CHECK_THROWS(load_program("/dev/zero"), FileError, "expected a regular file");
  CHECK_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  CHECK_THROWS(load_program(folder / "pipe"), FileError, "expected a regular file");
  std::ofstream(folder / "text.ada") << std::string(5000, 'x');
  CHECK_THROWS(load_program(folder / "text.ada"), CorruptData, "text.ada': ada file, header");
  std::ofstream(folder / "empty.ada").flush();
  CHECK_THROWS(load_program(folder / "empty.ada"), CorruptData, "got 0");
  CHECK_THROWS(save_program(small_program(), folder / ""), FileError, "Is a directory");
  CHECK_THROWS(save_program(small_program(), "/dev/null"), FileError, "expected a regular file");
  CHECK_THROWS(save_program(small_program(), folder / "no" / "m.ada"), FileError, "No such file");
}

TEST(a_full_disk_leaves_the_old_file) {
  const Folder folder;
  const fs::path path = folder / "m.ada";
  save_program(small_program(), path);
  const auto before = write_program(small_program());
  rlimit old{};
  CHECK_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit tight{1024, old.rlim_max};
  CHECK_EQ(::setrlimit(RLIMIT_FSIZE, &tight), 0);
  std::string message;
  int code = 0;
  try {
    save_program(every_operation(), path);
  } catch (const FileError& e) {
    message = e.what();
    code = e.code();
  }
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  CHECK_EQ(code, EFBIG);
  CHECK_MSG(message.find("after 1024 of") != std::string::npos, message);
  CHECK_EQ(folder.names().size(), size_t{1});
  CHECK(write_program(load_program(path)) == before);
}

// ---- limits -------------------------------------------------------------------------------------

/// What a small file claims, as an engine: refused for its memory, with no large allocation made.
void check_refused(const char* what, const Program& p, int64_t limit) {
  const std::vector<uint8_t> file = write_program(p);
  CHECK_MSG(file.size() < 4096, what);
  EngineOptions options;
  options.memory_bytes = limit;
  options.weights = WeightForm::Streamed;
  g_largest = 0;
  bool threw = false;
  try {
    const Engine engine(read_program(file), options);
  } catch (const LimitExceeded&) {
    threw = true;
  }
  CHECK_MSG(threw, what);
  CHECK_MSG(g_largest <= static_cast<size_t>(limit),
            std::string(what) + ": allocated " + std::to_string(g_largest) + " bytes");
}

/// One convolution or transposed one over a 1 x h x w image, all weights zero: a bitmask alone.
Program one_convolution(OpKind op, int64_t h, int64_t w, int64_t out_h, int64_t out_w,
                        std::vector<int64_t> ints, uint32_t kernel_h, uint32_t kernel_w,
                        uint32_t outputs = 1) {
  Builder b;
  const auto x = b.value("x", 1, h, w, ValueKind::F32);
  const auto q = b.node(OpKind::Quantize, {x}, b.value("q", 1, h, w));
  const std::vector<int8_t> zeros(size_t{outputs} * kernel_h * kernel_w, 0);
  const auto weights = b.constant(
      ConstantKind::Weights, formats::pack_canonical(zeros, 8, outputs, 1, kernel_h, kernel_w));
  const std::vector<float> ones(outputs, 1.0f);
  const auto y = b.node(op, {q}, b.value("y", outputs, out_h, out_w, ValueKind::F32),
                        std::move(ints), {1, -1, 1}, {weights, b.floats(ones), b.floats(ones), -1});
  b.p.inputs = {x};
  b.p.outputs = {y};
  return b.p;
}

TEST(small_files_that_need_much_memory) {
  // A tensor of 4 MB.
  check_refused("tensor",
                one_convolution(OpKind::Conv, 1 << 10, 1 << 10, 1, 1,
                                {1, 1, 1 << 10, 1 << 10, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, 1, 1),
                1 << 20);
  // A kernel of 16384 zeros, 2 KB in the file: a table entry for each byte of each step.
  check_refused("kernel",
                one_convolution(OpKind::Conv, 128, 128, 1, 1,
                                {128, 128, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, 128, 128),
                2 << 20);
  // Padding around a pixel.
  check_refused("padding",
                one_convolution(OpKind::Conv, 1, 1, 1001, 1001,
                                {1, 1, 1, 1, 500, 500, 500, 500, 1, 1, 1, 0, 255, 0}, 1, 1),
                1 << 20);
  // A transposed convolution is one convolution per phase.
  check_refused("phases",
                one_convolution(OpKind::ConvTranspose, 1, 1, 64, 64,
                                {64, 64, 64, 64, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, 64, 64),
                1 << 20);
}

TEST(phases_of_a_transposed_convolution_are_limited) {
  const auto with_stride = [](int64_t stride) {
    return one_convolution(OpKind::ConvTranspose, 1, 1, stride, stride,
                           {1, 1, stride, stride, 0, 0, 0, 0, 1, 1, 1, 0, 255, 0}, 1, 1);
  };
  CHECK(!refused(with_stride(64)));
  CHECK(refused(with_stride(65)));
}

TEST(an_ordinary_program_fits_a_small_limit) {
  const Program p = every_operation();
  EngineOptions options;
  options.memory_bytes = 1 << 20;
  const Engine engine(Program(p), options);
  CHECK(engine.weight_bytes() > 0);
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

// What validate() refuses, and what it says.
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "engine/container.hpp"
#include "engine/engine.hpp"
#include "engine/interpret.hpp"
#include "engine_programs.hpp"
#include "program_checks.hpp"

using namespace adalayer;
using namespace adalayer::engine;
using namespace programs;

TEST(every_operation_is_valid_and_runs) {
  const Program p = every_operation();
  validate(p);
  std::set<OpKind> kinds;
  const Program tokens = token_program(), floats = float_program(), steps = recurrent_program(),
                reduced = reduced_program(), groups = grouped_program();
  for (const Program* all : {&p, &tokens, &floats, &steps, &reduced, &groups})
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

TEST(refusals_of_a_graph_say_what_is_wrong) {
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
  check_refused("not valid UTF-8", [](Program& p) { p.nodes[0].name = "\xC0\x80"; });
  check_refused("not valid UTF-8", [](Program& p) { p.values[0].name = "a\xED\xA0\x80"; });
  check_refused("not valid UTF-8", [](Program& p) { p.metadata["k"] = "\xE2\x82"; });
  check_refused("bytes of text", [](Program& p) { p.nodes[0].name.assign(kMaxName + 1, 'x'); });
}

TEST(refusals_of_convolutions_say_what_is_wrong) {
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
}

TEST(refusals_of_what_moves_values_say_what_is_wrong) {
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
  check_refused("pair must be 0 to 3", [](Program& p) { find(p, OpKind::Combine).ints[0] = 4; });
  check_refused("of the output's size along each axis, 8 x 2 x 2, or of 1, got 8 x 2 x 2 and 4 x",
                [](Program& p) { find(p, OpKind::Combine).inputs[1] = p.inputs[1]; });
}

TEST(refusals_of_constants_and_norms_say_what_is_wrong) {
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
}

TEST(refusals_of_attention_say_what_is_wrong) {
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
}

TEST(refusals_of_resizing_and_steps_say_what_is_wrong) {
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
  for (const Program& whole : {every_operation(), token_program(), float_program(),
                               recurrent_program(), reduced_program(), grouped_program()}) {
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

TEST(refusals_of_reductions_and_joined_floats_say_what_is_wrong) {
  const auto refused_with = [](const char* text, const std::function<void(Program&)>& change) {
    Program p = reduced_program();
    change(p);
    CHECK_THROWS(validate(p), InvalidArgument, text);
  };
  validate(reduced_program());
  refused_with("kind must be 0 to 1, got 2",
               [](Program& p) { find(p, OpKind::Reduce).ints[0] = 2; });
  refused_with("expected an axis that it goes along",
               [](Program& p) { find(p, OpKind::Reduce).ints = {0, 0, 0, 0}; });
  refused_with("expected output of 6 x 3 x 1, got 6 x 1 x 1",
               [](Program& p) { find(p, OpKind::Reduce).ints[2] = 0; });
  refused_with("expected f32 output, got u8",
               [](Program& p) { output_of(p, OpKind::Reduce).kind = ValueKind::U8; });
  refused_with("floats have no table", [](Program& p) {
    p.constants.push_back({ConstantKind::U8, SharedBytes(std::vector<uint8_t>(256))});
    find(p, OpKind::Concat).constants[0] = static_cast<int32_t>(p.constants.size() - 1);
  });
  refused_with("expected output of 7 x 3 x 5, got 8 x 3 x 5",
               [](Program& p) { output_of(p, OpKind::Concat).c = 8; });
  refused_with("expected f32 input 1, got u8",
               [](Program& p) { find(p, OpKind::Concat).inputs[1] = p.nodes[0].output; });
}

TEST(refusals_of_weight_groups_say_what_is_wrong) {
  const auto refused_with = [](const char* text,
                               const std::function<void(Program&, Node&)>& change) {
    Program p = grouped_program();
    change(p, find(p, OpKind::Linear));
    CHECK_THROWS(validate(p), InvalidArgument, text);
  };
  validate(grouped_program());
  refused_with("group_size must be 32, 64 or 128, got 48",
               [](Program&, Node& n) { n.ints[0] = 48; });
  refused_with("group_size must be 32 to 128, got 0", [](Program&, Node& n) { n.ints[0] = 0; });
  refused_with("scale: expected 18 floats", [](Program&, Node& n) { n.ints[0] = 64; });
  refused_with("expected weights of 18 x 39",
               [](Program& p, Node& n) { p.values[n.inputs[0]].c = p.values[p.inputs[0]].c = 39; });
  refused_with("expected u8 input 0, got f32",
               [](Program& p, Node& n) { n.inputs[0] = p.inputs[0]; });
  Program p = grouped_program();
  p.nodes.back().floats[1] = 4.0f;
  CHECK_THROWS(validate(p), InvalidArgument, "clamp_lo must not exceed clamp_hi");
}

TEST(refusals_of_recurrent_layers_say_what_is_wrong) {
  const auto layer = [](Program& p, const char* name) -> Node& {
    return *std::find_if(p.nodes.begin(), p.nodes.end(), [&](const Node& n) {
      return n.op == OpKind::Recurrence && p.values[n.output].name == name;
    });
  };
  const auto refused_with = [&](const char* text, const char* name,
                                const std::function<void(Program&, Node&)>& change) {
    Program p = recurrent_program();
    change(p, layer(p, name));
    CHECK_THROWS(validate(p), InvalidArgument, text);
  };
  validate(recurrent_program());
  refused_with("kind must be 0 to 3, got 4", "lstm", [](Program&, Node& n) { n.ints[0] = 4; });
  refused_with("reverse must be 0 to 1", "lstm", [](Program&, Node& n) { n.ints[1] = 2; });
  refused_with("cells come out of an LSTM, as floats", "lstm",
               [](Program&, Node& n) { n.ints[2] = 1; });
  refused_with("cells come out of an LSTM, as floats", "last",
               [](Program&, Node& n) { n.ints[2] = 1; });
  refused_with("expected an even number of channels", "cells",
               [](Program& p, Node& n) { p.values[n.output].c = 9; });
  refused_with("expected products of 15 x 1 x 6, got 20 x 1 x 6", "lstm",
               [](Program&, Node& n) { n.ints[0] = 1; });
  refused_with("expected a state and a cell to begin with, or none, got 1", "back",
               [](Program&, Node& n) { n.inputs.pop_back(); });
  refused_with("expected one state to begin with, or none, got 2", "gru",
               [](Program&, Node& n) { n.inputs.push_back(n.inputs[1]); });
  refused_with("expected a state of 5 x 1 x 1, got 20 x 1 x 6", "back",
               [](Program&, Node& n) { n.inputs[1] = n.inputs[0]; });
  refused_with("expected a cell of 5 x 1 x 1", "back",
               [](Program&, Node& n) { n.inputs[2] = n.inputs[0]; });
  refused_with("expected products of 20 x 1 x 7", "lstm",
               [](Program& p, Node& n) { p.values[n.output].w = 7; });
  refused_with("expected weights of 20 x 5 x 1 x 1, got 15 x 5 x 1 x 1", "lstm",
               [&](Program& p, Node& n) { n.constants[0] = layer(p, "gru").constants[0]; });
  refused_with("scale: expected 20 floats, got 15", "lstm",
               [&](Program& p, Node& n) { n.constants[1] = layer(p, "gru").constants[1]; });
  refused_with("bias: every entry must be finite", "lstm", [](Program& p, Node& n) {
    poke(p.constants[n.constants[2]].bytes, 4, std::numeric_limits<float>::infinity());
  });
  refused_with("without a table the inverse scale must be the output's", "back",
               [](Program&, Node& n) { n.floats[0] = 2.0f; });
  refused_with("a float output has no table", "relu",
               [&](Program& p, Node& n) { n.constants[3] = layer(p, "lstm").constants[3]; });
  refused_with("expected f32 input 0, got u8", "gru",
               [&](Program& p, Node& n) { n.inputs[0] = layer(p, "lstm").output; });
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
  for (const Program& good :
       {every_operation(), token_program(), float_program(), reduced_program()})
    for (size_t v = 0; v < good.values.size(); ++v)
      for (int axis = 0; axis < 3; ++axis)
        for (const int by : {-1, 1, 1000}) {
          Program p = good;
          Value& value = p.values[v];
          // Averages may round up, and adaptive ones may have any size.
          if (axis > 0 && by > 0 && (value.name == "mean" || value.name == "average")) continue;
          // One row is repeated along the other operand's.
          if (axis == 1 && by < 0 && value.name == "most") continue;
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

int main(int argc, char** argv) { return check::run_all(argc, argv); }

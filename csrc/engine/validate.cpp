// validate(): what execution relies on, checked once. All sizes are bounded before they are
// multiplied, so no sum or product below leaves int64.
#include <cmath>
#include <string>

#include "core/status.hpp"
#include "engine/levels.hpp"
#include "engine/node_check.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

namespace {

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
  check_levels(p);
}

}  // namespace adalayer::engine

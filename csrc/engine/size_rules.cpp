#include "engine/size_rules.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string_view>

#include "core/json.hpp"
#include "core/status.hpp"

namespace adalayer::engine {
namespace {

constexpr const char* kSizes = "adalayer.sizes";
constexpr size_t kMaxAxes = 64;
constexpr size_t kMaxParts = 32;
constexpr int64_t kMaxFactor = kMaxElements;

template <typename... Pieces>
[[noreturn]] void bad(const Pieces&... pieces) {
  fail<CorruptData>(kSizes, ": ", pieces...);
}

const Json& member(const Json& json, const char* name) {
  const Json* found = json.find(name);
  if (found == nullptr) bad("expected \"", name, '"');
  return *found;
}

const std::vector<Json>& list_of(const Json& json, size_t least, size_t most) {
  const std::vector<Json>& items = json.as_list(kSizes);
  if (items.size() < least || items.size() > most)
    bad("expected ", least, " to ", most, " entries, got ", items.size());
  return items;
}

int64_t number(const Json& json, int64_t least, int64_t most) {
  const int64_t found = json.as_index(kSizes, most);
  if (found < least) bad("expected ", least, " to ", most, ", got ", found);
  return found;
}

/// A number of an axis, or null.
int axis_number(const Json& json, size_t axes) {
  if (json.kind == Json::Kind::Null) return -1;
  if (axes == 0) bad("there are no axes");
  return static_cast<int>(number(json, 0, static_cast<int64_t>(axes) - 1));
}

Monomial monomial(const Json& json) {
  if (json.kind == Json::Kind::Number) return {.factor = number(json, 0, kMaxFactor)};
  const std::vector<Json>& all = list_of(json, 4, 4);
  return {number(all[0], 1, kMaxFactor), number(all[1], 1, kMaxFactor),
          static_cast<int>(number(all[2], 0, 1)), static_cast<int>(number(all[3], 0, 1))};
}

std::vector<AxisPart> parts_of(const Json& json) {
  std::vector<AxisPart> parts;
  for (const Json& pair : list_of(json, 0, kMaxParts)) {
    const std::vector<Json>& both = list_of(pair, 2, 2);
    parts.push_back({monomial(both[0]), monomial(both[1])});
  }
  return parts;
}

template <class T, size_t N>
T one_of(const Json& json, const std::array<std::string_view, N>& names) {
  const std::string& text = json.as_text(kSizes);
  const auto found = std::find(names.begin(), names.end(), text);
  if (found == names.end()) bad("\"", text, "\" is unknown to this version");
  return static_cast<T>(found - names.begin());
}

constexpr std::array<std::string_view, 3> kWindows = {"down", "up", "whole"};
constexpr std::array<std::string_view, 4> kModes = {"nearest", "nearest-exact", "linear",
                                                    "linear-aligned"};
constexpr std::array<std::string_view, 4> kBorders = {"none", "reflect", "edge", "wrap"};
constexpr std::array<std::string_view, 4> kResizes = {"fixed", "factor", "ratio", "like"};

ResizeAxis resize_axis(const Json& json, const Program& p) {
  const std::vector<Json>& all = list_of(json, 1, 3);
  ResizeAxis axis;
  axis.kind = one_of<ResizeAxis::Kind>(all[0], kResizes);
  const auto expect = [&](size_t count) {
    if (all.size() != count) bad("expected ", count, " entries, got ", all.size());
  };
  switch (axis.kind) {
    case ResizeAxis::Kind::Fixed:
      expect(1);
      break;
    case ResizeAxis::Kind::Factor:
      expect(2);
      axis.factor = all[1].number;
      if (all[1].kind != Json::Kind::Number || !(axis.factor > 0.0) || axis.factor > kMaxAxis)
        bad("expected a factor from 0 to ", kMaxAxis);
      break;
    case ResizeAxis::Kind::Ratio:
      expect(3);
      axis.numerator = number(all[1], 1, kMaxAxis);
      axis.denominator = number(all[2], 1, kMaxAxis);
      break;
    case ResizeAxis::Kind::Like:
      expect(2);
      axis.like =
          static_cast<int32_t>(number(all[1], 0, static_cast<int64_t>(p.values.size()) - 1));
      break;
  }
  return axis;
}

RearrangeAxis rearrange_axis(const Json& json) {
  RearrangeAxis axis;
  axis.parts = parts_of(member(json, "parts"));
  if (const Json* border = json.find("border")) {
    const std::vector<Json>& all = list_of(*border, 3, 3);
    axis.border = one_of<BorderMode>(all[0], kBorders);
    axis.before = number(all[1], 0, kMaxAxis);
    axis.after = number(all[2], 0, kMaxAxis);
  }
  return axis;
}

NodeRule node_rule(const Json& json, const Program& p, OpKind op) {
  NodeRule rule;
  if (json.kind != Json::Kind::Object) bad("expected an object for a node");
  const auto of = [&](std::initializer_list<OpKind> ops, const std::string& name) {
    if (std::find(ops.begin(), ops.end(), op) == ops.end())
      bad("a node of kind ", op_name(op), " has no \"", name, '"');
  };
  for (size_t k = 0; k < json.names.size(); ++k) {
    const std::string& name = json.names[k];
    const Json& value = json.items[k];
    if (name == "window") {
      of({OpKind::MaxPool, OpKind::AvgPool}, name);
      for (size_t a = 0; a < 2; ++a)
        rule.window[a] = one_of<WindowSize>(list_of(value, 2, 2)[a], kWindows);
    } else if (name == "keeps") {
      of({OpKind::AdaptiveAvgPool}, name);
      for (size_t a = 0; a < 2; ++a)
        rule.keeps[a] = number(list_of(value, 2, 2)[a], 0, 1) != 0;
    } else if (name == "from_back") {
      of({OpKind::Slice}, name);
      rule.from_back = number(value, 1, kMaxAxis);
    } else if (name == "leaves") {
      of({OpKind::Slice}, name);
      rule.leaves = number(value, 0, kMaxAxis);
    } else if (name == "mode") {
      of({OpKind::Resize}, name);
      rule.mode = one_of<ResizeMode>(value, kModes);
    } else if (name == "resize") {
      of({OpKind::Resize}, name);
      for (size_t a = 0; a < 2; ++a)
        rule.resize[a] = resize_axis(list_of(value, 2, 2)[a], p);
    } else if (name == "rearrange") {
      of({OpKind::Rearrange}, name);
      for (size_t a = 0; a < 3; ++a)
        rule.rearrange[a] = rearrange_axis(list_of(value, 3, 3)[a]);
    } else {
      // What it means is unknown, and so is what the node computes at another size.
      bad("\"", name, "\" is unknown to this version");
    }
  }
  return rule;
}

}  // namespace

int64_t Monomial::at(int64_t h, int64_t w) const {
  // At most 2^31 * 2^20 * 2^20 each.
  __int128 product = factor;
  if (h_power != 0) product *= h;
  if (w_power != 0) product *= w;
  if (product % divisor != 0)
    fail<InvalidArgument>("a size of ", h, " x ", w, " cannot be divided by ", divisor);
  product /= divisor;
  if (product > kMaxElements)
    fail<InvalidArgument>("expected at most ", kMaxElements, " elements for a size of ", h, " x ",
                          w);
  return static_cast<int64_t>(product);
}

std::vector<int64_t> SizeRules::compiled(const Program& p) const {
  std::vector<int64_t> sizes(axes.size(), 0);
  for (size_t k = 0; k < inputs.size(); ++k) {
    const Value& v = p.values[p.inputs[k]];
    if (inputs[k].h >= 0) sizes[static_cast<size_t>(inputs[k].h)] = v.h;
    if (inputs[k].w >= 0) sizes[static_cast<size_t>(inputs[k].w)] = v.w;
  }
  return sizes;
}

void SizeRules::check(std::span<const int64_t> sizes) const {
  if (sizes.size() != axes.size())
    fail<InvalidArgument>("expected ", axes.size(), " sizes, got ", sizes.size());
  for (size_t k = 0; k < axes.size(); ++k) {
    const SizeAxis& a = axes[k];
    if (sizes[k] >= a.least && sizes[k] <= a.most && sizes[k] % a.multiple_of == 0) continue;
    if (a.multiple_of == 1)
      fail<InvalidArgument>(a.name, ": expected ", a.least, " to ", a.most, ", got ", sizes[k]);
    fail<InvalidArgument>(a.name, ": expected a multiple of ", a.multiple_of, " from ", a.least,
                          " to ", a.most, ", got ", sizes[k]);
  }
}

SizeRules read_sizes(const Program& p) {
  SizeRules rules;
  const auto text = p.metadata.find(kSizes);
  if (text == p.metadata.end()) return rules;
  const Json json = parse_json(text->second);
  for (const Json& entry : list_of(member(json, "axes"), 1, kMaxAxes)) {
    const std::vector<Json>& all = list_of(entry, 4, 4);
    SizeAxis axis{all[0].as_text(kSizes), number(all[1], 1, kMaxAxis), number(all[2], 1, kMaxAxis),
                  number(all[3], 1, kMaxAxis)};
    if (axis.name.empty() || axis.name.size() > static_cast<size_t>(kMaxName))
      bad("an axis needs a name of at most ", kMaxName, " bytes");
    if (axis.least > axis.most) bad(axis.name, ": ", axis.least, " is more than ", axis.most);
    rules.axes.push_back(std::move(axis));
  }
  const size_t axes = rules.axes.size();
  std::vector<int64_t> sizes(axes, 0);
  const auto bind = [&](int axis, int64_t size) {
    if (axis < 0) return;
    const auto k = static_cast<size_t>(axis);
    if (sizes[k] != 0 && sizes[k] != size)
      bad(rules.axes[k].name, " is both ", sizes[k], " and ", size);
    sizes[k] = size;
  };
  for (const Json& entry : list_of(member(json, "inputs"), p.inputs.size(), p.inputs.size())) {
    const std::vector<Json>& both = list_of(entry, 2, 2);
    const PortAxes port{axis_number(both[0], axes), axis_number(both[1], axes)};
    const Value& v = p.values[p.inputs[rules.inputs.size()]];
    bind(port.h, v.h);
    bind(port.w, v.w);
    rules.inputs.push_back(port);
  }
  for (size_t k = 0; k < axes; ++k)
    if (sizes[k] == 0) bad(rules.axes[k].name, " is the size of no input");
  try {
    rules.check(sizes);
  } catch (const InvalidArgument& e) {
    bad("the program's own size: ", e.what());
  }
  for (const Json& port : list_of(member(json, "ports"), 0, kMaxPorts)) {
    std::vector<int>& own = rules.ports.emplace_back();
    for (const Json& axis : list_of(port, 0, kMaxParts))
      own.push_back(axis_number(axis, axes));
  }
  const Json& nodes = member(json, "nodes");
  if (nodes.kind != Json::Kind::Object) bad("expected an object of nodes");
  for (size_t k = 0; k < nodes.names.size(); ++k) {
    const std::string& name = nodes.names[k];
    size_t node = 0;
    const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), node);
    if (error != std::errc() || end != name.data() + name.size() || node >= p.nodes.size())
      bad("there is no node \"", name, '"');
    rules.nodes[node] = node_rule(nodes.items[k], p, p.nodes[node].op);
  }
  for (const Json& entry : list_of(member(json, "outputs"), 0, kMaxPorts)) {
    OutputRule& rule = rules.outputs.emplace_back();
    for (const Json& size : list_of(member(entry, "shape"), 0, kMaxParts))
      rule.shape.push_back(monomial(size));
    const Json& atoms = member(entry, "atoms");
    if (atoms.kind != Json::Kind::Null) rule.atoms = parts_of(atoms);
  }
  return rules;
}

}  // namespace adalayer::engine

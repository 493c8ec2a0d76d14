#include "engine/levels.hpp"

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>

#include "core/status.hpp"

namespace adalayer::engine {
namespace {

/// What grids decide about, and levels may therefore have of their own.
bool of_grids(std::string_view parameter) {
  return parameter == "lo" || parameter == "hi" || parameter == "zero_point" ||
         parameter == "level";
}

/// Throws unless a node of a level does what the program's does.
template <class Bad>
void same_operation(const Node& own, const Node& other, const Bad& bad) {
  if (own.op != other.op) bad("expected ", op_name(own.op), ", got another operation");
  if (own.name != other.name) bad("expected the name \"", own.name, "\"");
  if (own.inputs != other.inputs || own.output != other.output)
    bad("it is of other values than the program's");
  if (own.constants.size() != other.constants.size() || own.ints.size() != other.ints.size())
    bad("it has other parameters than the program's");
  const auto& ints = operation(own.op).ints;
  for (size_t k = 0; k < std::min(own.ints.size(), ints.size()); ++k)
    if (own.ints[k] != other.ints[k] && !of_grids(ints[k].name))
      bad(ints[k].name, ": expected ", own.ints[k], " as in the program, got ", other.ints[k]);
}

template <class Bad>
void same_size(const Value& own, const Value& other, const Bad& bad) {
  if (own.kind != other.kind) bad("expected kind ", kind_name(own.kind));
  if (own.c != other.c || own.h != other.h || own.w != other.w)
    bad("expected ", own.c, " x ", own.h, " x ", own.w, " as in the program, got ", other.c, " x ",
        other.h, " x ", other.w);
}

bool same(const Value& a, const Value& b) {
  return a.name == b.name && a.scale == b.scale && a.zero_point == b.zero_point && a.qmax == b.qmax;
}

bool same(const Node& a, const Node& b) {
  return a.ints == b.ints && a.floats == b.floats && a.constants == b.constants;
}

/// The planes of stored weights that give others; none do where it is empty.
std::optional<formats::Planes> planes_of(const Constant& stored, const Constant& wanted) {
  const std::vector<int8_t> all = unpacked_weights(stored), narrow = unpacked_weights(wanted);
  const int width = weight_bits(stored), bits = weight_bits(wanted);
  if (all.size() != narrow.size()) return std::nullopt;
  for (int drop = width - bits; drop >= 0; --drop)
    if (std::equal(all.begin(), all.end(), narrow.begin(),
                   [&](int8_t w, int8_t q) { return upper_planes(w, bits, drop) == q; }))
      return formats::Planes{bits, drop};
  return std::nullopt;
}

/// Constants of a level that is being added.
class Gathered {
 public:
  Gathered(Program& program, Level& level) : program_(program), level_(level) {}

  /// The number of a constant that is the same; it is appended where there is none.
  int32_t number(const Constant& wanted) {
    auto& all = program_.constants;
    const auto found = std::find_if(all.begin(), all.end(), [&](const Constant& c) {
      return c.kind == wanted.kind && c.bytes == wanted.bytes;
    });
    if (found != all.end()) return static_cast<int32_t>(found - all.begin());
    all.push_back(wanted);
    return static_cast<int32_t>(all.size()) - 1;
  }

  /// Of weights, as a view of those that the program's node has. Views have no numbers before all
  /// constants have: they are counted from -2 downwards.
  int32_t view(const Node& node, int32_t stored, const Constant& wanted) {
    const Constant& own = program_.constants[stored];
    if (own.bytes == wanted.bytes) return stored;
    const auto planes = planes_of(own, wanted);
    if (!planes)
      fail<InvalidArgument>("level ", program_.levels.size() + 1, ", node \"", node.name,
                            "\": its weights of ", weight_bits(wanted),
                            " bits are no planes of the program's of ", weight_bits(own));
    level_.views.push_back({stored, *planes});
    return -1 - static_cast<int32_t>(level_.views.size());
  }

 private:
  Program& program_;
  Level& level_;
};

}  // namespace

Program at_level(const Program& program, size_t level) {
  if (level > program.levels.size())
    fail<InvalidArgument>("quality level ", level, " does not exist: there are ",
                          program.levels.size() + 1, ", from 0, the best, on");
  Program p = program;
  p.levels.clear();
  if (level == 0) return p;
  const Level& lower = program.levels[level - 1];
  for (const Level::View& view : lower.views) {
    Constant c = program.constants[view.constant];
    c.planes = view.planes;
    p.constants.push_back(std::move(c));
  }
  for (const auto& [number, value] : lower.values)
    p.values[number] = value;
  for (const auto& [number, node] : lower.nodes)
    p.nodes[number] = node;
  return p;
}

Program own_weights(Program program) {
  for (Constant& c : program.constants) {
    if (c.planes.all()) continue;
    const formats::CanonicalHeader h = formats::read_header(std::as_const(c).bytes);
    c.bytes = formats::pack_canonical(unpacked_weights(c), c.planes.bits, h.out_channels,
                                      h.group_in, h.kernel_h, h.kernel_w);
    c.planes = {};
  }
  return program;
}

void add_level(Program& program, const Program& lower) {
  const size_t number = program.levels.size() + 1;
  const auto bad = [&](const auto&... pieces) {
    fail<InvalidArgument>("level ", number, ": ", pieces...);
  };
  if (number >= kMaxLevels) bad("expected at most ", kMaxLevels, " levels");
  if (!lower.levels.empty()) bad("the program has levels itself");
  if (program.inputs != lower.inputs || program.outputs != lower.outputs ||
      program.values.size() != lower.values.size() || program.nodes.size() != lower.nodes.size())
    bad("it is another network: expected ", program.nodes.size(), " operations on ",
        program.values.size(), " values, got ", lower.nodes.size(), " on ", lower.values.size());
  for (const auto* each : {&std::as_const(program), &lower})
    validate(*each);
  Program made = program;
  Level level;
  Gathered gathered(made, level);
  for (size_t v = 0; v < lower.values.size(); ++v) {
    same_size(program.values[v], lower.values[v], [&](const auto&... pieces) {
      bad("value \"", program.values[v].name, "\": ", pieces...);
    });
    if (!same(program.values[v], lower.values[v]))
      level.values.emplace_back(static_cast<int32_t>(v), lower.values[v]);
  }
  for (size_t k = 0; k < lower.nodes.size(); ++k) {
    const Node& own = program.nodes[k];
    Node node = lower.nodes[k];
    same_operation(own, node,
                   [&](const auto&... pieces) { bad("node \"", own.name, "\": ", pieces...); });
    for (size_t c = 0; c < node.constants.size(); ++c) {
      if (node.constants[c] < 0) continue;
      const Constant& wanted = lower.constants[node.constants[c]];
      if (wanted.kind != ConstantKind::Weights) {
        node.constants[c] = gathered.number(wanted);
        continue;
      }
      const int32_t stored = own.constants[c];
      if (stored < 0 || program.constants[stored].kind != ConstantKind::Weights)
        bad("node \"", own.name, "\": the program has no packed weights for it");
      node.constants[c] = gathered.view(own, stored, wanted);
    }
    if (!same(own, node)) level.nodes.emplace_back(static_cast<int32_t>(k), std::move(node));
  }
  const auto first = static_cast<int32_t>(made.constants.size());
  for (auto& [place, node] : level.nodes)
    for (int32_t& c : node.constants)
      if (c < -1) c = first + (-2 - c);
  // Levels that are there already count their views from where the constants ended.
  const auto more = first - static_cast<int32_t>(program.constants.size());
  for (Level& other : made.levels)
    for (auto& [place, node] : other.nodes)
      for (int32_t& c : node.constants)
        if (c >= static_cast<int32_t>(program.constants.size())) c += more;
  made.levels.push_back(std::move(level));
  validate(made);
  program = std::move(made);
}

void check_levels(const Program& program) {
  if (program.levels.size() >= kMaxLevels)
    fail<InvalidArgument>("levels: expected at most ", kMaxLevels, ", got ",
                          program.levels.size() + 1);
  for (size_t number = 1; number <= program.levels.size(); ++number) {
    const Level& level = program.levels[number - 1];
    const auto bad = [&](const auto&... pieces) {
      fail<InvalidArgument>("level ", number, ": ", pieces...);
    };
    if (level.views.size() > static_cast<size_t>(kMaxConstants) - program.constants.size())
      bad("expected at most ", kMaxConstants, " constants");
    for (const Level::View& view : level.views) {
      if (view.constant < 0 || static_cast<size_t>(view.constant) >= program.constants.size() ||
          program.constants[view.constant].kind != ConstantKind::Weights)
        bad("constant ", view.constant, " holds no weights to read planes of");
      if (view.planes.all()) bad("a view of weights reads none of their planes");
      try {
        formats::check_planes(view.planes,
                              formats::read_header(program.constants[view.constant].bytes).bits);
      } catch (const Error& e) {
        bad("weights of constant ", view.constant, ": ", e.what());
      }
    }
    // Ascending numbers: nothing is said twice.
    int64_t last = -1;
    for (const auto& [v, value] : level.values) {
      if (v <= last || static_cast<size_t>(v) >= program.values.size())
        bad("values must be in ascending order and exist, got ", v, " after ", last);
      last = v;
      same_size(program.values[v], value, [&](const auto&... pieces) {
        bad("value \"", program.values[v].name, "\": ", pieces...);
      });
    }
    last = -1;
    for (const auto& [k, node] : level.nodes) {
      if (k <= last || static_cast<size_t>(k) >= program.nodes.size())
        bad("nodes must be in ascending order and exist, got ", k, " after ", last);
      last = k;
      same_operation(program.nodes[k], node, [&](const auto&... pieces) {
        bad("node \"", program.nodes[k].name, "\": ", pieces...);
      });
    }
    try {
      validate(at_level(program, number));
    } catch (const InvalidArgument& e) {
      bad(e.what());
    }
  }
}

}  // namespace adalayer::engine

// Which image sizes a program may be run at, and what its nodes do at another size than the one
// that it was compiled for: the text "adalayer.sizes" of a program (docs/ada-format.md, "Sizes").
//
// A program's parameters are those of one size. Most follow for another one from what the operation
// is; what does not (whether a pooling rounds its size down or up, a table's pattern, whether a
// slice ends where the image does) is said here, by number of the node.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/program.hpp"

namespace adalayer::engine {

/// factor * h^h_power * w^w_power / divisor of some image's h and w.
struct Monomial {
  int64_t factor = 1, divisor = 1;
  int h_power = 0, w_power = 0;

  /// Throws InvalidArgument where that is no whole number, or beyond kMaxElements.
  int64_t at(int64_t h, int64_t w) const;
};

/// Part of an axis of a view: so many elements, so far apart in memory. The parts of an axis go
/// from the outermost to the innermost one.
struct AxisPart {
  Monomial count, step;
};

enum class WindowSize : uint8_t { Down, Up, Whole };  // rounded; or one window over the image
enum class ResizeMode : uint8_t { Nearest, NearestExact, Linear, LinearAligned };
enum class BorderMode : uint8_t { None, Reflect, Edge, Wrap };

/// How large an axis is resized to, and by which step.
struct ResizeAxis {
  enum class Kind : uint8_t { Fixed, Factor, Ratio, Like };
  Kind kind = Kind::Fixed;  // Fixed: as it was; Ratio: numerator / denominator, exactly
  double factor = 1.0;      // the size is rounded down, the step is 1 / factor
  int64_t numerator = 1, denominator = 1;
  int32_t like = -1;  // as large as that value
};

/// An axis of a Rearrange: positions of the parts, with a border of other positions around them.
struct RearrangeAxis {
  std::vector<AxisPart> parts;
  BorderMode border = BorderMode::None;
  int64_t before = 0, after = 0;
};

/// Rows and columns in this order, where there are two entries.
struct NodeRule {
  std::array<WindowSize, 2> window{};        // MaxPool, AvgPool
  std::array<bool, 2> keeps{};               // AdaptiveAvgPool: as large as its input
  std::optional<int64_t> from_back;          // Slice: begins so far from the end
  std::optional<int64_t> leaves;             // Slice: all up to so many at the end
  std::optional<ResizeMode> mode;            // Resize
  std::array<ResizeAxis, 2> resize{};        // Resize
  std::array<RearrangeAxis, 3> rearrange{};  // channels, rows, columns
};

struct SizeAxis {
  std::string name;
  int64_t least = 1, most = 1, multiple_of = 1;
};

/// Which of the axes an input's h and w are; -1: none, a fixed size.
struct PortAxes {
  int h = -1, w = -1;
};

/// How a tensor of the result shows a program's output of h x w.
struct OutputRule {
  std::vector<Monomial> shape;
  std::optional<std::vector<AxisPart>> atoms;
};

struct SizeRules {
  std::vector<SizeAxis> axes;           // none: only the compiled size
  std::vector<PortAxes> inputs;         // [program inputs]
  std::vector<std::vector<int>> ports;  // [inputs of the call][axes of its shape] axis, or -1
  std::map<size_t, NodeRule> nodes;
  std::vector<OutputRule> outputs;  // [entries of "adalayer.outputs"]

  bool any() const { return !axes.empty(); }
  /// Sizes of the axes at which the program was compiled.
  std::vector<int64_t> compiled(const Program& program) const;
  /// Throws InvalidArgument that names the axis and what it may be.
  void check(std::span<const int64_t> sizes) const;
};

/// Of a valid program; without such a text, nothing. Throws CorruptData that says what is wrong.
SizeRules read_sizes(const Program& program);

}  // namespace adalayer::engine

// The checks of one node: what its entry in operations.hpp says, and what goes beyond.
#pragma once

#include <string_view>

#include "core/status.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

/// Of a node whose inputs are known to be written already. Every failure is an InvalidArgument that
/// names the node.
class NodeCheck {
 public:
  NodeCheck(const Program& program, size_t index)
      : program_(program),
        index_(index),
        node_(program.nodes[index]),
        operation_(operation(node_.op)) {}

  void run() const;

 private:
  template <typename... Pieces>
  [[noreturn]] void bad(const Pieces&... pieces) const {
    fail<InvalidArgument>("node ", index_, " (", op_name(node_.op), " \"", node_.name,
                          "\"): ", pieces...);
  }

  const Value& in(size_t k = 0) const { return program_.values[node_.inputs[k]]; }
  const Value& out() const { return program_.values[node_.output]; }

  // -- what the table of operations says
  void count(const char* what, size_t got, size_t expected) const;
  void form() const;
  void ints() const;
  void constants() const;
  void finish() const;
  void of_operation() const;

  // -- parameters
  const Constant& constant(std::string_view name) const;
  /// Finite, so many of them.
  void floats(std::string_view name, int64_t size) const;
  /// A 256-entry table whose entries `low` to `high` are levels of the output.
  void table(int32_t number, int64_t low, int64_t high) const;

  // -- shapes
  void shape(const char* what, const Value& v, int64_t c, int64_t h, int64_t w) const;
  void same_grid(size_t k = 0) const;
  void bounded(int64_t c, int64_t h, int64_t w) const;

  // -- windows (node_check_windows.cpp)
  void groups(int64_t groups) const;
  void output_of_convolution() const;
  void packed_weights(int64_t o, int64_t i, int64_t kernel_h, int64_t kernel_w) const;
  void canonical_weights() const;
  void convolution() const;
  void transposed_convolution() const;
  void float_convolution() const;
  void window_axis(const char* axis, int64_t size, int64_t outputs, int64_t kernel, int64_t stride,
                   int64_t pad, int64_t dilation) const;
  void max_pool() const;
  void avg_pool() const;
  void adaptive_avg_pool() const;
  void average_bound(int64_t positions) const;
  void resize() const;
  void resize_axis(const char* axis, std::string_view low, std::string_view high,
                   std::string_view part, int64_t size, int64_t outputs) const;

  // -- other operations
  void pair() const;
  void affine() const;
  void affine_image() const;
  void join() const;
  void slice() const;
  void gather() const;
  void pad() const;
  void reshape() const;
  void rearrange() const;
  void function() const;
  void combine() const;
  void reduce() const;
  void attention() const;
  void norm() const;
  void group_norm() const;
  void held() const;
  void embedding() const;
  void choose() const;
  void recurrence() const;
  void linear() const;

  const Program& program_;
  size_t index_;
  const Node& node_;
  const Operation& operation_;
};

}  // namespace adalayer::engine

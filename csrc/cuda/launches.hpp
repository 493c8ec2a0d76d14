// From a program to its launches: one for every node, or several.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/status.hpp"
#include "cuda/plan.hpp"
#include "cuda/prepared.hpp"
#include "engine/program.hpp"

namespace adalayer::cuda {

/// Plans the launches of one batch size. Convolutions are in conv_launches.cpp.
class Launcher {
 public:
  Launcher(const Model& model, int64_t batch, const Bases& bases, const std::vector<Choice>& chosen)
      : model_(model),
        p_(model.program()),
        d_(model.prepared()),
        batch_(static_cast<int32_t>(batch)),
        bases_(bases),
        chosen_(chosen) {}

  LaunchPlan run();

 private:
  using Node = engine::Node;
  using Value = engine::Value;

  void add(const Node& n, const NodeData& d);
  void quantize(const Node& n);
  void dequantize(const Node& n);
  void lookup(const Node& n, const NodeData& d);
  void pair(const Node& n, const NodeData& d);
  void affine(const Node& n, const NodeData& d);
  void affine_image(const Node& n, const NodeData& d);
  /// Concat and Join: the pieces one after the other along an axis.
  void join(const Node& n, const NodeData& d);
  void pool(const Node& n, const NodeData& d);
  /// Whatever changes where levels lie, and not what they are.
  void move(const Node& n, const NodeData& d);
  void resize(const Node& n, const NodeData& d);
  /// LayerNorm and RmsNorm.
  void row_norm(const Node& n, const NodeData& d);
  void group_norm(const Node& n, const NodeData& d);
  void attention(const Node& n, const NodeData& d);
  void function(const Node& n);
  void combine(const Node& n);
  void softmax(const Node& n);
  /// Of a Constant.
  void held_values(const Node& n, const NodeData& d);

  void convolve(const Node& n, const NodeData& d);
  ConvOutput conv_output(const Node& n, const NodeData& d, int64_t channels) const;
  /// A product on tensor cores.
  void multiply(const Node& n, const ProductPlan& c, const ConvOutput& out);
  /// Everything but the form of its weights and its splits.
  ConvParams product_params(const Node& n, const ProductPlan& c, const ConvOutput& out) const;
  Choice choose(const Node& n, const Product& product, size_t number) const;
  void use_form(ConvParams& q, const ProductPlan& c, Form form) const;
  /// As many splits as chosen, where the scratch memory has room for their sums.
  void split(ConvParams& q, const ProductPlan& c, const Choice& choice, int64_t tiles);

  const Value& value(int32_t v) const { return p_.values[v]; }

  /// Memory of a value; null for one of the program's ports.
  template <class T>
  T* at(int32_t v) const {
    if (d_.input_port[v] >= 0 || d_.output_port[v] >= 0) return nullptr;
    return reinterpret_cast<T*>(bases_.arena + offsets_[v]);
  }
  template <class T>
  const T* constant(int64_t offset) const {
    return offset < 0 ? nullptr : reinterpret_cast<const T*>(bases_.image + offset);
  }

  template <class T>
  const T* constant(const Node& n, const NodeData& d, std::string_view name) const {
    return constant<T>(d.constants[engine::operation(n.op).constant_place(name)]);
  }

  Finish finish(const Node& n, const NodeData& d) const {
    const U8Finish f = engine::node_finish(p_, n);
    const int table = engine::operation(n.op).table();
    return {f.lo, f.hi, f.inv_scale, f.zero_point,
            table < 0 ? nullptr : constant<uint8_t>(d.constants[table])};
  }

  Launch launch(const KernelInfo& kernel, const std::string& what) {
    Launch l;
    l.kernel = kernel;
    l.node = node_;
    l.name = what;
    return l;
  }

  /// Remembers that the pointer at `offset` of the parameters belongs to value v.
  void bind(Launch& l, size_t offset, int32_t v) const {
    if (d_.output_port[v] >= 0)
      l.ports.push_back({offset, true, d_.output_port[v]});
    else if (d_.input_port[v] >= 0)
      l.ports.push_back({offset, false, d_.input_port[v]});
  }

  /// The same for the float result of a convolution, whose ConvOutput lies at `offset`.
  void bind_result(Launch& l, size_t offset, int32_t v) const {
    bind(l, offset + offsetof(ConvOutput, numbers), v);
    if (d_.output_port[v] >= 0) l.output_at = static_cast<int64_t>(offset);
  }

  /// A launch of one thread per item.
  template <class P>
  Launch& items(Kernel kernel, const P& params, int64_t count) {
    const KernelInfo info = kernel_info(kernel);
    Launch l = launch(info, engine::op_name(p_.nodes[node_].op));
    const int64_t blocks = ceil_div(count, info.threads);
    if (blocks > std::numeric_limits<int32_t>::max())
      fail<InvalidArgument>("node '", p_.nodes[node_].name, "': ", count,
                            " elements are more than one launch can have");
    l.grid[0] = static_cast<uint32_t>(blocks);
    l.set_params(params);
    plan_.launches.push_back(std::move(l));
    return plan_.launches.back();
  }

  int64_t words(int32_t v) const { return batch_ * device_bytes(value(v)) / 4; }
  int64_t elements(int32_t v) const { return batch_ * value(v).c * value(v).h * value(v).w; }

  const Model& model_;
  const engine::Program& p_;
  const Model::Prepared& d_;
  const int32_t batch_;
  const Bases bases_;
  const std::vector<Choice>& chosen_;
  std::vector<int64_t> offsets_;
  int32_t node_ = -1;
  LaunchPlan plan_;
};

}  // namespace adalayer::cuda

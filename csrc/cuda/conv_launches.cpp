// Launches of convolutions.
#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launches.hpp"

namespace adalayer::cuda {

using engine::OpKind;
using engine::ValueKind;

ConvOutput Launcher::conv_output(const Node& n, const NodeData& d, int64_t channels) const {
  const engine::ConvAttributes a = engine::conv_attributes(n);
  const Value& y = value(n.output);
  ConvOutput o{};
  o.channels = constant<ChannelConstants>(channels);
  if (n.inputs.size() == 2) {
    const Value& r = value(n.inputs[1]);
    o.residual = at<uint8_t>(n.inputs[1]);
    o.residual_scale = r.scale;
    o.residual_zero = r.zero_point;
  }
  if (y.kind == ValueKind::U8) {
    o.levels = at<uint8_t>(n.output);
    o.finish = finish(n, d);
  } else {
    o.numbers = at<float>(n.output);
    o.lo = a.f32_lo;
    o.hi = a.f32_hi;
  }
  o.channels_count = static_cast<int32_t>(y.c);
  o.pitch = image_size(y).pitch;
  o.out_h = static_cast<int32_t>(y.h);
  o.out_w = static_cast<int32_t>(y.w);
  o.step_y = o.step_x = 1;
  o.linear = 1;
  return o;
}

void Launcher::convolve(const Node& n, const NodeData& d) {
  const engine::ConvAttributes a = engine::conv_attributes(n);
  const bool to_float = value(n.output).kind == ValueKind::F32;
  if (d.conv.kind == ConvKind::Products) {
    for (const ProductPlan& product : d.conv.products)
      multiply(n, product, conv_output(n, d, product.channels));
    return;
  }
  const auto fill = [&](auto& q) {
    q.in = at<uint8_t>(n.inputs[0]);
    q.batch = batch_;
    q.size = image_size(value(n.inputs[0]));
    q.kernel_h = static_cast<int32_t>(a.kernel_h);
    q.kernel_w = static_cast<int32_t>(a.kernel_w);
    q.stride_h = static_cast<int32_t>(a.stride_h);
    q.stride_w = static_cast<int32_t>(a.stride_w);
    q.dilation_h = static_cast<int32_t>(a.dilation_h);
    q.dilation_w = static_cast<int32_t>(a.dilation_w);
    q.pad_top = static_cast<int32_t>(a.pad_top);
    q.pad_left = static_cast<int32_t>(a.pad_left);
    q.zero_point = value(n.inputs[0]).zero_point;
    q.out = conv_output(n, d, d.conv.channels);
  };
  const Value& y = value(n.output);
  if (d.conv.kind == ConvKind::Depthwise) {
    DepthwiseParams q{};
    fill(q);
    q.weights = constant<uint32_t>(d.conv.weights);
    q.positions_h = static_cast<int32_t>(y.h);
    q.positions_w = static_cast<int32_t>(y.w);
    const int64_t columns = ceil_div(y.w, kDepthwiseColumns);
    Launch& l = items(Kernel::Depthwise, q, batch_ * y.h * columns * (q.size.pitch / 4));
    if (to_float) bind_result(l, offsetof(DepthwiseParams, out), n.output);
    l.name = d.conv.name();
    return;
  }
  DirectParams q{};
  fill(q);
  q.weights = constant<int8_t>(d.conv.weights);
  q.group_in = static_cast<int32_t>(value(n.inputs[0]).c / a.groups);
  q.group_out = static_cast<int32_t>(y.c / a.groups);
  q.transposed = n.op == OpKind::ConvTranspose;
  Launch& l = items(Kernel::Direct, q, batch_ * y.c * y.h * y.w);
  if (to_float) bind_result(l, offsetof(DirectParams, out), n.output);
  l.name = d.conv.name();
}

ConvParams Launcher::product_params(const Node& n, const ProductPlan& c,
                                    const ConvOutput& out) const {
  ConvParams q{};
  q.in = at<uint8_t>(n.inputs[0]);
  q.weights = constant<uint8_t>(c.weights);
  q.pieces = constant<int32_t>(c.pieces);
  q.zero_page = constant<uint8_t>(c.zero_page);
  q.group_weight_bytes = c.group_weight_bytes;
  q.group_in_bytes = c.group_in_bytes;
  q.group_out = c.group_out;
  q.cells = c.cells;
  q.plane = c.plane_h * c.plane_w;
  q.positions = batch_ * q.plane;
  q.width = c.plane_w;
  q.in_h = c.in_h;
  q.in_w = c.in_w;
  q.in_row_bytes = c.in_row_bytes;
  q.in_pixel_bytes = c.in_pixel_bytes;
  q.in_image_bytes = static_cast<int32_t>(device_bytes(value(n.inputs[0])));
  q.stride_y = c.stride_y;
  q.stride_x = c.stride_x;
  q.taps_y = static_cast<int32_t>(c.tap_y.size());
  q.taps_x = static_cast<int32_t>(c.tap_x.size());
  std::copy(c.tap_y.begin(), c.tap_y.end(), q.tap_y);
  std::copy(c.tap_x.begin(), c.tap_x.end(), q.tap_x);
  q.steps = c.steps;
  q.depth = c.depth;
  q.shift = c.shift;
  q.vector_store = c.vector_store;
  q.out = out;
  q.out.step_y = c.step_y;
  q.out.step_x = c.step_x;
  q.out.phase_y = c.phase_y;
  q.out.phase_x = c.phase_x;
  q.out.linear = c.step_y == 1 && c.step_x == 1;
  return q;
}

Choice Launcher::choose(const Node& n, const Product& product, size_t number) const {
  if (number < chosen_.size()) return chosen_[number];
  const std::vector<Choice> all = choices(product, model_.machine());
  if (all.empty())
    fail<InvalidArgument>("node '", n.name, "': no kernel fits ", model_.machine().shared_bytes,
                          " bytes of shared memory");
  return all.front();
}

void Launcher::use_form(ConvParams& q, const ProductPlan& c, Form form) const {
  if (form == Form::Blocks) {
    q.weights = constant<uint8_t>(c.blocks.weights);
    q.pieces = constant<int32_t>(c.blocks.pieces);
    q.block_steps = constant<int32_t>(c.blocks.first_steps);
    q.step_cells = constant<uint32_t>(c.blocks.step_cells);
  } else if (form == Form::Structured) {
    q.weights = constant<uint8_t>(c.structured);
    q.group_weight_bytes = c.structured_group_bytes;
  }
}

void Launcher::split(ConvParams& q, const ProductPlan& c, const Choice& choice, int64_t tiles) {
  const TileShape& t = shape_of(choice.tile);
  const int64_t tile_bytes = int64_t{4} * t.channels() * t.positions();
  const int64_t most_splits = choice.form == Form::Blocks ? c.blocks.longest : c.steps;
  q.splits = std::clamp(choice.splits, 1, static_cast<int>(std::max<int64_t>(1, most_splits)));
  const int64_t bytes = kCounterBytes + tiles * c.groups * tile_bytes;
  if (tiles * c.groups * 4 > kCounterBytes || bytes > kMostScratch) q.splits = 1;
  if (q.splits == 1) return;
  plan_.scratch_bytes = std::max(plan_.scratch_bytes, bytes);
  q.arrived = reinterpret_cast<int32_t*>(bases_.scratch);
  q.partial = reinterpret_cast<int32_t*>(bases_.scratch + kCounterBytes);
}

void Launcher::multiply(const Node& n, const ProductPlan& c, const ConvOutput& out) {
  ConvParams q = product_params(n, c, out);
  Product product{node_, c.bits, c.piece, c.group_out, q.positions, c.groups, c.steps, c.depth};
  product.longest_block = c.blocks.longest;
  product.block_steps = c.blocks.there ? std::max<int64_t>(1, c.blocks.steps) : 0;
  product.stored_cells = c.blocks.stored_cells;
  product.structured = c.structured >= 0;
  const size_t number = plan_.products.size();
  plan_.products.push_back(product);
  const Choice choice = choose(n, product, number);
  const TileShape& t = shape_of(choice.tile);
  const KernelInfo info = conv_kernel(c.bits, choice.tile, c.piece, choice.form);
  const bool there = choice.form == Form::Dense ||
                     (choice.form == Form::Blocks ? c.blocks.there : product.structured);
  if (info.function == nullptr || !there)
    fail<InvalidArgument>("node '", n.name, "': there is no kernel of tile ", t.name, " and form ",
                          static_cast<int>(choice.form), " for ", c.bits, " bits and pieces of ",
                          c.piece, " bytes");
  use_form(q, c, choice.form);
  q.tiles_m = static_cast<int32_t>(ceil_div(c.group_out, t.channels()));
  const int64_t tiles = q.tiles_m * ceil_div(q.positions, t.positions());
  split(q, c, choice, tiles);
  std::string kernel = t.name;
  if (choice.form == Form::Blocks) kernel.append(" blocks");
  if (choice.form == Form::Structured) kernel.append(" 2:4");
  if (q.splits > 1) kernel.append("/").append(std::to_string(q.splits));
  Launch l = launch(info, kernel);
  l.choice = static_cast<int32_t>(number);
  l.grid[0] = static_cast<uint32_t>(tiles);
  l.grid[1] = static_cast<uint32_t>(q.splits);
  l.grid[2] = static_cast<uint32_t>(c.groups);
  l.set_params(q);
  if (value(n.output).kind == ValueKind::F32) bind_result(l, offsetof(ConvParams, out), n.output);
  plan_.launches.push_back(std::move(l));
}

}  // namespace adalayer::cuda

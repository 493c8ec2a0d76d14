#include "engine/conv_step.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "core/status.hpp"
#include "formats/canonical.hpp"

namespace adalayer::engine {
namespace {

template <class T>
AlignedBuffer padded_copy(std::span<const T> values) {
  AlignedBuffer buffer(
      static_cast<size_t>(cpu::epilogue_size(static_cast<int64_t>(values.size()))) * sizeof(T));
  buffer.clear();
  if (!values.empty()) std::memcpy(buffer.data(), values.data(), values.size_bytes());
  return buffer;
}

const Value& value_of(const Program& program, int32_t id) { return program.values[id]; }

/// The geometry of a node: an ordinary convolution's, or for a transposed one just its channels.
ConvShape shape_of(const Program& program, const Node& node) {
  if (node.op == OpKind::Conv) return conv_shape(program, node);
  const ConvAttributes a = conv_attributes(node);
  const Value& x = value_of(program, node.inputs[0]);
  const Value& y = value_of(program, node.output);
  ConvShape s;
  s.batch = 1;
  s.in_channels = x.c;
  s.in_h = x.h;
  s.in_w = x.w;
  s.out_channels = y.c;
  s.kernel_h = a.kernel_h;
  s.kernel_w = a.kernel_w;
  s.groups = a.groups;
  return s;
}

/// One axis of a transposed convolution's phase r: outputs r, r + stride, ... collect the kernel
/// taps first_tap + j * tap_step. The last of them reads input `first` (negative: padding) for the
/// first output, the one before it input first + dilation, and so on.
struct PhaseAxis {
  int64_t count = 0, taps = 0, first = 0, first_tap = 0, tap_step = 1, dilation = 1;
};
PhaseAxis phase_axis(int64_t r, int64_t out, int64_t kernel, int64_t stride, int64_t dilation,
                     int64_t pad) {
  PhaseAxis p;
  p.count = (out - r + stride - 1) / stride;
  const int64_t common = std::gcd(stride, dilation);
  p.tap_step = stride / common;
  p.dilation = dilation / common;
  while (p.first_tap < p.tap_step && (r + pad - p.first_tap * dilation) % stride != 0)
    ++p.first_tap;
  if (p.first_tap < p.tap_step && p.first_tap < kernel)
    p.taps = (kernel - p.first_tap + p.tap_step - 1) / p.tap_step;
  if (p.taps == 0) {
    // No tap reaches these outputs; they get one of zero weights.
    p.taps = 1;
    p.first_tap = kernel;
    return p;
  }
  p.first = (r + pad - (p.first_tap + (p.taps - 1) * p.tap_step) * dilation) / stride;
  return p;
}

}  // namespace

std::vector<TransposedPhase> transposed_phases(const Program& program, const Node& node) {
  const ConvAttributes a = conv_attributes(node);
  const Value& x = value_of(program, node.inputs[0]);
  const Value& y = value_of(program, node.output);
  std::vector<TransposedPhase> phases;
  for (int64_t ry = 0; ry < std::min(a.stride_h, y.h); ++ry) {
    for (int64_t rx = 0; rx < std::min(a.stride_w, y.w); ++rx) {
      const PhaseAxis v = phase_axis(ry, y.h, a.kernel_h, a.stride_h, a.dilation_h, a.pad_top);
      const PhaseAxis h = phase_axis(rx, y.w, a.kernel_w, a.stride_w, a.dilation_w, a.pad_left);
      TransposedPhase phase;
      ConvShape& s = phase.shape;
      s.batch = 1;
      s.in_channels = x.c;
      s.in_h = x.h;
      s.in_w = x.w;
      s.out_channels = y.c;
      s.kernel_h = v.taps;
      s.kernel_w = h.taps;
      s.dilation_h = v.dilation;
      s.dilation_w = h.dilation;
      s.groups = a.groups;
      // Padding that is negative where the first window starts inside the image.
      s.pad_top = -v.first;
      s.pad_left = -h.first;
      s.pad_bottom = v.count + (v.taps - 1) * v.dilation + v.first - x.h;
      s.pad_right = h.count + (h.taps - 1) * h.dilation + h.first - x.w;
      phase.map = {ry, a.stride_h, rx, a.stride_w, y.h, y.w};
      phase.first_ky = v.first_tap;
      phase.step_ky = v.tap_step;
      phase.first_kx = h.first_tap;
      phase.step_kx = h.tap_step;
      phases.push_back(phase);
    }
  }
  return phases;
}

bool runs_grouped(const Program& program, const Node& node) {
  return node.op == OpKind::Conv && value_of(program, node.output).kind == ValueKind::U8 &&
         cpu::active_kernels() != nullptr && cpu::grouped_suits(conv_shape(program, node));
}

ConvStep::ConvStep(const Program& program, const Node& node, const cpu::ImageLayout& in,
                   const cpu::ImageLayout* out, const cpu::ImageLayout* residual,
                   const cpu::Stem* stem)
    : node_(&node),
      attributes_(conv_attributes(node)),
      shape_(shape_of(program, node)),
      out_value_(value_of(program, node.output)),
      zero_point_(value_of(program, node.inputs[0]).zero_point),
      in_(in),
      float_out_(out == nullptr),
      has_residual_(node.inputs.size() > 1),
      stem_(stem != nullptr) {
  if (out != nullptr) out_ = *out;
  if (residual != nullptr) residual_ = *residual;
  if (has_residual_) residual_value_ = value_of(program, node.inputs[1]);
  const std::vector<uint8_t>& canonical = program.constants[attributes_.weights].bytes;
  bits_ = formats::read_header(canonical).bits;
  packed_bytes_ = canonical.size();
  const std::vector<int8_t> weights = formats::unpack_canonical(canonical);
  prepare_epilogue(program, weights);
  // A float output adds its residual afterwards.
  const cpu::ImageLayout* fused = float_out_ ? nullptr : residual;
  if (node.op == OpKind::ConvTranspose) {
    plan_transposed(transposed_phases(program, node), in, out, fused, weights);
  } else if (runs_grouped(program, node)) {
    grouped_ = cpu::build_grouped(shape_, weights);
    correction_ = correction(weights);
    epilogue_.correction = zero_point_ == 0 ? nullptr : correction_.as<int32_t>();
  } else if (stem != nullptr) {
    new_piece(cpu::stem_weights(*stem, shape_, weights)).plan =
        plan(stem->shape, {}, in, out, fused, false);
  } else {
    add_piece(shape_, {}, in, out, fused, weights);
  }
}

AlignedBuffer ConvStep::correction(std::span<const int8_t> weights) const {
  const int64_t outs = shape_.out_channels;
  const int64_t reduction = static_cast<int64_t>(weights.size()) / std::max<int64_t>(outs, 1);
  std::vector<int32_t> values(static_cast<size_t>(outs));
  for (int64_t o = 0; o < outs; ++o) {
    int64_t sum = 0;
    for (int64_t k = 0; k < reduction; ++k)
      sum += weights[o * reduction + k];
    values[o] = static_cast<int32_t>(-zero_point_ * sum);
  }
  return padded_copy<int32_t>(values);
}

ConvStep::Piece& ConvStep::new_piece(std::vector<int8_t> weights) {
  Piece& piece = pieces_.emplace_back();
  piece.correction = correction(weights);
  piece.weights = std::move(weights);
  piece.epilogue = epilogue_;
  piece.epilogue.correction = zero_point_ == 0 ? nullptr : piece.correction.as<int32_t>();
  return piece;
}

cpu::ConvPlan ConvStep::plan(const ConvShape& shape, const cpu::OutputMap& map,
                             const cpu::ImageLayout& in, const cpu::ImageLayout* out,
                             const cpu::ImageLayout* residual, bool by_pixel) const {
  cpu::ConvPlan plan =
      cpu::plan_conv(shape, in, out, residual, *cpu::active_kernels(), map, by_pixel);
  // Narrower weights need no order, unpacked or not.
  if (bits_ < 7) plan.arrangement = nullptr;
  return plan;
}

void ConvStep::add_piece(const ConvShape& shape, const cpu::OutputMap& map,
                         const cpu::ImageLayout& in, const cpu::ImageLayout* out,
                         const cpu::ImageLayout* residual, std::vector<int8_t> weights) {
  Piece& piece = new_piece(std::move(weights));
  const auto plan_of = [&](bool by_pixel) { return plan(shape, map, in, out, residual, by_pixel); };
  piece.plan = plan_of(false);
  piece.sparse =
      cpu::plan_sparse(plan_of, piece.plan, piece.weights, bits_, *cpu::active_kernels());
}

void ConvStep::plan_transposed(const std::vector<TransposedPhase>& phases,
                               const cpu::ImageLayout& in, const cpu::ImageLayout* out,
                               const cpu::ImageLayout* residual, std::span<const int8_t> weights) {
  const ConvAttributes& a = attributes_;
  const int64_t outs = shape_.out_channels, ins = shape_.group_in();
  for (const TransposedPhase& phase : phases) {
    const ConvShape& s = phase.shape;
    std::vector<int8_t> taps(static_cast<size_t>(outs * ins * s.kernel_h * s.kernel_w), 0);
    for (int64_t o = 0; o < outs; ++o)
      for (int64_t i = 0; i < ins; ++i)
        for (int64_t jy = 0; jy < s.kernel_h; ++jy)
          for (int64_t jx = 0; jx < s.kernel_w; ++jx) {
            const int64_t ky = phase.first_ky + (s.kernel_h - 1 - jy) * phase.step_ky;
            const int64_t kx = phase.first_kx + (s.kernel_w - 1 - jx) * phase.step_kx;
            if (ky < a.kernel_h && kx < a.kernel_w)
              taps[((o * ins + i) * s.kernel_h + jy) * s.kernel_w + jx] =
                  weights[((o * ins + i) * a.kernel_h + ky) * a.kernel_w + kx];
          }
    add_piece(s, phase.map, in, out, residual, std::move(taps));
  }
  if (!std::all_of(pieces_.begin(), pieces_.end(), [](const Piece& p) { return p.sparse; }))
    for (Piece& piece : pieces_)
      piece.sparse.reset();
}

void ConvStep::prepare_epilogue(const Program& program, std::span<const int8_t> weights) {
  const ConvAttributes& a = attributes_;
  const std::span<const float> scale = program.constants[a.scale].f32();
  const std::span<const float> bias = program.constants[a.bias].f32();
  const int64_t outs = shape_.out_channels;
  const int64_t reduction = static_cast<int64_t>(weights.size()) / std::max<int64_t>(outs, 1);
  double largest = 0.0;
  for (int64_t o = 0; o < outs; ++o) {
    int64_t absolute = 0;
    for (int64_t k = 0; k < reduction; ++k)
      absolute += std::abs(static_cast<int>(weights[o * reduction + k]));
    largest = std::max(
        largest, 255.0 * static_cast<double>(absolute) * std::fabs(static_cast<double>(scale[o])) +
                     std::fabs(static_cast<double>(bias[o])));
  }
  scale_ = padded_copy(scale);
  bias_ = padded_copy(bias);
  epilogue_.scale = scale_.as<float>();
  epilogue_.bias = bias_.as<float>();
  if (!float_out_) epilogue_.finish = node_finish(program, *node_);
  if (has_residual_) {
    epilogue_.residual_scale = residual_value_.scale;
    epilogue_.residual_zero = residual_value_.zero_point;
    largest += 255.0 * static_cast<double>(residual_value_.scale);
  }
  epilogue_.bounded = largest * static_cast<double>(epilogue_.finish.inv_scale) < 1 << 30;
}

int64_t ConvStep::panel_bytes(const ConvChoice& choice) const {
  int64_t bytes = 0;
  for (const Piece& piece : pieces_)
    bytes += piece_bytes(piece, possible(choice));
  return bytes;
}

void ConvStep::pack(uint8_t* panels, const ConvChoice& choice) {
  const ConvChoice f = possible(choice);
  for (Piece& piece : pieces_) {
    piece.panels[f.sparse][f.resident] = panels;
    if (f.sparse)
      cpu::pack_sparse(piece.sparse->plan, piece.sparse->panels, piece.weights,
                       panel_bits(f.resident), panels);
    else
      cpu::pack_panels(piece.plan, piece.weights, panel_bits(f.resident), panels);
    panels += piece_bytes(piece, f);
  }
}

void ConvStep::drop_weights() {
  for (Piece& piece : pieces_)
    piece.weights = {};
}

ConvChoice ConvStep::possible(ConvChoice choice) const {
  const bool bitmask =
      can_be_sparse() && pieces_.front().sparse->panels.kind == cpu::Panels::Bitmask;
  choice.sparse = can_be_sparse() && (choice.sparse || cpu::sparse_is_forced());
  choice.resident = choice.resident && can_be_resident() && !(choice.sparse && bitmask);
  return choice;
}

bool ConvStep::should_be_sparse() const {
  return can_be_sparse() && std::all_of(pieces_.begin(), pieces_.end(), [](const Piece& piece) {
           return cpu::surely_faster(*piece.sparse, piece.plan);
         });
}

uint64_t ConvStep::sparse_key() const {
  uint64_t key = 0;
  if (!can_be_sparse()) return key;
  for (const Piece& piece : pieces_)
    key = key * 1'000'003 + 1 + static_cast<uint64_t>(piece.sparse->panels.kind) +
          static_cast<uint64_t>(piece.sparse->panels.bytes(bits_));
  return key;
}

cpu::WeightStream::Segment ConvStep::segment(cpu::Part part) const {
  if (pieces_.size() != 1) return {nullptr, 0, 0};
  const Piece& piece = pieces_.front();
  const auto [first, last] = cpu::weight_range(plan_in_use(piece), panels_in_use(piece),
                                               panel_bits(choice_.resident), part);
  return {piece.panels[choice_.sparse][choice_.resident] + first, last - first, 0};
}

bool ConvStep::by_columns(int threads) const {
  return pieces_.size() == 1 &&
         cpu::prefers_columns(plan_in_use(pieces_.front()), panel_bytes(choice_), threads);
}

int64_t ConvStep::max_parts() const {
  // Below this much work per part a hand-over costs more than it saves.
  constexpr int64_t kMacsPerPart = 400'000;
  if (float_out_ && has_residual_) return 1;  // the residual is added once, after the sums
  return std::max<int64_t>(1, macs() / kMacsPerPart);
}

void ConvStep::run(const cpu::KernelRow& kernels, const ConvBuffers& b, cpu::Part part,
                   bool by_columns, cpu::WeightStream* stream, int64_t segment) const {
  if (grouped_) {
    for (int64_t n = 0; n < b.images; ++n) {
      const cpu::ConstImageView in(&in_, b.in + n * in_.image_bytes);
      const cpu::ConstImageView residual(
          &residual_, b.residual == nullptr ? nullptr : b.residual + n * residual_.image_bytes);
      cpu::run_grouped(shape_, *grouped_, epilogue_, in, residual,
                       {&out_, b.out + n * out_.image_bytes}, part);
    }
    return;
  }
  for (const Piece& piece : pieces_) {
    const cpu::ConvCall call{.plan = plan_in_use(piece),
                             .weights = piece.panels[choice_.sparse][choice_.resident],
                             .bits = panel_bits(choice_.resident),
                             .weight_bits = bits_,
                             .epilogue = &piece.epilogue,
                             .in = b.in,
                             .images = b.images,
                             .out = b.out,
                             .residual = b.residual,
                             .by_columns = by_columns,
                             .other_order = choice_.other_order,
                             .stream = stream,
                             .segment = segment,
                             .sparse = panels_in_use(piece)};
    if (!float_out_) {
      cpu::run_conv(call, kernels, part);
      continue;
    }
    OutputSpec out;
    out.data = b.out_f32;
    out.dtype = DType::F32;
    out.layout = Layout::NCHW;
    out.scale = epilogue_.scale;
    out.bias = epilogue_.bias;
    // With a residual the clamp comes after it.
    out.lo = has_residual_ ? -INFINITY : attributes_.f32_lo;
    out.hi = has_residual_ ? INFINITY : attributes_.f32_hi;
    cpu::run_conv({call, out, piece.correction.as<int32_t>()}, kernels, part);
  }
  if (float_out_ && has_residual_) add_float_residual(b);
}

void ConvStep::add_float_residual(const ConvBuffers& b) const {
  const int64_t h = out_value_.h, w = out_value_.w;
  float* y = b.out_f32;
  for (int64_t n = 0; n < b.images; ++n) {
    const uint8_t* image = b.residual + n * residual_.image_bytes;
    for (int64_t c = 0; c < out_value_.c; ++c)
      for (int64_t i = 0; i < h * w; ++i, ++y) {
        const uint8_t q = image[residual_.offset(i / w, i % w) + c];
        *y += dequantize_value(q, residual_value_.scale, residual_value_.zero_point);
        *y = min_x86(max_x86(*y, attributes_.f32_lo), attributes_.f32_hi);
      }
  }
}

size_t ConvStep::derived_bytes() const {
  if (grouped_) return grouped_->data.size();
  int64_t bytes = panel_bytes(choice_);
  for (const Piece& piece : pieces_)
    if (choice_.sparse) bytes += piece.sparse->panels.table_bytes();
  return static_cast<size_t>(bytes);
}

std::string ConvStep::kernel() const {
  const cpu::KernelRow* row = cpu::active_kernels();
  const std::string isa = row == nullptr ? "scalar" : row->name;
  if (grouped_) return isa + (shape_.depthwise() ? " depthwise" : " grouped");
  std::string form;
  if (choice_.sparse)
    form = pieces_.front().sparse->panels.kind == cpu::Panels::Bitmask ? " bitmask" : " blocks";
  if (choice_.resident) form += " resident";
  if (stem_) return isa + " stem" + form;
  return isa + (pieces_.size() > 1 ? " transposed" : "") + form;
}

std::string ConvStep::why() const {
  if (!can_be_sparse()) return {};
  std::string text;
  for (const Piece& piece : pieces_)
    text += (text.empty() ? "" : "; ") + cpu::describe(*piece.sparse, piece.plan, bits_);
  if (!choice_.sparse) text = "dense, not " + text;
  if (dense_seconds_ > 0.0) {
    char times[80];
    std::snprintf(times, sizeof times, " (%.1f µs, dense %.1f µs)", 1e6 * sparse_seconds_,
                  1e6 * dense_seconds_);
    text += times;
  }
  return text;
}

}  // namespace adalayer::engine

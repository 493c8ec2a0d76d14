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
std::shared_ptr<const AlignedBuffer> padded_copy(std::span<const T> values) {
  auto buffer = std::make_shared<AlignedBuffer>(
      static_cast<size_t>(cpu::epilogue_size(static_cast<int64_t>(values.size()))) * sizeof(T));
  buffer->clear();
  if (!values.empty()) std::memcpy(buffer->data(), values.data(), values.size_bytes());
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

/// The taps of a transposed convolution's phase, of its [O][I/groups][KH][KW], flipped.
std::vector<int8_t> phase_weights(const TransposedPhase& phase, const ConvAttributes& a,
                                  const ConvShape& whole, std::span<const int8_t> weights) {
  const ConvShape& s = phase.shape;
  const int64_t outs = whole.out_channels, ins = whole.group_in();
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
  return taps;
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

std::vector<cpu::ConvTask> conv_tasks(const Program& program, const Node& node, bool own_input,
                                      cpu::Room room) {
  const cpu::KernelRow& kernels = *cpu::active_kernels();
  const int bits = weight_bits(weights_of(program, node));
  const int qmax = value_of(program, node.inputs[0]).qmax;
  if (node.op == OpKind::Conv)
    return {{kernels, conv_shape(program, node), {}, bits, own_input, room, qmax}};
  std::vector<cpu::ConvTask> tasks;
  for (const TransposedPhase& phase : transposed_phases(program, node))
    tasks.push_back({kernels, phase.shape, phase.map, bits, false, room, qmax});
  return tasks;
}

ConvStep::ConvStep(const Program& program, const Node& node, const cpu::ImageLayout& in,
                   const cpu::ImageLayout* out, const cpu::ImageLayout* residual, bool own_input,
                   cpu::Room room)
    : node_(&node),
      attributes_(conv_attributes(node)),
      shape_(shape_of(program, node)),
      out_value_(value_of(program, node.output)),
      zero_point_(value_of(program, node.inputs[0]).zero_point),
      float_out_(out == nullptr),
      has_residual_(node.inputs.size() > 1) {
  if (residual != nullptr) residual_ = *residual;
  if (has_residual_) residual_value_ = value_of(program, node.inputs[1]);
  const Constant& stored = weights_of(program, node);
  bits_ = weight_bits(stored);
  packed_bytes_ = stored.bytes.size();
  std::vector<int8_t> weights = unpacked_weights(stored);
  prepare_epilogue(program, weights);
  // A float output adds its residual afterwards.
  const cpu::ConvLayouts at{in, out, float_out_ ? nullptr : residual};
  const std::vector<cpu::ConvTask> tasks = conv_tasks(program, node, own_input, room);
  if (node.op == OpKind::Conv)
    add_piece(tasks.front(), at, std::move(weights));
  else
    add_phases(program, tasks, at, weights);
  // A clock would need the memory of several.
  if (room != cpu::Room::Several) keep_form(sure_form());
}

ConvStep::ConvStep(const ConvStep& like, const Program& program, const Node& node,
                   const cpu::ImageLayout* residual)
    : node_(&node),
      attributes_(conv_attributes(node)),
      shape_(shape_of(program, node)),
      out_value_(value_of(program, node.output)),
      zero_point_(like.zero_point_),
      float_out_(like.float_out_),
      has_residual_(like.has_residual_),
      bits_(like.bits_),
      packed_bytes_(like.packed_bytes_),
      scale_(like.scale_),
      bias_(like.bias_),
      panels_(like.panels_),
      epilogue_(like.epilogue_) {
  if (residual != nullptr) residual_ = *residual;
  if (has_residual_) residual_value_ = value_of(program, node.inputs[1]);
  if (!float_out_) epilogue_.finish = node_finish(program, node);
  choice_ = like.choice_;
  choice_.form = 0;
}

std::unique_ptr<ConvStep> ConvStep::at_size(const ConvStep& like, const Program& program,
                                            const Node& node, const cpu::ImageLayout& in,
                                            const cpu::ImageLayout* out,
                                            const cpu::ImageLayout* residual, bool own_input) {
  const std::vector<cpu::ConvTask> tasks = conv_tasks(program, node, own_input, cpu::Room::Several);
  // (A transposed convolution has fewer phases where its output is smaller than its stride.)
  if (tasks.size() != like.pieces_.size()) return nullptr;
  std::unique_ptr<ConvStep> step(new ConvStep(like, program, node, residual));
  const cpu::ConvLayouts at{in, out, step->float_out_ ? nullptr : residual};
  for (size_t k = 0; k < tasks.size(); ++k) {
    const Piece& from = like.pieces_[k];
    const Form& used = like.in_use(from);
    Form form{{used.conv.algorithm, used.conv.weights, nullptr}, {used.panels[0], used.panels[1]}};
    form.conv.plan = form.conv.algorithm->plan(tasks[k], at, form.conv.weights->variant);
    if (!form.conv.plan->packs_like(*used.conv.plan)) return nullptr;
    Piece& piece = step->pieces_.emplace_back();
    piece.correction = from.correction;
    piece.epilogue = from.epilogue;
    piece.epilogue.finish = step->epilogue_.finish;
    piece.forms.push_back(std::move(form));
  }
  return step;
}

void ConvStep::add_phases(const Program& program, const std::vector<cpu::ConvTask>& tasks,
                          const cpu::ConvLayouts& at, std::span<const int8_t> weights) {
  const std::vector<TransposedPhase> phases = transposed_phases(program, *node_);
  for (size_t k = 0; k < phases.size(); ++k)
    add_piece(tasks[k], at, phase_weights(phases[k], attributes_, shape_, weights));
  // What is nothing for one of them is nothing for all.
  const auto everywhere = [&](const cpu::ConvAlgorithm* algorithm) {
    return std::all_of(pieces_.begin(), pieces_.end(), [&](const Piece& piece) {
      return std::any_of(piece.forms.begin(), piece.forms.end(),
                         [&](const Form& f) { return f.conv.algorithm == algorithm; });
    });
  };
  std::vector<const cpu::ConvAlgorithm*> common;
  for (const Form& f : pieces_.front().forms)
    if (everywhere(f.conv.algorithm)) common.push_back(f.conv.algorithm);
  for (Piece& piece : pieces_)
    std::erase_if(piece.forms, [&](const Form& f) {
      return std::find(common.begin(), common.end(), f.conv.algorithm) == common.end();
    });
}

void ConvStep::keep_form(int form) {
  for (Piece& piece : pieces_) {
    Form kept = std::move(piece.forms[form]);
    piece.forms.clear();
    piece.forms.push_back(std::move(kept));
  }
}

std::shared_ptr<const AlignedBuffer> ConvStep::correction(std::span<const int8_t> weights) const {
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

void ConvStep::add_piece(const cpu::ConvTask& task, const cpu::ConvLayouts& at,
                         std::vector<int8_t> weights) {
  Piece& piece = pieces_.emplace_back();
  piece.correction = correction(weights);
  piece.weights = std::move(weights);
  piece.epilogue = epilogue_;
  piece.epilogue.correction = zero_point_ == 0 ? nullptr : piece.correction->as<int32_t>();
  for (const cpu::ConvAlgorithm* algorithm : cpu::algorithms_for(task)) {
    cpu::ConvForm form = cpu::make_form(*algorithm, task, at, piece.weights);
    if (form.weights != nullptr) piece.forms.push_back({std::move(form)});
  }
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
  epilogue_.scale = scale_->as<float>();
  epilogue_.bias = bias_->as<float>();
  if (!float_out_) epilogue_.finish = node_finish(program, *node_);
  if (has_residual_) {
    epilogue_.residual_scale = residual_value_.scale;
    epilogue_.residual_zero = residual_value_.zero_point;
    largest += 255.0 * static_cast<double>(residual_value_.scale);
  }
  epilogue_.bounded = largest * static_cast<double>(epilogue_.finish.inv_scale) < 1 << 30;
}

int64_t ConvStep::panel_bytes(const ConvChoice& choice) const {
  const ConvChoice c = possible(choice);
  int64_t bytes = 0;
  for (const Piece& piece : pieces_) {
    const cpu::ConvForm& conv = piece.forms[c.form].conv;
    bytes += conv.plan->packed_bytes(*conv.weights, panel_bits(c.resident));
  }
  return bytes;
}

void ConvStep::pack(uint8_t* panels, const ConvChoice& choice) {
  const ConvChoice c = possible(choice);
  const int bits = panel_bits(c.resident);
  for (Piece& piece : pieces_) {
    Form& form = piece.forms[c.form];
    form.panels[c.resident] = panels;
    form.conv.plan->pack(*form.conv.weights, piece.weights, bits, panels);
    panels += form.conv.plan->packed_bytes(*form.conv.weights, bits);
  }
}

void ConvStep::settle(std::shared_ptr<const AlignedBuffer> panels) {
  panels_ = std::move(panels);
  for (Piece& piece : pieces_) {
    piece.weights = {};
    for (int f = 0; f < forms(); ++f)
      if (f != choice_.form) piece.forms[f].conv.plan.reset();
  }
}

bool ConvStep::share(const ConvStep& like) {
  if (pieces_.size() != like.pieces_.size() || choice_.resident != like.choice_.resident)
    return false;
  for (size_t k = 0; k < pieces_.size(); ++k) {
    const cpu::ConvForm &own = in_use(pieces_[k]).conv, &other = like.in_use(like.pieces_[k]).conv;
    if (own.algorithm != other.algorithm || own.weights->variant != other.weights->variant ||
        own.weights->key() != other.weights->key() || !own.plan->packs_like(*other.plan))
      return false;
  }
  for (size_t k = 0; k < pieces_.size(); ++k) {
    Form& own = pieces_[k].forms[static_cast<size_t>(choice_.form)];
    const Form& other = like.in_use(like.pieces_[k]);
    own.conv.weights = other.conv.weights;
    std::copy(std::begin(other.panels), std::end(other.panels), std::begin(own.panels));
    pieces_[k].correction = like.pieces_[k].correction;
    pieces_[k].epilogue.correction = like.pieces_[k].epilogue.correction;
    pieces_[k].epilogue.scale = like.epilogue_.scale;
    pieces_[k].epilogue.bias = like.epilogue_.bias;
  }
  scale_ = like.scale_;
  bias_ = like.bias_;
  panels_ = like.panels_;
  epilogue_.scale = like.epilogue_.scale;
  epilogue_.bias = like.epilogue_.bias;
  return true;
}

void ConvStep::unshare() {
  auto own = std::make_shared<AlignedBuffer>(static_cast<size_t>(panel_bytes(choice_)));
  uint8_t* to = own->data();
  const int bits = panel_bits(choice_.resident);
  for (Piece& piece : pieces_) {
    Form& form = piece.forms[static_cast<size_t>(choice_.form)];
    const auto bytes = static_cast<size_t>(form.conv.plan->packed_bytes(*form.conv.weights, bits));
    if (bytes > 0) std::memcpy(to, form.panels[choice_.resident], bytes);
    form.panels[choice_.resident] = to;
    to += bytes;
  }
  panels_ = std::move(own);
}

ConvChoice ConvStep::possible(ConvChoice choice) const {
  const std::vector<Form>& forms = pieces_.front().forms;
  if (choice.form >= this->forms()) choice.form = 0;
  for (int f = 0; f < this->forms(); ++f)
    if (forms[f].conv.weights->merit == cpu::Merit::Forced) choice.form = f;
  const cpu::ConvWeights& weights = *forms[choice.form].conv.weights;
  choice.resident = choice.resident && bits_ < 8 && weights.widens;
  choice.other_order = choice.other_order && weights.has_orders;
  return choice;
}

int ConvStep::sure_form() const {
  for (int f = 1; f < forms(); ++f)
    if (std::all_of(pieces_.begin(), pieces_.end(), [&](const Piece& piece) {
          return piece.forms[f].conv.weights->merit != cpu::Merit::Unknown;
        }))
      return f;
  return 0;
}

uint64_t ConvStep::forms_key() const {
  uint64_t key = 0;
  for (const Piece& piece : pieces_)
    for (const Form& f : piece.forms) {
      for (const char c : f.conv.algorithm->name(shape_))
        key = key * 1'000'003 + static_cast<uint8_t>(c);
      key = key * 1'000'003 + f.conv.weights->key();
    }
  return key;
}

cpu::WeightStream::Segment ConvStep::segment(cpu::Part part) const {
  if (pieces_.size() != 1) return {nullptr, 0, 0};
  const Form& form = in_use(pieces_.front());
  const auto [first, last] =
      form.conv.plan->weight_range(*form.conv.weights, panel_bits(choice_.resident), part);
  return {form.panels[choice_.resident] + first, last - first, 0};
}

bool ConvStep::by_columns(int threads) const {
  if (pieces_.size() != 1) return false;
  const cpu::ConvForm& conv = in_use(pieces_.front()).conv;
  return conv.plan->prefers_columns(*conv.weights, panel_bits(choice_.resident), threads);
}

int64_t ConvStep::max_parts() const {
  // Below this much work per part a hand-over costs more than it saves.
  constexpr int64_t kMacsPerPart = 400'000;
  if (float_out_ && has_residual_) return 1;  // the residual is added once, after the sums
  return std::max<int64_t>(1, macs() / kMacsPerPart);
}

void ConvStep::run(const ConvBuffers& b, cpu::Part part, bool by_columns, cpu::WeightStream* stream,
                   int64_t segment) const {
  OutputSpec tensor;
  tensor.data = b.out_f32;
  tensor.dtype = DType::F32;
  tensor.layout = Layout::NCHW;
  tensor.scale = epilogue_.scale;
  tensor.bias = epilogue_.bias;
  // With a residual the clamp comes after it.
  tensor.lo = has_residual_ ? -INFINITY : attributes_.f32_lo;
  tensor.hi = has_residual_ ? INFINITY : attributes_.f32_hi;
  for (const Piece& piece : pieces_) {
    const Form& form = in_use(piece);
    form.conv.plan->run({.weights = *form.conv.weights,
                         .packed = form.panels[choice_.resident],
                         .bits = panel_bits(choice_.resident),
                         .in = b.in,
                         .images = b.images,
                         .correction = piece.correction->as<int32_t>(),
                         .epilogue = &piece.epilogue,
                         .out = b.out,
                         .residual = b.residual,
                         .tensor = float_out_ ? &tensor : nullptr,
                         .by_columns = by_columns,
                         .other_order = choice_.other_order,
                         .stream = stream,
                         .segment = segment},
                        part);
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
  int64_t bytes = panel_bytes(choice_);
  for (const Piece& piece : pieces_)
    bytes += in_use(piece).conv.weights->own_bytes();
  return static_cast<size_t>(bytes);
}

size_t ConvStep::table_bytes() const {
  size_t bytes = sizeof *this;
  for (const Piece& piece : pieces_)
    bytes += sizeof piece + in_use(piece).conv.plan->bytes();
  return bytes;
}

std::string ConvStep::kernel() const {
  const cpu::ConvForm& conv = in_use(pieces_.front()).conv;
  std::string text = cpu::active_kernels()->name;
  if (pieces_.size() > 1) text += " transposed";
  text += ' ' + conv.algorithm->name(shape_);
  if (const std::string form = conv.weights->form(); !form.empty()) text += ", " + form;
  if (choice_.resident) text += ", resident";
  return text;
}

std::string ConvStep::why() const {
  for (int f = 0; f < forms(); ++f) {
    if (pieces_.front().forms[f].conv.weights->saving().empty()) continue;
    std::string text;
    for (const Piece& piece : pieces_)
      text += (text.empty() ? "" : "; ") + piece.forms[f].conv.weights->saving();
    if (choice_.form != f) {
      const cpu::ConvAlgorithm* algorithm = in_use(pieces_.front()).conv.algorithm;
      text = (choice_.form == 0 ? "dense" : algorithm->name(shape_)) + ", not " + text;
    }
    if (seconds_.size() > 1) {
      char times[80];
      std::snprintf(times, sizeof times, " (%.1f µs, dense %.1f µs)", 1e6 * seconds_[f],
                    1e6 * seconds_[0]);
      text += times;
    }
    return text;
  }
  return {};
}

}  // namespace adalayer::engine

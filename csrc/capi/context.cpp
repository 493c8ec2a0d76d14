#include "capi/context.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/status.hpp"
#include "core/thread_pool.hpp"

namespace adalayer::capi {
namespace {

constexpr int64_t kLevels = 256;
constexpr int64_t kMaxChannels = 1024;  // of images that are given as u8

/// batch * elements * width, or an error: the batch is the caller's number.
size_t bytes_of(const char* what, size_t k, int64_t batch, int64_t elements, int64_t width) {
  if (batch > INT64_MAX / width / elements)
    fail<InvalidArgument>(what, ' ', k, ": a batch of ", batch, " is too large");
  return static_cast<size_t>(batch * elements * width);
}

/// Numbers of u8 pixels. Each in its own rounding, as tensors are divided, subtracted and divided.
std::vector<float> table_of(std::span<const float> mean, std::span<const float> std) {
  std::vector<float> table;
  for (size_t c = 0; c < mean.size(); ++c)
    for (int q = 0; q < kLevels; ++q) {
      const float scaled = static_cast<float>(q) / 255.0f;
      const float centred = scaled - mean[c];
      table.push_back(centred / std[c]);
    }
  return table;
}

/// The elements of a tensor in the order that its atoms give them.
void gather(const OutputView& view, const float* memory, float* out) {
  const size_t axes = view.atoms.size();
  std::array<int64_t, kMaxAtoms> index{};
  int64_t offset = 0;
  for (int64_t k = 0; k < view.elements; ++k) {
    out[k] = memory[offset];
    for (size_t axis = axes; axis-- > 0;) {
      const auto [size, stride] = view.atoms[axis];
      offset += stride;
      if (++index[axis] < size) break;
      offset -= size * stride;
      index[axis] = 0;
    }
  }
}

}  // namespace

Context::Use::Use(Context& context) : context_(context) {
  if (context.busy_.exchange(true, std::memory_order_acquire))
    fail<InvalidArgument>("the context is in use by another thread; create one context per thread");
}

Context::Context(std::shared_ptr<const Model> model)
    : model_(std::move(model)), sized_(model_->compiled()) {
  const size_t inputs = model_->inputs().size();
  tables_.resize(inputs);
  converted_.resize(inputs);
  ports_.resize(inputs);
  program_inputs_.resize(model_->order().size());
  results_.resize(model_->result_elements().size());
  targets_.resize(results_.size());
  for (size_t k = 0; k < inputs; ++k) {
    const std::vector<int64_t>& shape = model_->inputs()[k].shape;
    if (shape.size() != 3) continue;
    // Tables are small beside the tensors of any image, but not of a vector of a million channels.
    if (shape[0] > kMaxChannels) continue;
    if (const auto n = model_->normalization(shape[0])) tables_[k] = table_of(n->mean, n->std);
  }
}

void Context::set_threads(int threads) {
  const Use use(*this);
  if (threads < 0 || threads > kMaxThreads)
    fail<InvalidArgument>("threads: expected 0 to ", kMaxThreads, ", got ", threads);
  threads_ = threads;
}

void Context::set_normalization(size_t input, std::span<const float> mean,
                                std::span<const float> std) {
  const Use use(*this);
  if (input >= model_->inputs().size())
    fail<InvalidArgument>("input ", input, " does not exist (there are ", model_->inputs().size(),
                          ")");
  const std::vector<int64_t>& shape = model_->inputs()[input].shape;
  if (shape.empty() || shape[0] != static_cast<int64_t>(mean.size()))
    fail<InvalidArgument>("input ", input, " ('", model_->inputs()[input].name, "'): expected ",
                          shape.empty() ? int64_t{0} : shape[0], " channels, got ", mean.size());
  if (shape[0] > kMaxChannels)
    fail<InvalidArgument>("u8 pixels: expected at most ", kMaxChannels, " channels, got ",
                          shape[0]);
  for (size_t c = 0; c < mean.size(); ++c)
    if (!std::isfinite(mean[c]) || !std::isfinite(std[c]) || std[c] <= 0.0f)
      fail<InvalidArgument>("channel ", c, ": expected a finite mean and a positive std, got ",
                            mean[c], " and ", std[c]);
  tables_[input] = table_of(mean, std);
}

void Context::set_shape(size_t input, std::span<const int64_t> shape) {
  const Use use(*this);
  if (input >= sized_.inputs.size())
    fail<InvalidArgument>("input ", input, " does not exist (there are ", sized_.inputs.size(),
                          ")");
  Port& port = sized_.inputs[input];
  const auto bad = [&](const auto&... pieces) {
    fail<InvalidArgument>("input ", input, " ('", port.name, "'): ", pieces...);
  };
  if (shape.size() != port.shape.size())
    bad("expected a shape of ", port.shape.size(), " sizes, got ", shape.size());
  for (size_t a = 0; a < shape.size(); ++a) {
    const engine::SizeAxis* axis = model_->axis(input, a);
    if (axis == nullptr) {
      if (shape[a] != port.shape[a])
        bad("axis ", a, " is fixed: expected ", port.shape[a], ", got ", shape[a]);
    } else if (shape[a] < axis->least || shape[a] > axis->most ||
               shape[a] % axis->multiple_of != 0) {
      bad("axis ", a, " (", axis->name, "): expected a multiple of ", axis->multiple_of, " from ",
          axis->least, " to ", axis->most, ", got ", shape[a]);
    }
  }
  int64_t elements = 1;
  for (const int64_t size : shape) {
    if (elements > engine::kMaxElements / size)
      bad("expected at most ", engine::kMaxElements, " elements");
    elements *= size;
  }
  port.shape.assign(shape.begin(), shape.end());
  port.elements = elements;
  reshaped_ = true;
}

void Context::set_quality(size_t level) {
  const Use use(*this);
  if (level == level_) return;
  // Shapes that were set may not belong together yet: only the compiled size says what is missing.
  (void)model_->compiled(level);
  level_ = level;
  reshaped_ = true;
}

const Sized& Context::sized() {
  if (reshaped_) {
    sized_ = model_->for_inputs(sized_.inputs, level_);
    reshaped_ = false;
  }
  return sized_;
}

void Context::check_input(size_t k, int64_t batch, const adalayer_input& in) const {
  const Port& port = sized_.inputs[k];
  const auto bad = [&](const auto&... pieces) {
    fail<InvalidArgument>("input ", k, " ('", port.name, "'): ", pieces...);
  };
  if (port.ids && in.type != ADALAYER_INT32)
    bad("it is token ids: expected type ADALAYER_INT32, got ", in.type);
  if (!port.ids && in.type != ADALAYER_FLOAT32 && in.type != ADALAYER_UINT8)
    bad("expected type ADALAYER_FLOAT32 or ADALAYER_UINT8, got ", in.type);
  if (in.layout != ADALAYER_NCHW && in.layout != ADALAYER_NHWC)
    bad("expected layout ADALAYER_NCHW or ADALAYER_NHWC, got ", in.layout);
  if (in.layout == ADALAYER_NHWC && (port.ids || !model_->is_image(k)))
    bad("it is not an image of channels, height and width: expected layout ADALAYER_NCHW");
  const size_t bytes =
      bytes_of("input", k, batch, port.elements, in.type == ADALAYER_UINT8 ? 1 : 4);
  if (in.bytes != bytes)
    bad("expected ", bytes, " bytes for a batch of ", batch, ", got ", in.bytes);
  if (batch == 0) return;
  if (in.data == nullptr) bad("the data are null");
  if (in.type != ADALAYER_UINT8 && reinterpret_cast<uintptr_t>(in.data) % alignof(float) != 0)
    bad("the data are not aligned to 4 bytes");
  if (in.type == ADALAYER_UINT8 && tables_[k].empty())
    bad("u8 pixels need a mean and a std per channel, and the model has none for it; call "
        "adalayer_context_set_normalization");
}

/// Floats in an order that the engine takes: the caller's own memory, or converted ones.
engine::InputTensor Context::prepared(size_t k, int64_t batch, const adalayer_input& in) {
  const Port& port = sized_.inputs[k];
  bool any_order = true;
  for (size_t p = 0; p < model_->order().size(); ++p)
    if (model_->order()[p] == k) any_order = any_order && sized_.engine->any_order(p);
  const bool last = in.layout == ADALAYER_NHWC;
  const bool to_planes = last && !any_order;
  const Layout layout = last && any_order ? Layout::NHWC : Layout::NCHW;
  if (in.type != ADALAYER_UINT8 && !to_planes) return {in.data, layout};

  std::vector<float>& out = converted_[k];
  const auto total = static_cast<size_t>(batch * port.elements);
  if (out.size() < total) out.resize(total);
  const int64_t channels = port.shape.empty() ? 1 : port.shape[0];
  const int64_t plane = port.elements / channels;
  float* to = out.data();
  const auto convert = [&](const auto& value) {
    for (int64_t n = 0; n < batch; ++n, to += port.elements) {
      const int64_t first = n * port.elements;
      if (!last) {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t i = c * plane; i < (c + 1) * plane; ++i)
            to[i] = value(c, first + i);
        continue;
      }
      for (int64_t i = 0; i < plane; ++i)
        for (int64_t c = 0; c < channels; ++c)
          to[to_planes ? c * plane + i : i * channels + c] = value(c, first + i * channels + c);
    }
  };
  if (in.type == ADALAYER_FLOAT32) {
    const auto* x = static_cast<const float*>(in.data);
    convert([&](int64_t, int64_t at) { return x[at]; });
  } else {
    const auto* q = static_cast<const uint8_t*>(in.data);
    const float* table = tables_[k].data();
    convert([&](int64_t c, int64_t at) { return table[c * kLevels + q[at]]; });
  }
  return {out.data(), layout};
}

void Context::run(int64_t batch, std::span<const adalayer_input> inputs,
                  std::span<const adalayer_output> outputs) {
  const Use use(*this);
  const Model& model = *model_;
  if (batch < 0) fail<InvalidArgument>("expected a batch of 0 or more, got ", batch);
  if (inputs.size() != model.inputs().size())
    fail<InvalidArgument>("expected ", model.inputs().size(), " inputs, got ", inputs.size());
  const Sized& at = sized();
  if (outputs.size() != at.outputs.size())
    fail<InvalidArgument>("expected ", at.outputs.size(), " outputs, got ", outputs.size());
  for (size_t k = 0; k < inputs.size(); ++k)
    check_input(k, batch, inputs[k]);
  for (size_t k = 0; k < outputs.size(); ++k) {
    const OutputView& view = at.outputs[k];
    const size_t bytes = bytes_of("output", k, batch, view.elements, 4);
    if (outputs[k].bytes != bytes)
      fail<InvalidArgument>("output ", k, " ('", view.name, "'): expected ", bytes,
                            " bytes for a batch of ", batch, ", got ", outputs[k].bytes);
    if (batch > 0 && outputs[k].data == nullptr)
      fail<InvalidArgument>("output ", k, " ('", view.name, "'): the data are null");
    if (reinterpret_cast<uintptr_t>(outputs[k].data) % alignof(float) != 0)
      fail<InvalidArgument>("output ", k, " ('", view.name,
                            "'): the data are not aligned to 4 bytes");
  }
  if (batch == 0) return;

  for (size_t k = 0; k < inputs.size(); ++k)
    ports_[k] = prepared(k, batch, inputs[k]);
  for (size_t p = 0; p < program_inputs_.size(); ++p)
    program_inputs_[p] = ports_[model.order()[p]];
  // A result that some tensor shows as it is goes to the caller at once.
  std::fill(targets_.begin(), targets_.end(), nullptr);
  for (size_t k = 0; k < outputs.size(); ++k) {
    const OutputView& view = at.outputs[k];
    if (view.atoms.empty() && targets_[view.source] == nullptr)
      targets_[view.source] = outputs[k].data;
  }
  for (size_t r = 0; r < targets_.size(); ++r) {
    if (targets_[r] != nullptr) continue;
    const size_t total = bytes_of("result", r, batch, at.result_elements[r], 4) / 4;
    if (results_[r].size() < total) results_[r].resize(total);
    targets_[r] = results_[r].data();
  }
  at.engine->run(program_inputs_, batch, targets_, threads_);
  for (size_t k = 0; k < outputs.size(); ++k) {
    const OutputView& view = at.outputs[k];
    const float* from = targets_[view.source];
    if (from == outputs[k].data) continue;
    for (int64_t n = 0; n < batch; ++n) {
      const float* memory = from + n * view.elements;
      float* to = outputs[k].data + n * view.elements;
      if (view.atoms.empty())
        std::memcpy(to, memory, static_cast<size_t>(view.elements) * sizeof(float));
      else
        gather(view, memory, to);
    }
  }
}

}  // namespace adalayer::capi

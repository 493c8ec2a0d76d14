// adalayer.h for C++17: objects that free themselves, errors as exceptions. Header only; everything
// goes through the C interface, so that the library and the program may come from other compilers.
//
//   adalayer::Model model("model.ada");
//   adalayer::Context context(model);
//   std::vector<float> scores = context.run(1, image);  // image: std::vector<float>
#ifndef ADALAYER_ADALAYER_HPP_
#define ADALAYER_ADALAYER_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "adalayer/adalayer.h"

namespace adalayer {

/// A call that failed: the library's sentence, and what kind of failure it was.
class Failure : public std::runtime_error {
 public:
  explicit Failure(adalayer_status status)
      : std::runtime_error(adalayer_last_error()), status_(status) {}
  adalayer_status status() const noexcept { return status_; }

 private:
  adalayer_status status_;
};

/// One input or output, without the batch axis.
struct TensorInfo {
  std::string name;
  std::vector<std::int64_t> shape;
  std::size_t elements = 0;
  adalayer_type type = ADALAYER_FLOAT32;  // ADALAYER_INT32: an input of token ids
};

namespace detail {
inline void check(adalayer_status status) {
  if (status != ADALAYER_OK) throw Failure(status);
}
/// Of a model or a context.
template <class Of, class Function>
TensorInfo info_of(Of* of, std::size_t index, Function function) {
  adalayer_tensor_info c = {};
  c.struct_size = sizeof c;
  check(function(of, index, &c));
  return {c.name, std::vector<std::int64_t>(c.shape, c.shape + c.rank),
          static_cast<std::size_t>(c.elements), c.type};
}
}  // namespace detail

/// The sizes that an axis may have; a fixed one has no name.
struct AxisInfo {
  std::string name;  // axes of one name have one size
  std::int64_t least = 1, most = 1, multiple_of = 1;
};

/// A network. Copies share it; safe to use from many threads.
class Model {
 public:
  /// See adalayer_load_options; 0 for the default limit. Throws Failure.
  explicit Model(const std::string& path, std::uint64_t memory_limit = 0,
                 adalayer_weights weights = ADALAYER_WEIGHTS_MEASURED) {
    const adalayer_load_options options = options_of(memory_limit, weights);
    adalayer_model* model = nullptr;
    detail::check(adalayer_model_load(path.c_str(), &options, &model));
    own(model);
  }
  /// The bytes of an .ada file.
  Model(const void* bytes, std::size_t size, std::uint64_t memory_limit = 0,
        adalayer_weights weights = ADALAYER_WEIGHTS_MEASURED) {
    const adalayer_load_options options = options_of(memory_limit, weights);
    adalayer_model* model = nullptr;
    detail::check(adalayer_model_load_memory(bytes, size, &options, &model));
    own(model);
  }

  std::size_t input_count() const { return adalayer_model_input_count(get()); }
  std::size_t output_count() const { return adalayer_model_output_count(get()); }
  TensorInfo input(std::size_t index = 0) const { return info(index, &adalayer_model_input_info); }
  TensorInfo output(std::size_t index = 0) const {
    return info(index, &adalayer_model_output_info);
  }

  /// Of an axis of input(index).shape.
  AxisInfo sizes(std::size_t index, std::size_t axis) const {
    adalayer_axis_info c = {};
    c.struct_size = sizeof c;
    detail::check(adalayer_model_input_sizes(get(), index, axis, &c));
    return {c.name, c.least, c.most, c.multiple_of};
  }

  /// Levels of quality, 1 or more; see Context::set_quality().
  std::size_t quality_count() const { return adalayer_model_quality_count(get()); }

  /// Names of the classes, or an empty list.
  std::vector<std::string> class_names() const {
    std::vector<std::string> names;
    for (std::size_t k = 0; k < adalayer_model_class_count(get()); ++k)
      names.emplace_back(adalayer_model_class_name(get(), k));
    return names;
  }
  /// A text of the file, for instance "preprocessing"; empty if there is none.
  std::string metadata(const std::string& key) const {
    const char* text = adalayer_model_metadata(get(), key.c_str());
    return text == nullptr ? std::string() : std::string(text);
  }
  std::uint64_t weight_bytes() const { return adalayer_model_weight_bytes(get()); }

  adalayer_model* get() const { return model_.get(); }

 private:
  static adalayer_load_options options_of(std::uint64_t memory_limit, adalayer_weights weights) {
    adalayer_load_options options = {};
    options.struct_size = sizeof options;
    options.memory_limit = memory_limit;
    options.weights = weights;
    return options;
  }
  void own(adalayer_model* model) { model_.reset(model, &adalayer_model_free); }

  template <class Function>
  TensorInfo info(std::size_t index, Function function) const {
    return detail::info_of(get(), index, function);
  }

  std::shared_ptr<adalayer_model> model_;
};

/// One thread's use of a model, which it keeps alive.
class Context {
 public:
  explicit Context(const Model& model) : model_(model) {
    adalayer_context* context = nullptr;
    detail::check(adalayer_context_create(model.get(), &context));
    context_.reset(context);
  }

  const Model& model() const { return model_; }

  /// Threads of a run; 0 for one per CPU. Throws Failure.
  void set_threads(int threads) {
    detail::check(adalayer_context_set_threads(context_.get(), threads));
  }
  /// How u8 pixels become numbers: (q / 255 - mean[c]) / std[c]. Throws Failure.
  void set_normalization(const std::vector<float>& mean, const std::vector<float>& std,
                         std::size_t input = 0) {
    if (mean.size() != std.size())
      throw std::invalid_argument("adalayer: expected as many numbers in std as in mean");
    detail::check(adalayer_context_set_normalization(context_.get(), input, mean.data(), std.data(),
                                                     mean.size()));
  }

  /// The shape of an input in the runs to come, without the batch; see Model::sizes(). Throws
  /// Failure.
  void set_shape(const std::vector<std::int64_t>& shape, std::size_t input = 0) {
    detail::check(adalayer_context_set_shape(context_.get(), input, shape.data(), shape.size()));
  }
  /// The quality of the runs to come; 0 is the best. Throws Failure.
  void set_quality(std::size_t level) {
    detail::check(adalayer_context_set_quality(context_.get(), level));
  }
  /// At the shapes that were set.
  TensorInfo input(std::size_t index = 0) const {
    return detail::info_of(context_.get(), index, &adalayer_context_input_info);
  }
  TensorInfo output(std::size_t index = 0) const {
    return detail::info_of(context_.get(), index, &adalayer_context_output_info);
  }

  /// Of a network with one input and one output: batch x elements floats in and out. Throws
  /// Failure.
  std::vector<float> run(std::int64_t batch, const std::vector<float>& input,
                         adalayer_layout layout = ADALAYER_NCHW) {
    return run_one(batch, {input.data(), input.size() * sizeof(float), ADALAYER_FLOAT32, layout});
  }
  /// The same of u8 pixels, which are normalized.
  std::vector<float> run(std::int64_t batch, const std::vector<std::uint8_t>& pixels,
                         adalayer_layout layout = ADALAYER_NHWC) {
    return run_one(batch, {pixels.data(), pixels.size(), ADALAYER_UINT8, layout});
  }
  /// The same of token ids.
  std::vector<float> run(std::int64_t batch, const std::vector<std::int32_t>& ids) {
    return run_one(batch, {ids.data(), ids.size() * 4, ADALAYER_INT32, ADALAYER_NCHW});
  }
  /// Any number of inputs and outputs, in memory of the caller's.
  void run(std::int64_t batch, const std::vector<adalayer_input>& inputs,
           const std::vector<adalayer_output>& outputs) {
    detail::check(adalayer_run(context_.get(), batch, inputs.data(), inputs.size(), outputs.data(),
                               outputs.size()));
  }

 private:
  std::vector<float> run_one(std::int64_t batch, const adalayer_input& input) {
    const std::size_t images = batch < 0 ? 0 : static_cast<std::size_t>(batch);
    std::vector<float> out(images * output().elements);
    const adalayer_output output = {out.data(), out.size() * sizeof(float)};
    detail::check(adalayer_run(context_.get(), batch, &input, 1, &output, 1));
    return out;
  }

  struct Free {
    void operator()(adalayer_context* context) const { adalayer_context_free(context); }
  };
  Model model_;
  std::unique_ptr<adalayer_context, Free> context_;
};

}  // namespace adalayer

#endif  // ADALAYER_ADALAYER_HPP_

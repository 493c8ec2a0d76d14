// A model as the C interface shows it: the engine, and what the file's texts say about the tensors
// around it (docs/ada-format.md, "META").
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/leveled_engine.hpp"

namespace adalayer::capi {

constexpr size_t kMaxRank = 8;
constexpr size_t kMaxAtoms = 32;

/// One input of the network, without the batch axis.
struct Port {
  std::string name;
  std::vector<int64_t> shape;
  int64_t elements = 1;
  bool ids = false;  // int32 token ids
};

/// One tensor of the network's result: a view of what the program writes.
struct OutputView {
  std::string name;
  std::vector<int64_t> shape;
  int64_t elements = 1;
  size_t source = 0;  // which of the program's outputs
  size_t entry = 0;   // of "adalayer.outputs"
  // Sizes and strides that give the tensor its order; empty if it is that of memory.
  std::vector<std::pair<int64_t, int64_t>> atoms;
};

/// An image whose pixels are scaled to 0 .. 1 becomes (x - mean[c]) / std[c].
struct Normalization {
  std::vector<float> mean, std;
};

/// A model at one size of its inputs and one level of quality.
struct Sized {
  std::shared_ptr<const engine::Engine> engine;
  std::vector<Port> inputs;
  std::vector<OutputView> outputs;
  std::vector<int64_t> result_elements;  // of the program's outputs
};

class Model {
 public:
  /// Throws CorruptData if the texts do not describe the program, LimitExceeded, and what Engine
  /// throws.
  Model(engine::Program program, const engine::EngineOptions& options);

  /// At the size that was compiled, and the best quality.
  const engine::Engine& engine() const { return *engine_.best()->compiled(); }
  const std::vector<Port>& inputs() const { return inputs_; }
  const std::vector<OutputView>& outputs() const { return outputs_; }
  const engine::SizeRules& rules() const { return engine_.best()->rules(); }
  /// Levels of quality, 1 or more.
  size_t levels() const { return engine_.levels(); }
  /// Which of the rules' axes an axis of an input's shape is; null where its size is fixed.
  const engine::SizeAxis* axis(size_t input, size_t axis) const;
  Sized compiled(size_t level = 0) const;
  /// For inputs of these shapes, at a level. Throws InvalidArgument where the model does not take
  /// them, or has no such level.
  Sized for_inputs(std::vector<Port> inputs, size_t level) const;
  /// Which of inputs() the program's input k is.
  const std::vector<size_t>& order() const { return order_; }
  /// Elements of the program's output k.
  const std::vector<int64_t>& result_elements() const { return result_elements_; }
  /// Whether input k is an image of the program as it is, so that NHWC has a meaning.
  bool is_image(size_t input) const;
  const std::vector<std::string>& class_names() const { return class_names_; }
  /// What the preprocessing says about images of so many channels; none without preprocessing, or
  /// if it is about another number of channels.
  std::optional<Normalization> normalization(int64_t channels) const;

 private:
  void describe_inputs();
  void describe_outputs();
  void read_preprocessing();
  void check_rules() const;
  const std::string* text(const char* key) const;

  engine::LeveledEngine engine_;
  std::vector<Port> inputs_;
  std::vector<size_t> order_;
  std::vector<OutputView> outputs_;
  std::vector<int64_t> result_elements_;
  std::vector<std::string> class_names_;
  bool has_preprocessing_ = false;
  std::vector<float> mean_, std_;  // one number for all channels, or one for each
};

}  // namespace adalayer::capi

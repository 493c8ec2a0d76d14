// One thread's use of a model.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "adalayer/adalayer.h"
#include "capi/model.hpp"

namespace adalayer::capi {

class Context {
 public:
  explicit Context(std::shared_ptr<const Model> model);

  /// Each throws InvalidArgument for wrong arguments, and if another call is running.
  void set_threads(int threads);
  void set_normalization(size_t input, std::span<const float> mean, std::span<const float> std);
  /// Of the runs to come. Throws for a shape that the model does not take.
  void set_shape(size_t input, std::span<const int64_t> shape);
  /// Of the runs to come; makes the level ready where it is not. Throws for one that does not
  /// exist.
  void set_quality(size_t level);
  void run(int64_t batch, std::span<const adalayer_input> inputs,
           std::span<const adalayer_output> outputs);
  /// For `read`, the tensors of the runs to come.
  template <class Read>
  void describe(const Read& read) {
    const Use use(*this);
    read(sized());
  }

 private:
  /// Marks the context as in use; one that is already is the caller's mistake.
  class Use {
   public:
    explicit Use(Context& context);
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    ~Use() { context_.busy_.store(false, std::memory_order_release); }

   private:
    Context& context_;
  };

  /// At the shapes and the quality that were set.
  const Sized& sized();
  void check_input(size_t k, int64_t batch, const adalayer_input& in) const;
  engine::InputTensor prepared(size_t k, int64_t batch, const adalayer_input& in);

  std::shared_ptr<const Model> model_;
  Sized sized_;
  bool reshaped_ = false;  // since sized_ was made, but for its inputs and the level
  size_t level_ = 0;
  int threads_ = 0;
  std::vector<std::vector<float>> tables_;     // [inputs] 256 numbers per channel, or empty
  std::vector<std::vector<float>> converted_;  // [inputs] scratch
  std::vector<std::vector<float>> results_;    // [outputs of the program] scratch
  std::vector<engine::InputTensor> ports_, program_inputs_;
  std::vector<float*> targets_;
  std::atomic<bool> busy_{false};
};

}  // namespace adalayer::capi

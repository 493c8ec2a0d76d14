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
  void run(int64_t batch, std::span<const adalayer_input> inputs,
           std::span<const adalayer_output> outputs);

 private:
  class Use;

  void check_input(size_t k, int64_t batch, const adalayer_input& in) const;
  engine::InputTensor prepared(size_t k, int64_t batch, const adalayer_input& in);

  std::shared_ptr<const Model> model_;
  int threads_ = 0;
  std::vector<std::vector<float>> tables_;     // [inputs] 256 numbers per channel, or empty
  std::vector<std::vector<float>> converted_;  // [inputs] scratch
  std::vector<std::vector<float>> results_;    // [outputs of the program] scratch
  std::vector<engine::InputTensor> ports_, program_inputs_;
  std::vector<float*> targets_;
  std::atomic<bool> busy_{false};
};

}  // namespace adalayer::capi

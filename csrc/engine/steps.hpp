// The operations of a program, ready to run: one Step per node.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "cpu/conv/linear.hpp"
#include "cpu/conv/recurrence.hpp"
#include "cpu/image/float_conv.hpp"
#include "engine/conv_step.hpp"
#include "engine/engine.hpp"
#include "engine/layouts.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

/// Where every tensor of one run is. Values at the program's boundary are the caller's memory.
struct Frame {
  const Program* program = nullptr;
  const std::vector<ValueLayout>* layouts = nullptr;
  const cpu::KernelRow* kernels = nullptr;
  std::vector<uint8_t*> data;  // [values] first image of the frame
  std::vector<Layout> order;   // [values] of float program inputs
  int64_t images = 0;

  const cpu::ImageLayout& layout(int32_t v) const { return (*layouts)[v].layout; }
  cpu::ImageView image(int32_t v, int64_t n) const {
    return {&layout(v), data[v] + n * layout(v).image_bytes};
  }
  float* floats(int32_t v, int64_t n) const {
    const Value& value = program->values[v];
    return reinterpret_cast<float*>(data[v]) + n * value.c * value.h * value.w;
  }
  const int32_t* ids(int32_t v, int64_t n) const {
    return reinterpret_cast<const int32_t*>(floats(v, n));
  }
};

struct Step {
  const Node* node = nullptr;
  std::unique_ptr<ConvStep> conv;               // or
  std::unique_ptr<cpu::FloatConv> floats;       // or
  std::unique_ptr<cpu::Recurrence> recurrence;  // or
  std::unique_ptr<cpu::Linear> linear;          // or
  std::function<void(const Frame&, int64_t image, cpu::Part)> run_image;
  int64_t max_parts = 1;

  /// Of weights as this machine holds them.
  size_t derived_bytes() const {
    return conv         ? conv->derived_bytes()
           : floats     ? floats->bytes()
           : recurrence ? recurrence->bytes()
           : linear     ? linear->bytes()
                        : 0;
  }
};

/// `room`: ConvTask.
std::vector<Step> build_steps(const Program& program, const std::vector<ValueLayout>& layouts,
                              cpu::Room room);

/// Of a program for another image size than that of `like`, with the weights of those steps, which
/// are settled. A convolution whose weights lie otherwise for this size gets its own: settle() has
/// not been called for it.
struct SharedSteps {
  std::vector<Step> steps;
  std::vector<size_t> own;  // convolutions with weights of their own
};
SharedSteps build_steps(const Program& program, const std::vector<ValueLayout>& layouts,
                        const std::vector<Step>& like);

}  // namespace adalayer::engine

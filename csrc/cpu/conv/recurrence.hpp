// A recurrent layer on the active instruction set: a matrix times a vector of levels for every
// step, whose weights are read as they are packed, and then the cells in float
// (reference/recurrence.hpp).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/image/layout.hpp"
#include "cpu/kernel_table.hpp"
#include "reference/recurrence.hpp"

namespace adalayer::cpu {

/// Where the tensors of one call are.
struct RecurrenceJob {
  int64_t images = 0;
  StepFloats products;           // what the inputs contribute; only read
  const float* state = nullptr;  // [images][hidden] before the first step, or null for zeros
  const float* cell = nullptr;   // likewise
  StepFloats reals;              // the result: either floats
  ImageView levels;              // or the first image's levels; positions are steps
};

/// Immutable; its weights are shared with those of the same layer for other numbers of steps.
class Recurrence {
 public:
  /// weights: [gates * hidden][hidden] of so many bits. What `spec` points to must outlive it.
  Recurrence(const RecurrenceSpec& spec, std::span<const int8_t> weights, int bits);
  /// The same layer for as many steps as `spec` has.
  Recurrence(const Recurrence& like, const RecurrenceSpec& spec) : Recurrence(like) {
    spec_ = spec;
  }

  const RecurrenceSpec& spec() const { return spec_; }
  int bits() const { return bits_; }
  /// Of the weights as this machine holds them.
  size_t bytes() const { return weights_->size() + correction_->size() * 4; }

  /// Images [part.first(images), part.last(images)).
  void run(const RecurrenceJob& job, Part part) const;

 private:
  struct Memory;  // of a thread, while it runs a few images

  void start(const RecurrenceJob& job, int64_t image, int row, const Memory& m) const;
  void run_few(const RecurrenceJob& job, int64_t first, int rows) const;
  void multiply(const Memory& m, int rows) const;
  void multiply_arranged(const Memory& m, const int64_t* offsets, int rows) const;
  void write(const RecurrenceJob& job, int64_t image, int64_t t, const float* state,
             const float* cell, const uint8_t* levels) const;

  RecurrenceSpec spec_;
  int bits_;
  int64_t depth_, columns_;  // tiles of 64 units and of 16 outputs
  Gemv gemv_ = nullptr;      // null without vector kernels; weights are whole numbers then
  const KernelRow* arranged_ = nullptr;  // whose gemm reads the weights, in an order of its own
  std::shared_ptr<const AlignedBuffer> weights_;
  std::shared_ptr<const std::vector<int32_t>> correction_;  // [columns * 16]
};

/// Bytes that a Recurrence will hold, and a thread's scratch memory while it runs.
double recurrence_bytes(int64_t outputs, int64_t hidden);
double recurrence_scratch(const RecurrenceSpec& spec);

}  // namespace adalayer::cpu

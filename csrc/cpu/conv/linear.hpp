// Linear layers with a scale per group of input channels: products of each group in whole numbers,
// which are then added up in float (reference/linear.hpp).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/image/layout.hpp"
#include "cpu/kernel_table.hpp"
#include "reference/linear.hpp"

namespace adalayer::cpu {

/// Where the tensors of one call are: of images whose positions are the rows.
struct LinearJob {
  int64_t images = 0, positions = 1;
  ConstImageView levels;  // either the first image's levels
  StepFloats reals;       // or floats side by side, which go onto a grid; the inverse of its step:
  float inv_scale = 1.0f;
  ImageView level_out;  // either levels
  StepFloats real_out;  // or floats

  int64_t rows() const { return images * positions; }
};

/// Immutable; copies share weights and scales.
class Linear {
 public:
  /// weights: [outputs][inputs] of so many bits. What `spec` points to must outlive it, but for the
  /// scales, which are copied in an order of their own.
  Linear(const LinearSpec& spec, std::span<const int8_t> weights, int bits);
  /// The same weights, and, unless these are others, scales.
  Linear(const Linear& like, const LinearSpec& spec, bool other_scales);

  const LinearSpec& spec() const { return spec_; }
  /// Of the weights as this machine holds them.
  size_t bytes() const { return weights_->size() + 4 * (totals_->size() + scales_->size()); }

  /// A share of the rows, or of the outputs where rows are few.
  void run(const LinearJob& job, Part part) const;

 private:
  struct Memory;  // of a thread, while it runs a few rows
  struct Chunk;   // these rows
  struct Columns {
    int64_t first, last;  // tiles
  };

  void set_scales();
  int64_t stage(const LinearJob& job, int64_t row, int64_t end, Chunk& chunk,
                const Memory& m) const;
  void run_pairs(const LinearJob& job, const Chunk& chunk, Columns columns, const Memory& m) const;
  void run_few(const LinearJob& job, const Chunk& chunk, Columns columns, const Memory& m) const;
  void run_scalar(const LinearJob& job, const Chunk& chunk, Columns columns, const Memory& m) const;
  void multiply(const Chunk& chunk, int64_t group, int64_t column, int count,
                const Memory& m) const;
  void begin(int rows, int64_t column, int64_t width, float* reals, int64_t real_row) const;
  void add(const Chunk& chunk, int64_t group, int64_t column, int64_t width, const int32_t* sums,
           int64_t sum_row, float* reals, int64_t real_row) const;
  void write(const LinearJob& job, const Chunk& chunk, int64_t column, int64_t width, float* reals,
             int64_t real_row) const;
  const uint8_t* tiles(int64_t group, int64_t column) const;

  LinearSpec spec_;
  int bits_;
  int64_t depth_, columns_;             // tiles in depth of a whole group, and of 16 outputs
  int64_t column_bytes_ = 0;            // of a whole group
  const KernelRow* kernels_ = nullptr;  // null: weights are whole numbers, [outputs][inputs]
  const TileArrangement* arrangement_ = nullptr;
  std::shared_ptr<const AlignedBuffer> weights_;        // [group][column][depth]
  std::shared_ptr<const std::vector<int32_t>> totals_;  // [group][columns * 16]
  std::shared_ptr<const std::vector<float>> scales_;    // likewise
};

/// Bytes that a Linear will hold, and a thread's scratch memory while it runs.
double linear_bytes(const LinearSpec& spec);
double linear_scratch(const LinearSpec& spec);

}  // namespace adalayer::cpu

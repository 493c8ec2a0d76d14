// How one convolution runs on the device, and its weights in that form.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/params.hpp"
#include "engine/program.hpp"

namespace adalayer::cuda {

/// Grows the image of constants; pieces are aligned to 128 bytes.
class ImageBuilder {
 public:
  int64_t add(const void* data, size_t bytes);
  template <class T>
  int64_t add(const std::vector<T>& v) {
    return add(v.data(), v.size() * sizeof(T));
  }
  std::vector<uint8_t> take() { return std::move(bytes_); }

 private:
  std::vector<uint8_t> bytes_;
};

/// One product of a convolution: all of it, or one output phase of a transposed one. Offsets are
/// into the image.
struct ProductPlan {
  int64_t weights = 0, pieces = 0, channels = 0, zero_page = 0;
  int64_t group_weight_bytes = 0;
  int bits = 8, piece = 16, shift = 0;
  int32_t groups = 1, group_in_bytes = 0, group_out = 0, cells = 0;
  int32_t plane_h = 0, plane_w = 0;  // positions of one image
  // The input as the product sees it (a kernel as large as the image makes it one long pixel).
  int32_t in_h = 0, in_w = 0, in_row_bytes = 0, in_pixel_bytes = 0;
  int32_t stride_y = 1, stride_x = 1;
  std::vector<int16_t> tap_y, tap_x;
  int32_t steps = 0, depth = 0;
  int32_t step_y = 1, step_x = 1, phase_y = 0, phase_x = 0;
  bool vector_store = false;

  // Other forms of the same weights, where their zeros allow them.
  struct Blocks {
    bool there = false;
    int64_t first_steps = 0, step_cells = 0, pieces = 0, weights = 0;
    int64_t steps = 0, longest = 0;  // of all blocks of 64 channels together; of the longest one
    int64_t stored_cells = 0;
  } blocks;
  int64_t structured = -1, structured_group_bytes = 0;
};

enum class ConvKind { Products, Depthwise, Direct };

struct ConvPlan {
  ConvKind kind = ConvKind::Direct;
  int bits = 0;
  std::vector<ProductPlan> products;
  int64_t weights = 0, channels = 0;  // Depthwise, Direct
  int64_t weight_bytes = 0;           // of all packed forms
  const char* name() const;
};

/// What a convolution looks like to the kernels, wherever it comes from.
struct ConvSource {
  int32_t in_c = 0, in_h = 0, in_w = 0, out_c = 0, out_h = 0, out_w = 0;
  int32_t input_zero_point = 0;
  engine::ConvAttributes a{};
  bool transposed = false;
  const std::vector<uint8_t>* packed = nullptr;  // canonical
  const float* scale = nullptr;
  const float* bias = nullptr;
};

/// Chooses the kind and packs the weights into `image`. Throws CorruptData for damaged weights.
ConvPlan plan_conv(const ConvSource& source, ImageBuilder& image);

}  // namespace adalayer::cuda

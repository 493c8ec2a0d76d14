// What is prepared of a program whatever its batch, between model.cpp and the launches.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/conv_plan.hpp"
#include "cuda/params.hpp"
#include "cuda/plan.hpp"
#include "engine/memory.hpp"

namespace adalayer::cuda {

// Sums of shared tiles: more than this would not stay in the second-level cache.
constexpr int64_t kMostScratch = 32 << 20;
constexpr int64_t kCounterBytes = 1 << 16;  // at the beginning of the scratch memory

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Bytes of a value of one image.
inline int64_t device_bytes(const engine::Value& v) {
  return v.kind == engine::ValueKind::F32 ? v.c * v.h * v.w * 4 : device_pitch(v.c) * v.h * v.w;
}

inline ImageSize image_size(const engine::Value& v) {
  return {static_cast<int32_t>(v.c), static_cast<int32_t>(v.h), static_cast<int32_t>(v.w),
          static_cast<int32_t>(device_pitch(v.c))};
}

/// What nodes need besides the weights of convolutions: offsets into the image, -1 for nothing.
struct NodeData {
  ConvPlan conv;
  std::vector<int64_t> constants;  // in the order of the node's constants
};

struct Model::Prepared {
  std::vector<NodeData> nodes;
  std::vector<engine::Lifetime> lifetimes;   // of one image
  std::vector<int> input_port, output_port;  // [values]
};

}  // namespace adalayer::cuda

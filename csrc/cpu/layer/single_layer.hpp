// Convolution and linear of a single layer on the active instruction set: tensors in, tensors out.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/conv/algorithm.hpp"
#include "formats/canonical.hpp"
#include "reference/attention.hpp"
#include "reference/float_conv.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

/// Weights of one layer in the form that one instruction set wants, immutable and shared by calls.
struct LayerWeights {
  formats::CanonicalHeader header;
  Isa isa = Isa::Scalar;
  int qmax = 255;             // largest level of the inputs that they are for
  std::vector<int32_t> sums;  // [O] of each channel's weights, for the zero-point correction
  // Either
  std::vector<int8_t> dense;  // scalar reference: [O][I/groups][KH][KW]
  // or what an algorithm made of them:
  const ConvAlgorithm* algorithm = nullptr;
  std::shared_ptr<ConvWeights> form;
  AlignedBuffer packed;

  size_t bytes() const {
    return sums.size() * 4 + dense.size() + packed.size() +
           static_cast<size_t>(form == nullptr ? 0 : form->own_bytes());
  }
};

/// Derives the weights of `shape` for the active instruction set, and for inputs whose levels are
/// 0 .. qmax, from canonical bytes, in the form that a trial with an image of this size finds to be
/// the fastest. Throws CorruptData for damaged bytes, InvalidArgument where they are of another
/// shape.
LayerWeights derive_weights(const ConvShape& shape, std::span<const uint8_t> canonical,
                            int qmax = 255);

/// The same through a process-wide cache keyed by the canonical content hash, so that operators can
/// take the canonical bytes on every call. The form is chosen once for each of the first
/// kMostSizes image sizes of a layer; others have that of the size with the most similar number of
/// outputs. Sizes that choose the same form share it. Least recently used layers leave above the
/// limit.
constexpr size_t kMostSizes = 8;
std::shared_ptr<const LayerWeights> cached_weights(const ConvShape& shape,
                                                   std::span<const uint8_t> canonical,
                                                   int qmax = 255);
struct CacheInfo {
  size_t entries, bytes, limit;
};
CacheInfo weight_cache_info();
void set_weight_cache_limit(size_t bytes);
void clear_weight_cache();

/// No level of the input is larger: floats are put on its grid; levels come as they are, and may be
/// beyond it.
inline int largest_level(const ActivationIn& in) {
  return in.dtype == DType::U8 ? 255 : in.grid.qmax;
}

/// Runs one convolution of a shape that passes validate(), with weights for largest_level() or
/// more. Bit-equal to reference::conv2d whatever the instruction set and threads.
void conv2d(const ConvShape& shape, const ActivationIn& in, const LayerWeights& weights,
            const OutputSpec& out, int threads);

void quantize(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q, int threads);
void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y,
                   int threads);

/// y[i] = fma(a[i], b[i], c[i])
void fma_values(const float* a, const float* b, const float* c, int64_t n, float* y, int threads);
/// float_function() of n floats.
void function_values(const FloatFunctionSpec& spec, const float* x, int64_t n, float* y,
                     int threads);
/// Softmax over the channels of images [channels][positions] (reference/image_spec.hpp).
void softmax(const float* x, int64_t images, int64_t channels, int64_t positions, float* y,
             int threads);
/// Attention over levels [images][tokens][channels], every image one sequence; the mask's
/// `mask_sequence` is from image to image. y is [images][queries][heads * width].
void attention(const AttentionShape& shape, const AttentionSpec& spec, int64_t images,
               const uint8_t* q, const uint8_t* k, const uint8_t* v, float* y, int threads);
/// A norm of floats [images][channels][plane]: a group norm, or with no groups one of the channels
/// at every position.
void float_norm(const GroupNormSpec& spec, const float* x, int64_t images, int64_t channels,
                int64_t plane, float* y, int threads);
/// A convolution in float32, NCHW in and out.
void float_conv(const FloatConvSpec& spec, const float* x, int64_t images, float* y, int threads);

}  // namespace adalayer::cpu

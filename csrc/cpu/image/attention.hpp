// Attention over images of levels, on the active instruction set (reference/attention.hpp). Callers
// hold a KernelScope: products may run in the row's tile unit.
#pragma once

#include "cpu/image/layout.hpp"
#include "reference/attention.hpp"

namespace adalayer::cpu {

/// Parts that a call can be cut into.
int64_t attention_parts(const AttentionShape& shape);
/// Bytes of scratch memory that a thread needs.
double attention_scratch(const AttentionShape& shape);

/// One image. Token t of sequence s is pixel (s, t) where rows are sequences (shape.sequences > 1),
/// else the t-th pixel in the order of rows.
void attention(const AttentionShape& shape, const AttentionSpec& spec, ConstImageView q,
               ConstImageView k, ConstImageView v, ImageView out, Part part);

/// Floats of [sequences * queries] tokens with [heads * width] channels each, elements apart.
struct FloatTokens {
  float* data;
  int64_t token, channel;
};
/// The same with real values as its result.
void attention_f32(const AttentionShape& shape, const AttentionSpec& spec, ConstImageView q,
                   ConstImageView k, ConstImageView v, const FloatTokens& out, Part part);

}  // namespace adalayer::cpu

// The engine's operations between convolutions, over one image, on the active instruction set.
// Formulas: reference/image_spec.hpp. Each call does one part of the output (Part) and leaves the
// output's padding alone. Bytes between channels and pitch of an output pixel may be overwritten,
// except by copy_channels. lookup, add, mul and affine may run in place: `out` may be `in` or `a`.
#pragma once

#include "cpu/image/layout.hpp"
#include "reference/image_spec.hpp"

namespace adalayer::cpu {

/// Float input to levels; x is one image, NCHW or NHWC.
void quantize_image(const float* x, Layout order, const ActivationGrid& grid, ImageView out,
                    Part part);
/// Levels to floats, NCHW.
void dequantize_image(ConstImageView in, float scale, int32_t zero_point, float* out, Part part);

void lookup(const uint8_t* table, ConstImageView in, ImageView out, Part part);
/// b has a's shape, or is 1 x 1 with a's channels.
void add(const PairSpec& spec, ConstImageView a, ConstImageView b, ImageView out, Part part);
void mul(const PairSpec& spec, ConstImageView a, ConstImageView b, ImageView out, Part part);
void affine(const AffineSpec& spec, ConstImageView in, ImageView out, Part part);
/// `largest`: affine_image_bound() of the spec.
void affine_image(const AffineImageSpec& spec, double largest, ConstImageView in, ImageView out,
                  Part part);
/// What no absolute value of a result exceeds, for an image of this size.
double affine_image_bound(const AffineImageSpec& spec, int64_t channels, int64_t elements);
/// The image whose levels these are, in the order rows, columns, channels.
void constant(const uint8_t* levels, ImageView out, Part part);
/// One piece of a concatenation: `in` becomes channels [channel, channel + in channels) of `out`,
/// through the table if there is one.
void copy_channels(ConstImageView in, const uint8_t* table, ImageView out, int64_t channel,
                   Part part);
/// One piece of an image that is joined along an axis (1 = h, 2 = w): `in` begins at row or column
/// `begin` of `out`. The part is one of the whole output.
void copy_piece(ConstImageView in, const uint8_t* table, ImageView out, int64_t axis, int64_t begin,
                Part part);
void max_pool(const PoolSpec& spec, ConstImageView in, ImageView out, Part part);
void avg_pool(const PoolSpec& spec, ConstImageView in, ImageView out, Part part);
/// Window sizes follow from the shapes; of the spec, zero_in, ratio and finish are used.
void adaptive_avg_pool(const PoolSpec& spec, ConstImageView in, ImageView out, Part part);
void slice(int64_t axis, int64_t begin, int64_t step, ConstImageView in, ImageView out, Part part);
void gather_channels(const int32_t* index, ConstImageView in, ImageView out, Part part);
void pad(int64_t top, int64_t left, uint8_t level, ConstImageView in, ImageView out, Part part);
void resize(const ResizeSpec& spec, ConstImageView in, ImageView out, Part part);
void layer_norm(const LayerNormSpec& spec, ConstImageView in, ImageView out, Part part);
void group_norm(const GroupNormSpec& spec, ConstImageView in, ImageView out, Part part);
/// The same with floats as their result, NCHW.
void layer_norm_f32(const LayerNormSpec& spec, ConstImageView in, float* out, Part part);
void group_norm_f32(const GroupNormSpec& spec, ConstImageView in, float* out, Part part);
/// ids[y * w + x] for every pixel. An id that is no row reads another row, but nothing outside:
/// callers check ids, in memory that somebody else may write to meanwhile.
void embedding(const EmbeddingSpec& spec, const int32_t* ids, ImageView out, Part part);
/// Between c x h x w and its features in NCHW order; either side may be the flat one.
void reshape(ConstImageView in, ImageView out, Part part);

/// Any order: output element (c, y, x) is an element of the input, by its number in NCHW order.
void rearrange(const RearrangeSpec& spec, ConstImageView in, ImageView out, Part part);

/// Over floats, contiguous NCHW images.
void layer_norm_floats(const LayerNormSpec& spec, const float* in, int64_t channels, int64_t plane,
                       float* out, Part part);
void group_norm_floats(const GroupNormSpec& spec, const float* in, int64_t channels, int64_t plane,
                       float* out, Part part);
void affine_f32(const AffineSpec& spec, const float* in, int64_t channels, int64_t positions,
                float* out, Part part);
void rearrange_f32(const RearrangeSpec& spec, const float* in, float* out, int64_t c, int64_t h,
                   int64_t w, Part part);
void resize_f32(const ResizeSpec& spec, const float* in, int64_t c, int64_t in_h, int64_t in_w,
                float* out, int64_t out_h, int64_t out_w, Part part);
void softmax_f32(const float* in, int64_t channels, int64_t positions, float* out, Part part);
void function_f32(const FloatFunctionSpec& spec, const float* in, int64_t count, float* out,
                  Part part);

/// Two images of floats, which have the result's size along each axis or 1, as lines of `size[2]`.
struct CombinedFloats {
  /// Sizes are c, h, w.
  CombinedFloats(FloatPair by, const int64_t (&a)[3], const int64_t (&b)[3],
                 const int64_t (&result)[3]);

  FloatPair pair;
  int64_t size[3] = {1, 1, 1};
  int64_t step_a[3] = {}, step_b[3] = {};  // 0 along an axis that an operand is repeated on
};
void combine_f32(const CombinedFloats& spec, const float* a, const float* b, float* out, Part part);
/// One piece of floats that are joined: `rows` runs of `length` floats, the first of them `begin`
/// behind `out`, and `pitch` from one to the next. The part is one of the piece.
void copy_piece_f32(const float* in, int64_t rows, int64_t length, float* out, int64_t pitch,
                    int64_t begin, Part part);

/// One float of all values along some axes, NCHW.
void reduce(const ReduceSpec& spec, ConstImageView in, float* out, Part part);
void reduce_floats(const ReduceSpec& spec, const float* in, int64_t c, int64_t h, int64_t w,
                   float* out, Part part);

}  // namespace adalayer::cpu

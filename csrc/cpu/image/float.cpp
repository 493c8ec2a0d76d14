// Between float tensors and images, and operations over floats.
#include <algorithm>
#include <utility>

#include "cpu/image/ops.hpp"
#include "cpu/image/rows.hpp"

namespace adalayer::cpu {
namespace {

struct ForBlendedRows {};

/// Rows that follow each other without padding are one long row.
bool is_joined(const ImageLayout& l) { return l.phases == 1 && l.columns == l.w; }

}  // namespace

void quantize_image(const float* x, Layout order, const ActivationGrid& grid, ImageView out,
                    Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout& l = *out.layout;
  const int64_t plane = l.h * l.w;
  const int64_t first = part.first(l.h), last = part.last(l.h);
  const int64_t step = is_joined(l) ? last - first : 1;
  for (int64_t y = first; y < last; y += step) {
    // One channel is the same in both orders.
    if (order == Layout::NCHW || l.channels == 1)
      kernels.quantize_planar({x + y * l.w, l.channels, plane, step * l.w, out.row(y), l.pitch},
                              grid);
    else
      kernels.quantize_pixels(
          {x + y * l.w * l.channels, l.channels, 1, step * l.w, out.row(y), l.pitch}, grid);
  }
}

void dequantize_image(ConstImageView in, float scale, int32_t zero_point, float* out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const ImageLayout& l = *in.layout;
  const int64_t plane = l.h * l.w;
  if (plane == 1) {
    // Logits: parts share the channels.
    const int64_t first = part.first(l.channels), last = part.last(l.channels);
    kernels.dequantize_row(in.pixel(0, 0) + first, last - first, scale, zero_point, out + first);
    return;
  }
  const int64_t first = part.first(l.h), last = part.last(l.h);
  const int64_t step = is_joined(l) ? last - first : 1;
  for (int64_t y = first; y < last; y += step)
    kernels.dequantize_planar(
        {in.row(y), l.pitch, l.channels, step * l.w, scale, zero_point, out + y * l.w, plane});
}

void affine_f32(const AffineSpec& spec, const float* in, int64_t channels, int64_t positions,
                float* out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const int64_t first = part.first(channels), last = part.last(channels);
  if (positions == 1)
    return kernels.fma_values(in + first, spec.scale + first, spec.bias + first, last - first,
                              out + first);
  for (int64_t c = first; c < last; ++c)
    kernels.line_floats(in + c * positions, spec.scale[c], spec.bias[c], positions,
                        out + c * positions);
}

void rearrange_f32(const RearrangeSpec& spec, const float* in, float* out, int64_t c, int64_t h,
                   int64_t w, Part part) {
  const int64_t rows = c * h;
  for (int64_t row = part.first(rows); row < part.last(rows); ++row) {
    const float* from = in + spec.channel[row / h] + spec.row[row % h];
    for (int64_t x = 0; x < w; ++x)
      out[row * w + x] = from[spec.column[x]];
  }
}

void resize_f32(const ResizeSpec& spec, const float* in, int64_t c, int64_t in_h, int64_t in_w,
                float* out, int64_t out_h, int64_t out_w, Part part) {
  const ImageKernels& kernels = image_kernels();
  // Input rows blended along the row, the last two of them: neighbouring outputs share them.
  float* blended[2] = {nullptr, nullptr};
  int64_t held[2] = {-1, -1};
  if (spec.bilinear) {
    blended[0] = thread_scratch<float, ForBlendedRows>(2 * out_w);
    blended[1] = blended[0] + out_w;
  }
  const int64_t rows = c * out_h;
  for (int64_t row = part.first(rows); row < part.last(rows); ++row) {
    const int64_t channel = row / out_h, y = row % out_h;
    const float* plane = in + channel * in_h * in_w;
    float* to = out + row * out_w;
    if (!spec.bilinear) {
      const float* from = plane + spec.low_h[y] * in_w;
      for (int64_t x = 0; x < out_w; ++x)
        to[x] = from[spec.low_w[x]];
      continue;
    }
    const int64_t wanted[2] = {channel * in_h + spec.low_h[y], channel * in_h + spec.high_h[y]};
    if (held[1] == wanted[0]) {
      std::swap(held[0], held[1]);
      std::swap(blended[0], blended[1]);
    }
    for (int k = 0; k < 2; ++k) {
      if (held[k] == wanted[k]) continue;
      held[k] = wanted[k];
      kernels.blend_columns(in + wanted[k] * in_w, spec.low_w, spec.high_w, spec.part_w, out_w,
                            blended[k]);
    }
    kernels.blend_rows(blended[0], blended[1], spec.part_h[y], out_w, to);
  }
}

void softmax_f32(const float* in, int64_t channels, int64_t positions, float* out, Part part) {
  const int64_t first = part.first(positions), count = part.last(positions) - first;
  if (count > 0) image_kernels().softmax(in + first, channels, positions, count, out + first);
}

void function_f32(const FloatFunctionSpec& spec, const float* in, int64_t count, float* out,
                  Part part) {
  const int64_t first = part.first(count);
  image_kernels().function(spec, in + first, part.last(count) - first, out + first);
}

}  // namespace adalayer::cpu

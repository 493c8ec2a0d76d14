// Everything between convolutions: element-wise operations, moves, pooling, normalisation.
#pragma once

#include "cuda/law.cuh"

namespace adalayer::cuda {

ADALAYER_DEVICE int64_t global_thread() {
  return static_cast<int64_t>(block_x()) * block_threads() + thread_index();
}

ADALAYER_DEVICE uint32_t byte_of(uint32_t word, int i) { return (word >> (8 * i)) & 0xFFu; }

/// Number of a word of four levels in a batch of images: which word of the pixel, which pixel.
struct WordPlace {
  int32_t word, x, y, n;
  ADALAYER_DEVICE WordPlace(int64_t index, const ImageSize& s) {
    const int32_t pitch_words = s.pitch / 4;
    word = static_cast<int32_t>(index % pitch_words);
    int64_t rest = index / pitch_words;
    x = static_cast<int32_t>(rest % s.w);
    rest /= s.w;
    y = static_cast<int32_t>(rest % s.h);
    n = static_cast<int32_t>(rest / s.h);
  }
};

ADALAYER_DEVICE int64_t words_of(const ImageSize& s, int32_t batch) {
  return static_cast<int64_t>(batch) * s.h * s.w * (s.pitch / 4);
}
ADALAYER_DEVICE int64_t level_at(const ImageSize& s, int32_t n, int32_t y, int32_t x) {
  return ((static_cast<int64_t>(n) * s.h + y) * s.w + x) * s.pitch;
}
ADALAYER_DEVICE uint32_t load_word(const uint8_t* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}
ADALAYER_DEVICE void store_word(uint8_t* p, uint32_t v) { *reinterpret_cast<uint32_t*>(p) = v; }

// ---- floats to levels and back ------------------------------------------------------------------

/// One thread: four channels of a pixel. The padding of a pixel becomes level 0.
ADALAYER_KERNEL ADALAYER_THREADS(256) quantize(ADALAYER_PARAMS QuantizeParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  // Neighbouring threads take neighbouring pixels of planes, or words of a pixel.
  const int32_t pixels = p.batch * p.size.h * p.size.w, words = p.size.pitch / 4;
  const int64_t index = global_thread();
  if (index >= static_cast<int64_t>(pixels) * words) return;
  const auto pixel = static_cast<int32_t>(p.nhwc ? index / words : index % pixels);
  const auto word = static_cast<int32_t>(p.nhwc ? index % words : index / pixels);
  const int32_t plane = p.size.h * p.size.w, n = pixel / plane;
  uint32_t q = 0;
  ADALAYER_UNROLL
  for (int c = 0; c < 4; ++c) {
    const int32_t channel = word * 4 + c;
    if (channel >= p.size.c) break;
    const int64_t at =
        p.nhwc ? static_cast<int64_t>(pixel) * p.size.c + channel
               : (static_cast<int64_t>(n) * p.size.c + channel) * plane + (pixel - n * plane);
    q |= static_cast<uint32_t>(quantize_value(p.in[at], p.grid)) << (8 * c);
  }
  store_word(p.out + static_cast<int64_t>(pixel) * p.size.pitch + word * 4, q);
}

ADALAYER_KERNEL ADALAYER_THREADS(256) dequantize(ADALAYER_PARAMS DequantizeParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  const int32_t plane = p.size.h * p.size.w;
  const int64_t image = static_cast<int64_t>(p.size.c) * plane;
  if (index >= p.batch * image) return;
  const auto n = static_cast<int32_t>(index / image);
  const auto rest = static_cast<int32_t>(index % image);
  const int32_t channel = rest / plane;
  const int64_t at = (static_cast<int64_t>(n) * plane + rest % plane) * p.size.pitch + channel;
  p.out[index] = dequantize_value(p.in[at], p.scale, p.zero_point);
}

ADALAYER_KERNEL ADALAYER_THREADS(256) on_grid(ADALAYER_PARAMS GridParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  if (index >= p.count) return;
  const uint8_t q = quantize_value(p.in[index], p.grid);
  if (p.levels != nullptr)
    p.levels[index] = q;
  else
    p.numbers[index] = dequantize_value(q, p.scale, p.grid.zero_point);
}

// ---- element by element -------------------------------------------------------------------------

ADALAYER_KERNEL ADALAYER_THREADS(256) lookup(ADALAYER_PARAMS LookupParams p) {
  let_next_kernel_start();
  auto* table = shared_memory();
  for (int i = thread_index(); i < 256; i += block_threads())
    table[i] = load_constant(p.table + i);
  sync_threads();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  if (index >= p.words) return;
  const uint32_t a = load_word(p.in + index * 4);
  uint32_t q = 0;
  ADALAYER_UNROLL
  for (int c = 0; c < 4; ++c)
    q |= static_cast<uint32_t>(table[byte_of(a, c)]) << (8 * c);
  store_word(p.out + index * 4, q);
}

ADALAYER_KERNEL ADALAYER_THREADS(256) pair(ADALAYER_PARAMS PairParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  if (index >= p.words) return;
  const int64_t other =
      p.per_channel ? index / p.image_words * p.pitch_words + index % p.pitch_words : index;
  const uint32_t a = load_word(p.a + index * 4), b = load_word(p.b + other * 4);
  uint32_t q = 0;
  ADALAYER_UNROLL
  for (int c = 0; c < 4; ++c) {
    const auto x = static_cast<uint8_t>(byte_of(a, c)), y = static_cast<uint8_t>(byte_of(b, c));
    q |= static_cast<uint32_t>(p.product ? mul_u8(x, y, p) : add_u8(x, y, p)) << (8 * c);
  }
  store_word(p.out + index * 4, q);
}

ADALAYER_KERNEL ADALAYER_THREADS(256) affine(ADALAYER_PARAMS AffineParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  if (index >= p.words) return;
  const auto first = static_cast<int32_t>(index % p.pitch_words) * 4;
  const uint32_t a = load_word(p.in + index * 4);
  uint32_t q = 0;
  ADALAYER_UNROLL
  for (int c = 0; c < 4; ++c) {
    const float x = to_float_rn(static_cast<int32_t>(byte_of(a, c)));
    const float y =
        fma_rn(x, load_constant(p.scale + first + c), load_constant(p.bias + first + c));
    q |= static_cast<uint32_t>(finish_u8(y, p.finish)) << (8 * c);
  }
  store_word(p.out + index * 4, q);
}

ADALAYER_KERNEL ADALAYER_THREADS(256) affine_image(ADALAYER_PARAMS AffineImageParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  if (index >= words_of(p.size, p.batch)) return;
  const WordPlace at(index, p.size);
  const int32_t first = at.word * 4;
  const int64_t element = (static_cast<int64_t>(at.y) * p.size.w + at.x) * p.size.c;
  const uint32_t a = load_word(p.in + index * 4);
  uint32_t q = 0;
  for (int c = 0; c < 4 && first + c < p.size.c; ++c) {
    const int64_t channel = first + c, place = element + channel;
    const float x = to_float_rn(static_cast<int32_t>(byte_of(a, c)));
    const float y = fma_rn(x, load_constant(p.scale + (p.scale_of_image ? place : channel)),
                           load_constant(p.bias + (p.bias_of_image ? place : channel)));
    q |= static_cast<uint32_t>(finish_u8(y, p.finish)) << (8 * c);
  }
  store_word(p.out + index * 4, q);
}

// ---- moves
// ----------------------------------------------------------------------------------------

/// Level of channel `c` of output position (y, x) of image `n`.
ADALAYER_DEVICE uint8_t moved_level(const MoveParams& p, int32_t n, int32_t y, int32_t x,
                                    int32_t c) {
  switch (p.kind) {
    case MoveParams::kSlice: {
      int32_t from[3] = {c, y, x};
      from[p.axis] = p.begin + from[p.axis] * p.step;
      return p.in[level_at(p.from, n, from[1], from[2]) + from[0]];
    }
    case MoveParams::kGather:
      return p.in[level_at(p.from, n, y, x) + load_constant(p.index + c)];
    case MoveParams::kPad: {
      const int32_t iy = y - p.top, ix = x - p.left;
      const bool inside = iy >= 0 && iy < p.from.h && ix >= 0 && ix < p.from.w;
      return inside ? p.in[level_at(p.from, n, iy, ix) + c] : static_cast<uint8_t>(p.level);
    }
    case MoveParams::kResize:
      return p
          .in[level_at(p.from, n, load_constant(p.index + y), load_constant(p.index_w + x)) + c];
    case MoveParams::kRearrange: {
      const int32_t at =
          load_constant(p.index + c) + load_constant(p.index_h + y) + load_constant(p.index_w + x);
      const int32_t plane = p.from.h * p.from.w, rest = at % plane;
      return p.in[level_at(p.from, n, rest / p.from.w, rest % p.from.w) + at / plane];
    }
    case MoveParams::kFlatten: {  // the output is a vector, in NCHW order of the input
      const int32_t plane = p.from.h * p.from.w, rest = c % plane;
      return p.in[level_at(p.from, n, rest / p.from.w, rest % p.from.w) + c / plane];
    }
    case MoveParams::kConstant:
      return load_constant(p.in + (static_cast<int64_t>(y) * p.to.w + x) * p.to.c + c);
    default:  // kUnflatten
      return p.in[level_at(p.from, n, 0, 0) + (c * p.to.h + y) * p.to.w + x];
  }
}

/// One thread per word of the output; kConcat: per word of the input.
ADALAYER_KERNEL ADALAYER_THREADS(256) move(ADALAYER_PARAMS MoveParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const bool concat = p.kind == MoveParams::kConcat;
  const ImageSize& size = concat ? p.from : p.to;
  const int64_t index = global_thread();
  if (index >= words_of(size, p.batch)) return;
  const WordPlace at(index, size);
  const int32_t first = at.word * 4;
  if (!concat) {
    uint32_t q = 0;
    for (int c = 0; c < 4 && first + c < size.c; ++c)
      q |= static_cast<uint32_t>(moved_level(p, at.n, at.y, at.x, first + c)) << (8 * c);
    store_word(p.out + index * 4, q);
    return;
  }
  uint32_t q = load_word(p.in + index * 4);
  if (p.table != nullptr) {
    uint32_t looked = 0;
    ADALAYER_UNROLL
    for (int c = 0; c < 4; ++c)
      looked |= static_cast<uint32_t>(load_constant(p.table + byte_of(q, c))) << (8 * c);
    q = looked;
  }
  uint8_t* out =
      p.out + level_at(p.to, at.n, at.y + p.top, at.x + p.left) + p.first_channel + first;
  if (p.first_channel % 4 == 0 && first + 4 <= size.c) {
    store_word(out, q);
    return;
  }
  for (int c = 0; c < 4 && first + c < size.c; ++c)
    out[c] = static_cast<uint8_t>(byte_of(q, c));
}

// ---- pooling
// ----------------------------------------------------------------------------------------

/// The part of a window that lies in the image, along one axis, and how many positions count if
/// padding does.
struct PoolWindow {
  int32_t begin, end, padded;
};
ADALAYER_DEVICE PoolWindow pool_window(int32_t i, int32_t in, int32_t kernel, int32_t stride,
                                       int32_t pad, int32_t pad_end) {
  const int32_t start = i * stride - pad, stop = start + kernel;
  return {start < 0 ? 0 : start, stop < in ? stop : in,
          (stop < in + pad_end ? stop : in + pad_end) - start};
}
ADALAYER_DEVICE PoolWindow adaptive_window(int32_t i, int32_t in, int32_t out) {
  const auto begin = static_cast<int32_t>(static_cast<int64_t>(i) * in / out);
  const auto end = static_cast<int32_t>((static_cast<int64_t>(i + 1) * in + out - 1) / out);
  return {begin, end, 0};
}

ADALAYER_DEVICE uint32_t max_of_window(const PoolParams& p, const WordPlace& at) {
  uint32_t most = 0;
  for (int32_t ky = 0; ky < p.kernel_h; ++ky) {
    const int32_t y = at.y * p.stride_h - p.pad_top + ky * p.dilation_h;
    if (y < 0 || y >= p.from.h) continue;
    for (int32_t kx = 0; kx < p.kernel_w; ++kx) {
      const int32_t x = at.x * p.stride_w - p.pad_left + kx * p.dilation_w;
      if (x < 0 || x >= p.from.w) continue;
      most = max_bytes(most, load_word(p.in + level_at(p.from, at.n, y, x) + at.word * 4));
    }
  }
  return most;
}

ADALAYER_DEVICE uint32_t finish_average(const PoolParams& p, const int32_t sums[4],
                                        const PoolWindow& y, const PoolWindow& x) {
  const int64_t valid = static_cast<int64_t>(y.end - y.begin) * (x.end - x.begin);
  const int64_t divisor = p.count_padding ? static_cast<int64_t>(y.padded) * x.padded : valid;
  uint32_t q = 0;
  ADALAYER_UNROLL
  for (int c = 0; c < 4; ++c) {
    const float v = average_value(sums[c], valid, divisor, p.zero_in, p.ratio);
    q |= static_cast<uint32_t>(finish_u8(v, p.finish)) << (8 * c);
  }
  return q;
}

ADALAYER_DEVICE void pool_windows(const PoolParams& p, const WordPlace& at, PoolWindow& y,
                                  PoolWindow& x) {
  if (p.kind == PoolParams::kAdaptive) {
    y = adaptive_window(at.y, p.from.h, p.to.h);
    x = adaptive_window(at.x, p.from.w, p.to.w);
  } else {
    y = pool_window(at.y, p.from.h, p.kernel_h, p.stride_h, p.pad_top, p.pad_bottom);
    x = pool_window(at.x, p.from.w, p.kernel_w, p.stride_w, p.pad_left, p.pad_right);
  }
}

/// One thread per word of the output.
ADALAYER_KERNEL ADALAYER_THREADS(256) pool(ADALAYER_PARAMS PoolParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  if (index >= words_of(p.to, p.batch)) return;
  const WordPlace at(index, p.to);
  if (p.kind == PoolParams::kMax) {
    store_word(p.out + index * 4, max_of_window(p, at));
    return;
  }
  PoolWindow y, x;
  pool_windows(p, at, y, x);
  int32_t sums[4] = {};
  for (int32_t iy = y.begin; iy < y.end; ++iy)
    for (int32_t ix = x.begin; ix < x.end; ++ix) {
      const uint32_t a = load_word(p.in + level_at(p.from, at.n, iy, ix) + at.word * 4);
      ADALAYER_UNROLL
      for (int c = 0; c < 4; ++c)
        sums[c] += static_cast<int32_t>(byte_of(a, c));
    }
  store_word(p.out + index * 4, finish_average(p, sums, y, x));
}

constexpr int kPoolWarps = 8;

/// Averages of large windows: a block has one output position and 32 words; its warps share the
/// window's positions. Integer sums do not depend on the order.
ADALAYER_KERNEL ADALAYER_THREADS(32 * kPoolWarps) pool_large(ADALAYER_PARAMS PoolParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int32_t pitch_words = p.to.pitch / 4, groups = (pitch_words + 31) / 32;
  const auto block = static_cast<int64_t>(block_x());
  const auto group = static_cast<int32_t>(block % groups);
  const int64_t pixel = block / groups;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int32_t word = group * 32 + lane;
  WordPlace at(pixel * pitch_words, p.to);
  at.word = word;
  PoolWindow y, x;
  pool_windows(p, at, y, x);
  const int32_t w = x.end - x.begin, count = (y.end - y.begin) * w;
  int32_t sums[4] = {};
  if (word < pitch_words) {
    for (int32_t i = warp; i < count; i += kPoolWarps) {
      const uint32_t a =
          load_word(p.in + level_at(p.from, at.n, y.begin + i / w, x.begin + i % w) + word * 4);
      ADALAYER_UNROLL
      for (int c = 0; c < 4; ++c)
        sums[c] += static_cast<int32_t>(byte_of(a, c));
    }
  }
  auto* shared = reinterpret_cast<int32_t*>(shared_memory());  // [warps][4][32]
  ADALAYER_UNROLL
  for (int c = 0; c < 4; ++c)
    shared[(warp * 4 + c) * 32 + lane] = sums[c];
  sync_threads();
  if (warp != 0 || word >= pitch_words) return;
  ADALAYER_UNROLL
  for (int c = 0; c < 4; ++c) {
    sums[c] = 0;
    for (int k = 0; k < kPoolWarps; ++k)
      sums[c] += shared[(k * 4 + c) * 32 + lane];
  }
  store_word(p.out + (pixel * pitch_words + word) * 4, finish_average(p, sums, y, x));
}

// ---- blending and normalising
// -------------------------------------------------------------------------

ADALAYER_KERNEL ADALAYER_THREADS(256) bilinear(ADALAYER_PARAMS BilinearParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  if (index >= words_of(p.to, p.batch)) return;
  const WordPlace at(index, p.to);
  const int32_t y0 = load_constant(p.low_h + at.y), y1 = load_constant(p.high_h + at.y);
  const int32_t x0 = load_constant(p.low_w + at.x), x1 = load_constant(p.high_w + at.x);
  const float part_h = load_constant(p.part_h + at.y), part_w = load_constant(p.part_w + at.x);
  const uint32_t q00 = load_word(p.in + level_at(p.from, at.n, y0, x0) + at.word * 4);
  const uint32_t q01 = load_word(p.in + level_at(p.from, at.n, y0, x1) + at.word * 4);
  const uint32_t q10 = load_word(p.in + level_at(p.from, at.n, y1, x0) + at.word * 4);
  const uint32_t q11 = load_word(p.in + level_at(p.from, at.n, y1, x1) + at.word * 4);
  uint32_t q = 0;
  ADALAYER_UNROLL
  for (int c = 0; c < 4; ++c) {
    const auto number = [c](uint32_t v) {
      return to_float_rn(static_cast<int32_t>(byte_of(v, c)));
    };
    const float y = blend(number(q00), number(q01), number(q10), number(q11), part_w, part_h);
    q |= static_cast<uint32_t>(finish_u8(fma_rn(y, p.scale, p.offset), p.finish)) << (8 * c);
  }
  store_word(p.out + index * 4, q);
}

/// One warp per pixel.
ADALAYER_KERNEL ADALAYER_THREADS(128) layer_norm(ADALAYER_PARAMS LayerNormParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int lane = thread_index() % 32;
  const int64_t pixel = global_thread() / 32;
  if (pixel >= p.pixels) return;
  const uint8_t* in = p.in + pixel * p.pitch;
  int64_t s1 = 0, s2 = 0;
  for (int32_t c = lane; c < p.channels; c += 32) {
    const int64_t level = in[c];
    s1 += level;
    s2 += level * level;
  }
  ADALAYER_UNROLL
  for (int other = 16; other > 0; other /= 2) {
    s1 += shuffle_xor(s1, other);
    s2 += shuffle_xor(s2, other);
  }
  const double count = to_double_rn(p.channels);
  const int64_t z = p.zero_point;
  const double mean =
      p.about_zero != 0 ? to_double_rn(p.zero_point) : div_rn(to_double_rn(s1), count);
  const double var = p.about_zero != 0
                         ? div_rn(to_double_rn(s2 - 2 * z * s1 + p.channels * z * z), count)
                         : div_rn(to_double_rn(p.channels * s2 - s1 * s1), mul_rn(count, count));
  const double rstd = div_rn(1.0, sqrt_rn(add_rn(mul_rn(var, mul_rn(p.step, p.step)), p.eps)));
  const float factor = to_float_rn(mul_rn(rstd, p.step));
  uint8_t* out = p.out + pixel * p.pitch;
  for (int32_t c = lane; c < p.pitch; c += 32) {
    if (c >= p.channels) {
      out[c] = 0;
      continue;
    }
    const float centred = to_float_rn(sub_rn(to_double_rn(in[c]), mean));
    out[c] = finish_u8(
        fma_rn(mul_rn(centred, factor), load_constant(p.gamma + c), load_constant(p.beta + c)),
        p.finish);
  }
}

constexpr int kNormWarps = 8;

/// One block per image and group.
ADALAYER_KERNEL ADALAYER_THREADS(32 * kNormWarps) group_norm(ADALAYER_PARAMS GroupNormParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const auto image = static_cast<int64_t>(block_x()) / p.groups;
  const auto group = static_cast<int32_t>(block_x()) % p.groups;
  const int32_t channels = p.size.c / p.groups, pixels = p.size.h * p.size.w;
  const int32_t count = channels * pixels;  // at most kMaxGroupNorm
  const int64_t first = image * pixels * p.size.pitch + group * channels;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  int64_t s1 = 0, s2 = 0;
  for (int32_t i = thread_index(); i < count; i += block_threads()) {
    const int64_t level =
        p.in[first + static_cast<int64_t>(i / channels) * p.size.pitch + i % channels];
    s1 += level;
    s2 += level * level;
  }
  ADALAYER_UNROLL
  for (int other = 16; other > 0; other /= 2) {
    s1 += shuffle_xor(s1, other);
    s2 += shuffle_xor(s2, other);
  }
  auto* shared = reinterpret_cast<int64_t*>(shared_memory());  // [warps][2]
  if (lane == 0) {
    shared[2 * warp] = s1;
    shared[2 * warp + 1] = s2;
  }
  sync_threads();
  s1 = s2 = 0;
  for (int k = 0; k < kNormWarps; ++k) {
    s1 += shared[2 * k];
    s2 += shared[2 * k + 1];
  }
  const double number = to_double_rn(count);
  const double mean = div_rn(to_double_rn(s1), number);
  const double var = div_rn(to_double_rn(count * s2 - s1 * s1), mul_rn(number, number));
  const double rstd = div_rn(1.0, sqrt_rn(add_rn(mul_rn(var, mul_rn(p.step, p.step)), p.eps)));
  const float factor = to_float_rn(mul_rn(rstd, p.step));
  for (int32_t i = thread_index(); i < count; i += block_threads()) {
    const int32_t c = i % channels;
    const int64_t at = first + static_cast<int64_t>(i / channels) * p.size.pitch + c;
    const float centred = to_float_rn(sub_rn(to_double_rn(p.in[at]), mean));
    const float gamma = load_constant(p.gamma + group * channels + c);
    const float beta = load_constant(p.beta + group * channels + c);
    p.out[at] = finish_u8(fma_rn(mul_rn(centred, factor), gamma, beta), p.finish);
  }
}

// ---- floats behind the last quantized layer
// -------------------------------------------------------------

ADALAYER_KERNEL ADALAYER_THREADS(256) average_floats(ADALAYER_PARAMS FloatAverageParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  const int32_t out_plane = p.out_h * p.out_w;
  if (index >= static_cast<int64_t>(p.planes) * out_plane) return;
  const int64_t plane = index / out_plane;
  const auto rest = static_cast<int32_t>(index % out_plane);
  const int32_t oy = rest / p.out_w, ox = rest % p.out_w;
  const PoolWindow y =
      p.adaptive ? adaptive_window(oy, p.in_h, p.out_h)
                 : pool_window(oy, p.in_h, p.kernel_h, p.stride_h, p.pad_top, p.pad_bottom);
  const PoolWindow x =
      p.adaptive ? adaptive_window(ox, p.in_w, p.out_w)
                 : pool_window(ox, p.in_w, p.kernel_w, p.stride_w, p.pad_left, p.pad_right);
  double sum = 0.0;
  for (int32_t iy = y.begin; iy < y.end; ++iy)
    for (int32_t ix = x.begin; ix < x.end; ++ix)
      sum = add_rn(sum, static_cast<double>(p.in[(plane * p.in_h + iy) * p.in_w + ix]));
  const int64_t divisor = p.count_padding && !p.adaptive
                              ? static_cast<int64_t>(y.padded) * x.padded
                              : static_cast<int64_t>(y.end - y.begin) * (x.end - x.begin);
  p.out[index] = to_float_rn(div_rn(sum, to_double_rn(divisor)));
}

ADALAYER_KERNEL ADALAYER_THREADS(256) resize_floats(ADALAYER_PARAMS FloatResizeParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  const int32_t out_plane = p.out_h * p.out_w;
  if (index >= static_cast<int64_t>(p.planes) * out_plane) return;
  const float* in = p.in + index / out_plane * p.in_h * p.in_w;
  const auto rest = static_cast<int32_t>(index % out_plane);
  const int32_t oy = rest / p.out_w, ox = rest % p.out_w;
  const int32_t y0 = load_constant(p.low_h + oy), x0 = load_constant(p.low_w + ox);
  if (!p.bilinear) {
    p.out[index] = in[y0 * p.in_w + x0];
    return;
  }
  const int32_t y1 = load_constant(p.high_h + oy), x1 = load_constant(p.high_w + ox);
  p.out[index] =
      blend(in[y0 * p.in_w + x0], in[y0 * p.in_w + x1], in[y1 * p.in_w + x0], in[y1 * p.in_w + x1],
            load_constant(p.part_w + ox), load_constant(p.part_h + oy));
}

ADALAYER_KERNEL ADALAYER_THREADS(256) function_floats(ADALAYER_PARAMS FloatFunctionParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  if (index < p.count) p.out[index] = float_function(p.in[index], p.function, p.a, p.b);
}

ADALAYER_KERNEL ADALAYER_THREADS(256) combine_floats(ADALAYER_PARAMS FloatPairParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = global_thread();
  if (index < p.count) p.out[index] = float_pair(p.a[index], p.b[index], p.pair);
}

/// One block per position. The sum runs channel after channel, as on the CPU.
ADALAYER_KERNEL ADALAYER_THREADS(256) softmax(ADALAYER_PARAMS SoftmaxParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t n = block_x() / p.plane, position = block_x() % p.plane;
  const float* in = p.in + n * p.channels * p.plane + position;
  float* out = p.out + n * p.channels * p.plane + position;
  auto* shared = reinterpret_cast<float*>(shared_memory());  // [threads], then the factor
  float most = in[0];
  for (int32_t c = thread_index(); c < p.channels; c += block_threads()) {
    const float x = in[static_cast<int64_t>(c) * p.plane];
    most = x > most ? x : most;
  }
  shared[thread_index()] = most;
  sync_threads();
  for (int k = 0; k < block_threads(); ++k)
    most = shared[k] > most ? shared[k] : most;
  for (int32_t c = thread_index(); c < p.channels; c += block_threads()) {
    const int64_t at = static_cast<int64_t>(c) * p.plane;
    out[at] = softmax_exp(sub_rn(in[at], most));
  }
  sync_threads();
  if (thread_index() == 0) {
    double sum = 0.0;
    for (int32_t c = 0; c < p.channels; ++c)
      sum = add_rn(sum, static_cast<double>(out[static_cast<int64_t>(c) * p.plane]));
    shared[0] = to_float_rn(div_rn(1.0, sum));
  }
  sync_threads();
  const float factor = shared[0];
  for (int32_t c = thread_index(); c < p.channels; c += block_threads()) {
    const int64_t at = static_cast<int64_t>(c) * p.plane;
    out[at] = mul_rn(out[at], factor);
  }
}

}  // namespace adalayer::cuda

// Reductions along whole axes, of levels or floats, to floats; floats that are combined or joined.
#include <algorithm>
#include <numeric>

#include "cpu/image/ops.hpp"
#include "cpu/image/rows.hpp"

namespace adalayer::cpu {
namespace {

struct ForOperands {};

constexpr int64_t kLanes = 64;  // channels, or positions of a row, that are added up side by side
// Squares of levels, below 2^16, that a sum of 32 bits holds.
constexpr int64_t kMostSquares = int64_t{1} << 16;

/// exact[k] += sums over `count` pixels of terms of `lanes` channels from `in` on.
void add_pixels(const uint8_t* in, int64_t pitch, int64_t count, int64_t lanes, Reduction kind,
                int32_t zero_point, int64_t* exact) {
  for (int64_t begin = 0; begin < count; begin += kMostSquares) {
    const int64_t end = std::min(count, begin + kMostSquares);
    uint32_t sums[kLanes] = {};
    for (int64_t x = begin; x < end; ++x) {
      const uint8_t* pixel = in + x * pitch;
      if (kind == Reduction::Norm) {
        for (int64_t k = 0; k < lanes; ++k) {
          const auto apart = static_cast<int16_t>(pixel[k] - zero_point);
          sums[k] += static_cast<uint16_t>(apart * apart);
        }
      } else {
        for (int64_t k = 0; k < lanes; ++k)
          sums[k] += pixel[k];
      }
    }
    for (int64_t k = 0; k < lanes; ++k)
      exact[k] += sums[k];
    if (kind == Reduction::Mean)
      for (int64_t k = 0; k < lanes; ++k)
        exact[k] -= (end - begin) * zero_point;
  }
}

/// Exact sums of the channels [first, first + lanes) of one row, or of one pixel of it.
void add_row(const ReduceSpec& s, ConstImageView in, int64_t y, int64_t x, int64_t count,
             int64_t first, int64_t lanes, int64_t* exact) {
  add_pixels(in.pixel(y, x) + first, in.layout->pitch, count, lanes, s.kind, s.zero_point, exact);
}

}  // namespace

void reduce(const ReduceSpec& s, ConstImageView in, float* out, Part part) {
  const ImageLayout& a = *in.layout;
  const int64_t rows = s.along[1] ? 1 : a.h, columns = s.along[2] ? 1 : a.w;
  const int64_t terms = (s.along[0] ? a.channels : 1) * (a.h / rows) * (a.w / columns);
  const int64_t blocks = (a.channels + kLanes - 1) / kLanes;
  // Parts share whatever there is most of: channels in blocks, or places of the result.
  const int64_t units = s.along[0] ? rows * columns : blocks;
  for (int64_t unit = part.first(units); unit < part.last(units); ++unit) {
    const int64_t first_block = s.along[0] ? 0 : unit, last_block = s.along[0] ? blocks : unit + 1;
    const int64_t first_place = s.along[0] ? unit : 0;
    const int64_t last_place = s.along[0] ? unit + 1 : rows * columns;
    for (int64_t place = first_place; place < last_place; ++place) {
      const int64_t y0 = place / columns, x0 = place % columns;
      int64_t total = 0;
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t first = block * kLanes, lanes = std::min(kLanes, a.channels - first);
        int64_t exact[kLanes] = {};
        for (int64_t y = s.along[1] ? 0 : y0; y < (s.along[1] ? a.h : y0 + 1); ++y)
          add_row(s, in, y, s.along[2] ? 0 : x0, s.along[2] ? a.w : 1, first, lanes, exact);
        if (s.along[0]) {
          total += std::accumulate(exact, exact + lanes, int64_t{0});
          continue;
        }
        for (int64_t k = 0; k < lanes; ++k)
          out[(first + k) * rows * columns + place] = reduced_levels(exact[k], terms, s);
      }
      if (s.along[0]) out[place] = reduced_levels(total, terms, s);
    }
  }
}

void reduce_floats(const ReduceSpec& s, const float* in, int64_t c, int64_t h, int64_t w,
                   float* out, Part part) {
  const int64_t channels = s.along[0] ? 1 : c, rows = s.along[1] ? 1 : h;
  const int64_t columns = s.along[2] ? 1 : w;
  const int64_t terms = (c / channels) * (h / rows) * (w / columns);
  const int64_t lines = channels * rows;
  for (int64_t line = part.first(lines); line < part.last(lines); ++line) {
    const int64_t c0 = line / rows, y0 = line % rows;
    for (int64_t begin = 0; begin < columns; begin += kLanes) {
      const int64_t lanes = std::min(kLanes, columns - begin);
      double sums[kLanes] = {};
      for (int64_t k = s.along[0] ? 0 : c0; k < (s.along[0] ? c : c0 + 1); ++k)
        for (int64_t y = s.along[1] ? 0 : y0; y < (s.along[1] ? h : y0 + 1); ++y) {
          const float* row = in + (k * h + y) * w;
          if (s.along[2]) {
            for (int64_t x = 0; x < w; ++x)
              sums[0] += reduction_term(static_cast<double>(row[x]), s.kind);
          } else {
            for (int64_t x = 0; x < lanes; ++x)
              sums[x] += reduction_term(static_cast<double>(row[begin + x]), s.kind);
          }
        }
      for (int64_t x = 0; x < lanes; ++x)
        out[line * columns + begin + x] = reduced_floats(sums[x], terms, s.kind);
    }
  }
}

CombinedFloats::CombinedFloats(FloatPair by, const int64_t (&a)[3], const int64_t (&b)[3],
                               const int64_t (&result)[3])
    : pair(by) {
  const int64_t* operands[] = {a, b};
  // Axes that both operands have, or both repeat along, are one; from the last to the first.
  int64_t* const steps[] = {step_a, step_b};
  int64_t stride[] = {1, 1};
  int place = 3;
  for (int axis = 2; axis >= 0; --axis) {
    if (result[axis] == 1) continue;
    bool joins = place < 3;
    int64_t own[2];
    for (int k = 0; k < 2; ++k) {
      own[k] = operands[k][axis] == 1 ? 0 : stride[k];
      if (place < 3) {
        const int64_t expected = steps[k][place] * size[place];
        joins = joins && own[k] == expected;
      }
    }
    if (joins) {
      size[place] *= result[axis];
    } else {
      --place;
      size[place] = result[axis];
      for (int k = 0; k < 2; ++k)
        steps[k][place] = own[k];
    }
    for (int k = 0; k < 2; ++k)
      stride[k] *= operands[k][axis];
  }
}

void combine_f32(const CombinedFloats& s, const float* a, const float* b, float* out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const int64_t n = s.size[2], lines = s.size[0] * s.size[1];
  const bool repeats_a = s.step_a[2] == 0 && n > 1, repeats_b = s.step_b[2] == 0 && n > 1;
  // Of one line its elements are shared; of several, the lines.
  const int64_t begin = lines == 1 ? part.first(n) : 0, end = lines == 1 ? part.last(n) : n;
  const int64_t first = lines == 1 ? 0 : part.first(lines);
  const int64_t last = lines == 1 ? 1 : part.last(lines);
  float* repeated = repeats_a || repeats_b ? thread_scratch<float, ForOperands>(2 * n) : nullptr;
  for (int64_t line = first; line < last; ++line) {
    const int64_t i = line / s.size[1], j = line % s.size[1];
    const float* x = a + i * s.step_a[0] + j * s.step_a[1];
    const float* y = b + i * s.step_b[0] + j * s.step_b[1];
    if (repeats_a) {
      std::fill(repeated + begin, repeated + end, *x);
      x = repeated;
    }
    if (repeats_b) {
      std::fill(repeated + n + begin, repeated + n + end, *y);
      y = repeated + n;
    }
    kernels.combine(s.pair, x + begin, y + begin, end - begin, out + line * n + begin);
  }
}

void copy_piece_f32(const float* in, int64_t rows, int64_t length, float* out, int64_t pitch,
                    int64_t begin, Part part) {
  // Of one row its elements are shared; of several, the rows.
  if (rows == 1) {
    const int64_t first = part.first(length), last = part.last(length);
    std::copy(in + first, in + last, out + begin + first);
    return;
  }
  for (int64_t row = part.first(rows); row < part.last(rows); ++row)
    std::copy_n(in + row * length, length, out + row * pitch + begin);
}

}  // namespace adalayer::cpu

#include "cpu/image/float_conv.hpp"

#include <algorithm>
#include <utility>

#include "cpu/image/rows.hpp"

namespace adalayer::cpu {
namespace {

// Fewer positions than this are a fraction of a block of columns.
constexpr int64_t kFewPositions = 8;
constexpr int64_t kPositions = 4 * kFloatColumns;  // whose inputs are laid out together
constexpr int64_t kChannels = 4 * kFloatRows;      // of one unit of work
constexpr int64_t kWorthAPart = 1 << 16;           // multiply-accumulates

struct ForInputs {};
struct ForResults {};

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

int64_t positions_of(const ConvShape& s) { return s.out_h() * s.out_w(); }

bool is_along_channels(const ConvShape& s) {
  return s.groups == 1 && positions_of(s) < kFewPositions;
}

/// An image is its own matrix of inputs: no kernel, no stride, no padding.
bool is_pointwise(const ConvShape& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 &&
         s.pad_top == 0 && s.pad_left == 0 && s.pad_bottom == 0 && s.pad_right == 0;
}

/// The inputs of a group at `count` positions from `first` on, term after term.
class Inputs {
 public:
  Inputs(const ConvShape& s, const float* group, int64_t first, int64_t count)
      : s_(s), group_(group), count_(count), out_w_(s.out_w()) {
    y_ = first / out_w_;
    x_ = first % out_w_;
  }

  void next(float* to) {
    const int64_t step = s_.stride_w;
    const int64_t dy = ky_ * s_.dilation_h - s_.pad_top, dx = kx_ * s_.dilation_w - s_.pad_left;
    const float* plane = group_ + channel_ * s_.in_h * s_.in_w;
    int64_t oy = y_, ox = x_;
    for (int64_t left = count_; left > 0; ++oy, ox = 0) {
      const int64_t n = std::min(left, out_w_ - ox), iy = oy * s_.stride_h + dy;
      row(iy >= 0 && iy < s_.in_h ? plane + iy * s_.in_w : nullptr, ox * step + dx, step, n, to);
      to += n;
      left -= n;
    }
    if (++kx_ < s_.kernel_w) return;
    kx_ = 0;
    if (++ky_ < s_.kernel_h) return;
    ky_ = 0;
    ++channel_;
  }

 private:
  /// Elements begin, begin + step, ... of a row, zeros outside; a row above or below is null.
  void row(const float* from, int64_t begin, int64_t step, int64_t n, float* to) const {
    if (from == nullptr) {
      std::fill_n(to, n, 0.0f);
      return;
    }
    int64_t i = 0, at = begin;
    for (; i < n && at < 0; ++i, at += step)
      to[i] = 0.0f;
    if (step == 1) {
      const int64_t inside = std::clamp<int64_t>(s_.in_w - at, 0, n - i);
      std::copy_n(from + at, inside, to + i);
      i += inside;
    } else {
      for (; i < n && at < s_.in_w; ++i, at += step)
        to[i] = from[at];
    }
    std::fill(to + i, to + n, 0.0f);
  }

  const ConvShape& s_;
  const float* group_;
  int64_t count_, out_w_, y_ = 0, x_ = 0;
  int64_t channel_ = 0, ky_ = 0, kx_ = 0;
};

/// Scratch memory whose vectors lie within cache lines.
template <class Tag>
float* aligned_scratch(int64_t count) {
  auto* memory = thread_scratch<float, Tag>(count + 16);
  return memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
}

}  // namespace

FloatConv::FloatConv(const FloatConvSpec& spec, std::vector<float> own) : spec_(spec) {
  if (!own.empty()) {
    own_ = std::make_shared<const std::vector<float>>(std::move(own));
    spec_.weights = own_->data();
  }
  if (!along_channels()) return;
  const ConvShape& s = spec_.shape;
  const int64_t terms = s.reduction(), outs = s.out_channels;
  const int64_t floats = blocks_of(outs, kFloatColumns) * terms * kFloatColumns;
  auto side_by_side = std::make_shared<AlignedBuffer>(static_cast<size_t>(floats) * sizeof(float));
  side_by_side->clear();
  auto* all = reinterpret_cast<float*>(side_by_side->data());
  constexpr int64_t kTerms = 64;  // of all channels of a block: they stay in the first-level cache
  for (int64_t o = 0; o < outs; o += kFloatColumns) {
    float* to = all + o * terms;
    const int64_t columns = std::min(kFloatColumns, outs - o);
    for (int64_t begin = 0; begin < terms; begin += kTerms)
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t k = begin; k < std::min(begin + kTerms, terms); ++k)
          to[k * kFloatColumns + j] = spec_.weights[(o + j) * terms + k];
  }
  side_by_side_ = std::move(side_by_side);
  own_.reset();
}

FloatConv::FloatConv(const FloatConv& like, const FloatConvSpec& spec)
    : spec_(spec), own_(like.own_), side_by_side_(like.side_by_side_) {
  if (own_ != nullptr) spec_.weights = own_->data();
}

bool FloatConv::fits(const FloatConvSpec& spec) const {
  return is_along_channels(spec.shape) == along_channels();
}

size_t FloatConv::bytes() const {
  return (own_ == nullptr ? 0 : sizeof(float) * own_->size()) +
         (side_by_side_ == nullptr ? 0 : side_by_side_->size());
}

bool FloatConv::along_channels() const { return is_along_channels(spec_.shape); }

int64_t FloatConv::units() const {
  const ConvShape& s = spec_.shape;
  if (along_channels()) return blocks_of(s.out_channels, kFloatColumns);
  const int64_t channels = s.groups > 1 ? s.groups : blocks_of(s.out_channels, kChannels);
  return blocks_of(positions_of(s), kPositions) * channels;
}

int64_t FloatConv::max_parts() const {
  const ConvShape& s = spec_.shape;
  const int64_t macs = s.out_channels * positions_of(s) * s.reduction();
  return std::clamp<int64_t>(macs / kWorthAPart, 1, units());
}

void FloatConv::run(const float* x, float* y, int64_t images, Part part) const {
  if (along_channels()) return run_along_channels(x, y, images, part);
  const ConvShape& s = spec_.shape;
  for (int64_t n = 0; n < images; ++n)
    run_along_positions(x + n * s.in_channels * s.in_h * s.in_w,
                        y + n * s.out_channels * positions_of(s), part);
}

void FloatConv::run_along_channels(const float* x, float* y, int64_t images, Part part) const {
  const ImageKernels& kernels = image_kernels();
  const ConvShape& s = spec_.shape;
  const int64_t terms = s.reduction(), positions = positions_of(s);
  const int64_t outs = s.out_channels, in_size = s.in_channels * s.in_h * s.in_w;
  const int64_t blocks = blocks_of(outs, kFloatColumns);
  const int64_t first = part.first(blocks) * kFloatColumns;
  const int64_t columns = std::min(outs, part.last(blocks) * kFloatColumns) - first;
  if (columns <= 0) return;
  const auto* weights = reinterpret_cast<const float*>(side_by_side_->data());
  // An image's inputs are a row as they are where the window is the whole of it.
  const bool whole = positions == 1 && s.in_h == s.kernel_h && s.in_w == s.kernel_w &&
                     s.dilation_h == 1 && s.dilation_w == 1 && s.pad_top == 0 && s.pad_left == 0 &&
                     s.pad_bottom == 0 && s.pad_right == 0;
  float* inputs = whole ? nullptr : aligned_scratch<ForInputs>(kFloatRows * terms);
  float* results = positions == 1 ? nullptr : aligned_scratch<ForResults>(kFloatRows * columns);
  const int64_t rows = images * positions;
  for (int64_t row = 0; row < rows; row += kFloatRows) {
    const auto count = static_cast<int>(std::min<int64_t>(kFloatRows, rows - row));
    FloatProduct p{};
    p.rows = count;
    p.columns = columns;
    p.a = whole ? x + row * in_size : inputs;
    p.a_row = whole ? in_size : terms;
    p.a_term = 1;
    p.b_block = terms * kFloatColumns;
    p.b_term = kFloatColumns;
    p.c = positions == 1 ? y + row * outs + first : results;
    p.c_row = positions == 1 ? outs : columns;
    for (int r = 0; r < count; ++r) {
      const int64_t image = (row + r) / positions, position = (row + r) % positions;
      Inputs input(s, x + image * in_size, position, 1);
      for (int64_t k = 0; k < terms && !whole; ++k)
        input.next(inputs + r * terms + k);
      std::copy_n(spec_.bias + first, columns, p.c + r * p.c_row);
    }
    for (int64_t begin = 0; begin < terms; begin += kFloatBlock) {
      FloatProduct q = p;
      q.a += begin;
      q.b = weights + first * terms + begin * kFloatColumns;
      q.terms = std::min(kFloatBlock, terms - begin);
      kernels.multiply_floats(q);
    }
    for (int r = 0; r < count; ++r) {
      float* to = p.c + r * p.c_row;
      if (spec_.clamps())
        kernels.function({FloatFunction::Clamp, spec_.lo, spec_.hi}, to, columns, to);
      if (positions == 1) continue;
      const int64_t image = (row + r) / positions, position = (row + r) % positions;
      for (int64_t j = 0; j < columns; ++j)
        y[(image * outs + first + j) * positions + position] = to[j];
    }
  }
}

void FloatConv::run_along_positions(const float* x, float* y, Part part) const {
  const ImageKernels& kernels = image_kernels();
  const ConvShape& s = spec_.shape;
  const int64_t terms = s.reduction(), positions = positions_of(s), plane = s.in_h * s.in_w;
  const bool pointwise = is_pointwise(s);
  // A unit is a share of the channels, or a group of them, at a block of positions.
  const int64_t step = s.groups > 1 ? s.group_out() : kChannels;
  const int64_t shares = blocks_of(s.out_channels, step);
  float* inputs = pointwise
                      ? nullptr
                      : thread_scratch<float, ForInputs>(std::min(kFloatBlock, terms) * kPositions);
  const int64_t last_unit = part.last(units());
  for (int64_t unit = part.first(units()); unit < last_unit;) {
    // Units of one block of positions and one group follow each other: they share its inputs.
    const int64_t first = unit / shares * kPositions, channel = unit % shares * step;
    const int64_t together = s.groups > 1 ? 1 : std::min(last_unit - unit, shares - unit % shares);
    const int64_t end = std::min(s.out_channels, channel + together * step);
    const int64_t count = std::min(kPositions, positions - first);
    const float* group = x + channel / s.group_out() * s.group_in() * plane;
    for (int64_t o = channel; o < end; ++o)
      std::fill_n(y + o * positions + first, count, spec_.bias[o]);
    Inputs input(s, group, first, count);
    for (int64_t begin = 0; begin < terms; begin += kFloatBlock) {
      FloatProduct p{};
      p.terms = std::min(kFloatBlock, terms - begin);
      p.columns = count;
      p.a_row = terms;
      p.a_term = 1;
      p.c_row = positions;
      if (pointwise) {
        p.b = group + begin * plane + first;
        p.b_block = kFloatColumns;
        p.b_term = plane;
      } else {
        for (int64_t k = 0; k < p.terms; ++k)
          input.next(inputs + k * kPositions);
        p.b = inputs;
        p.b_block = kFloatColumns;
        p.b_term = kPositions;
      }
      for (int64_t o = channel; o < end; o += kFloatRows) {
        p.a = spec_.weights + o * terms + begin;
        p.rows = static_cast<int>(std::min<int64_t>(kFloatRows, end - o));
        p.c = y + o * positions + first;
        kernels.multiply_floats(p);
      }
    }
    for (int64_t o = channel; o < end && spec_.clamps(); ++o) {
      float* to = y + o * positions + first;
      kernels.function({FloatFunction::Clamp, spec_.lo, spec_.hi}, to, count, to);
    }
    unit += together;
  }
}

double float_conv_bytes(const ConvShape& s, bool own_weights) {
  const auto terms = static_cast<double>(s.reduction());
  const double count = terms * static_cast<double>(s.out_channels);
  if (is_along_channels(s)) return 4.0 * (count + terms * static_cast<double>(kFloatColumns));
  return own_weights ? 4.0 * count : 0.0;
}

double float_conv_scratch(const ConvShape& s) {
  const auto terms = static_cast<double>(s.reduction());
  if (is_along_channels(s)) return 4.0 * kFloatRows * (terms + static_cast<double>(s.out_channels));
  return 4.0 * kFloatBlock * kPositions;
}

}  // namespace adalayer::cpu

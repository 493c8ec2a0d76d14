#include <algorithm>
#include <numeric>

#include "core/status.hpp"
#include "cpu/conv/matmul.hpp"
#include "formats/panels.hpp"

namespace adalayer::cpu {
namespace {

using formats::kTileBytes;
using formats::kTileDepth;
using formats::kTileWidth;

/// A stretch of neighbouring bytes of one kernel row, cut into steps: `columns` kernel columns from
/// `kx` on, `pitch` bytes each, of which `channels` hold values.
struct Stretch {
  int64_t ky, kx, columns;
};

/// Kernel rows whole where their pixels are neighbours, else pixel by pixel: whatever needs fewer
/// products. Those are made of whole steps by the tile unit, which wants flattened positions, and
/// of quads of bytes elsewhere.
std::vector<Stretch> stretches(const ConvShape& s, int64_t pitch, Positions positions,
                               bool by_pixel) {
  const int64_t unit = positions == Positions::Flattened ? kTileDepth : 4;
  const auto units = [&](int64_t columns) {
    const int64_t bytes = (columns - 1) * pitch + s.group_in();
    return (bytes + unit - 1) / unit;
  };
  const bool whole = !by_pixel && s.dilation_w == 1 && units(s.kernel_w) <= s.kernel_w * units(1);
  std::vector<Stretch> list;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    if (whole)
      list.push_back({ky, 0, s.kernel_w});
    else
      for (int64_t kx = 0; kx < s.kernel_w; ++kx)
        list.push_back({ky, kx, 1});
  }
  return list;
}

void plan_steps(ConvPlan& plan, const std::vector<Stretch>& list, int64_t pitch) {
  const ConvShape& s = plan.shape;
  const int64_t channels = s.group_in(), area = s.kernel_h * s.kernel_w;
  for (const Stretch& stretch : list) {
    const int64_t bytes = (stretch.columns - 1) * pitch + channels;
    for (int64_t first = 0; first < bytes; first += kTileDepth) {
      int64_t last_live = -1;
      for (int64_t b = 0; b < kTileDepth; ++b) {
        const int64_t column = (first + b) / pitch, c = (first + b) % pitch;
        const bool live = first + b < bytes && column < stretch.columns && c < channels;
        plan.source.push_back(
            live ? static_cast<int32_t>(c * area + stretch.ky * s.kernel_w + stretch.kx + column)
                 : -1);
        if (live) last_live = b;
      }
      plan.live_quads.push_back(static_cast<uint8_t>(last_live / 4 + 1));
    }
  }
  plan.steps = static_cast<int64_t>(plan.live_quads.size());
}

/// Offsets of the steps for output rows whose first kernel row is padded row `p`.
std::vector<int64_t> step_offsets(const ConvShape& s, const std::vector<Stretch>& list,
                                  const ImageLayout& in, int64_t p) {
  std::vector<int64_t> offsets;
  for (const Stretch& stretch : list) {
    const int64_t bytes = (stretch.columns - 1) * in.pitch + s.group_in();
    const int64_t start = in.row_offset(p + stretch.ky * s.dilation_h) - in.row_offset(p) +
                          stretch.kx * s.dilation_w * in.pitch;
    for (int64_t first = 0; first < bytes; first += kTileDepth)
      offsets.push_back(start + first);
  }
  return offsets;
}

struct Rows {
  int64_t first, step, count;  // output rows of one run
  int64_t per_row;             // positions from one of them to the next
};

int64_t tiles(int64_t positions) { return (positions + 15) / 16; }

/// Output rows in runs of equal step offsets. Where positions are flattened: row by row if that
/// wastes less.
std::vector<Rows> row_runs(const ConvShape& s, const ImageLayout& in, Positions positions) {
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  const int64_t step = in.phases / std::gcd(in.phases, s.stride_h);
  // Rows of one run move this many rows of the layout.
  const int64_t advance = s.stride_h * step / in.phases;
  const int64_t per_row = advance * in.columns / s.stride_w;
  const bool even = advance * in.columns % s.stride_w == 0 && per_row >= out_w;
  std::vector<Rows> runs;
  int64_t flat_tiles = 0;
  for (int64_t first = 0; first < std::min(step, out_h); ++first) {
    const int64_t count = (out_h - first + step - 1) / step;
    runs.push_back({first, step, count, positions == Positions::Listed ? out_w : per_row});
    flat_tiles += tiles((count - 1) * per_row + out_w);
  }
  if (positions == Positions::Listed || (even && flat_tiles <= out_h * tiles(out_w))) return runs;
  runs.clear();
  for (int64_t y = 0; y < out_h; ++y)
    runs.push_back({y, 1, 1, out_w});
  return runs;
}

/// One entry per position of a run: `at(y, x)` for those that are outputs, -1 between rows.
template <class Fn>
std::vector<int32_t> table_of(const Rows& rows, int64_t out_w, const Fn& at) {
  const int64_t positions = (rows.count - 1) * rows.per_row + out_w;
  std::vector<int32_t> table(static_cast<size_t>(positions), -1);
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t x = 0; x < out_w; ++x)
      table[i * rows.per_row + x] = static_cast<int32_t>(at(rows.first + i * rows.step, x));
  return table;
}

}  // namespace

Padding padding_of(const ConvShape& s) {
  const int64_t last_row = (s.out_h() - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h;
  const int64_t last_column = (s.out_w() - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w;
  const auto beyond = [](int64_t last, int64_t before, int64_t size) {
    return std::max<int64_t>(0, last - before - (size - 1));
  };
  return {std::max<int64_t>(0, s.pad_top), std::max<int64_t>(0, s.pad_left),
          beyond(last_row, s.pad_top, s.in_h), beyond(last_column, s.pad_left, s.in_w)};
}

ConvPlan plan_conv(const ConvShape& shape, const ImageLayout& in, const ImageLayout* out,
                   const ImageLayout* residual, const KernelRow& kernels, const OutputMap& map,
                   bool by_pixel) {
  const Positions positions = kernels.positions;
  const auto large = [](const ImageLayout* l) {
    return l != nullptr && l->image_bytes > INT32_MAX;
  };
  if (large(&in) || large(out) || large(residual))
    throw InvalidArgument("convolution: an image of 2^31 or more bytes is not supported");
  ConvPlan plan;
  plan.shape = shape;
  plan.shape.batch = 1;
  plan.arrangement = kernels.arrangement;
  plan.position_stride = in.bounded(shape.stride_w) * in.pitch;
  plan.column_tiles = (shape.group_out() + kTileWidth - 1) / kTileWidth;
  plan.in_image_bytes = in.image_bytes;
  const int64_t out_h = shape.out_h(), out_w = shape.out_w();
  const int64_t image_w = map.image_w == 0 ? out_w : map.image_w;
  plan.out_area = (map.image_h == 0 ? out_h : map.image_h) * image_w;
  if (out != nullptr) {
    plan.out_image_bytes = out->image_bytes;
    plan.out_pitch = out->pitch;
  }
  if (residual != nullptr) plan.residual_image_bytes = residual->image_bytes;
  const std::vector<Stretch> list = stretches(shape, in.pitch, positions, by_pixel);
  plan_steps(plan, list, in.pitch);
  if (out_h <= 0 || out_w <= 0) return plan;
  for (const Rows& rows : row_runs(shape, in, positions)) {
    ConvRun run;
    const int64_t p = rows.first * shape.stride_h - shape.pad_top + in.pad_top;
    run.base = in.row_offset(p) + (in.pad_left - shape.pad_left) * in.pitch;
    run.positions = (rows.count - 1) * rows.per_row + out_w;
    run.step_offsets = step_offsets(shape, list, in, p);
    run.in_offset.resize(static_cast<size_t>(run.positions));
    for (int64_t i = 0; i < run.positions; ++i) {
      const int64_t row = p + i / rows.per_row * rows.step * shape.stride_h;
      const int64_t at =
          positions == Positions::Listed
              ? in.row_offset(row) - in.row_offset(p) + i % rows.per_row * plan.position_stride
              : i * plan.position_stride;
      run.in_offset[i] = static_cast<int32_t>(at);
    }
    const auto offset_in = [&](const ImageLayout& layout) {
      return table_of(rows, out_w, [&](int64_t y, int64_t x) {
        return layout.offset(map.first_y + y * map.step_y, map.first_x + x * map.step_x);
      });
    };
    if (out != nullptr)
      run.out_offset = offset_in(*out);
    else
      run.position = table_of(rows, out_w, [&](int64_t y, int64_t x) {
        return (map.first_y + y * map.step_y) * image_w + map.first_x + x * map.step_x;
      });
    run.dropped = rows.count > 1 && rows.per_row > out_w;
    if (residual != nullptr) run.residual_offset = offset_in(*residual);
    plan.runs.push_back(std::move(run));
  }
  return plan;
}

void fill_tile(const ConvPlan& plan, std::span<const int8_t> weights, int64_t tile, int64_t step,
               int8_t* out) {
  const int64_t outs = plan.shape.group_out(), reduction = plan.shape.reduction();
  const int64_t group = tile / plan.column_tiles;
  const int64_t first = tile % plan.column_tiles * kTileWidth;
  for (int64_t depth = 0; depth < kTileDepth; ++depth) {
    const int32_t from = plan.source[step * kTileDepth + depth];
    for (int64_t n = 0; n < kTileWidth; ++n) {
      const int64_t o = first + n;
      out[depth / 4 * 64 + n * 4 + depth % 4] =
          from < 0 || o >= outs ? int8_t{0} : weights[(group * outs + o) * reduction + from];
    }
  }
}

PanelWriter::PanelWriter(const ConvPlan& plan, std::span<const int8_t> weights, int bits,
                         uint8_t* out)
    : plan_(plan), weights_(weights), bits_(bits), out_(out) {
  if (plan.arranged(bits))
    scratch_ = AlignedBuffer(static_cast<size_t>(plan.arrangement->scratch_bytes(plan.steps)));
}

void PanelWriter::write(int64_t tile, std::span<const int32_t> steps) {
  int8_t unpacked[kTileBytes];
  uint8_t* const first = out_;
  const auto count = static_cast<int64_t>(steps.size());
  for (int64_t k = 0; k < count; ++k) {
    fill_tile(plan_, weights_, tile, steps[k], unpacked);
    formats::pack_tile(unpacked, bits_, first + k * 128 * bits_);
  }
  if (plan_.arranged(bits_)) {
    live_quads_.clear();
    for (const int32_t step : steps)
      live_quads_.push_back(plan_.live_quads[step]);
    plan_.arrangement->arrange(reinterpret_cast<int8_t*>(first), count, live_quads_.data(),
                               plan_.qmax, scratch_.data());
  }
  out_ = first + plan_.panel_bytes(count, bits_);
}

void pack_panels(const ConvPlan& plan, std::span<const int8_t> weights, int bits, uint8_t* out) {
  std::vector<int32_t> steps(static_cast<size_t>(plan.steps));
  std::iota(steps.begin(), steps.end(), 0);
  PanelWriter writer(plan, weights, bits, out);
  for (int64_t t = 0; t < plan.all_tiles(); ++t)
    writer.write(t, steps);
}

}  // namespace adalayer::cpu

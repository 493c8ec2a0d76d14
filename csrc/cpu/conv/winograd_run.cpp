#include <algorithm>
#include <numeric>

#include "cpu/conv/winograd.hpp"
#include "formats/panels.hpp"

namespace adalayer::cpu {
namespace {

/// `count` elements of T at a time from a 64-byte aligned piece of memory; from none, to see how
/// large it has to be.
class Carver {
 public:
  explicit Carver(uint8_t* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = taken_;
    taken_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + at);
  }
  int64_t taken() const { return taken_; }

 private:
  uint8_t* memory_;
  int64_t taken_ = 0;
};

/// Bytes from tap to tap, for elements that lie so far apart: an odd number of cache lines, so that
/// the taps of a tile are in different sets of the cache.
int64_t odd_lines(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

struct Buffers {
  uint8_t* factors;       // [area] at factor_stride, [block][depth] of int16 or int8 each
  int64_t factor_stride;  // bytes
  int32_t* products;      // [area] at product_stride, [block][width] each
  int64_t product_stride;
  int32_t* sums;       // of as many tiles as the kernels have rows
  int32_t* positions;  // of a row of their outputs
  // Where taps are made in the call:
  int8_t* weights;  // of a group
  uint8_t* taps;    // of as many groups as the kernels take

  Buffers(const WinogradPlan& plan, const WinogradKernels& kernels, int64_t made_bytes,
          Carver& memory) {
    const int64_t width = int64_t{kernels.groups} * kWinogradGroup, outputs = plan.tile * plan.tile;
    factor_stride = odd_lines(plan.block * plan.depth * plan.factor_bytes());
    product_stride = odd_lines(plan.block * width * 4) / 4;
    factors = memory.take<uint8_t>(plan.area * factor_stride);
    products = memory.take<int32_t>(plan.area * product_stride);
    sums = memory.take<int32_t>(kernels.rows * outputs * width);
    positions = memory.take<int32_t>(kernels.rows * plan.tile);
    weights = nullptr;
    taps = nullptr;
    if (made_bytes == 0) return;
    const int64_t cell = plan.bytes == nullptr ? 2 : plan.bytes->cell;
    const int64_t channels = (plan.shape.in_channels + cell - 1) / cell * cell;
    weights = memory.take<int8_t>(9 * channels * kWinogradGroup + formats::kTileBytes);
    taps = memory.take<uint8_t>(kernels.groups * made_bytes);
  }
};

/// A tile of the batch, in the order of rows.
struct Tile {
  int64_t image, y, x;  // of its first output

  Tile(const WinogradPlan& plan, int64_t index)
      : image(index / plan.tiles()),
        y(index % plan.tiles() / plan.tiles_w * plan.tile),
        x(index % plan.tiles_w * plan.tile) {}
  void step(const WinogradPlan& plan) {
    if ((x += plan.tile) < plan.tiles_w * plan.tile) return;
    x = 0;
    if ((y += plan.tile) < plan.tiles_h * plan.tile) return;
    y = 0;
    ++image;
  }
};

struct Loop {
  const WinogradCall& call;
  const TensorWinogradCall* tensor;  // null where the output is an image
  const WinogradKernels& kernels;
  const KernelRow& row;
  Requantize requantize;
  UnpackTiles unpack;
  Buffers buffers;
  int64_t first_group, last_group;

  /// Tiles [first, first + count) by all groups.
  void block(int64_t first, int count) const {
    transform(first, count);
    for (int64_t g = first_group; g < last_group; g += kernels.groups) {
      const int groups = static_cast<int>(std::min<int64_t>(kernels.groups, last_group - g));
      multiply(taps_of(g, groups), groups, count);
      for (int t = 0; t < count; t += kernels.rows)
        finish(g, groups, first, t, std::min(kernels.rows, count - t));
    }
  }

  void transform(int64_t first, int count) const {
    const WinogradPlan& plan = call.plan;
    if (const WinogradByteKernels* bytes = plan.bytes) {
      WinogradByteInputArgs a{};
      a.tap_stride = buffers.factor_stride;
      each_tile(first, count, a, [&](int t) {
        const int alone = t % bytes->together;
        a.factors = reinterpret_cast<int8_t*>(buffers.factors) + (t - alone) * plan.depth +
                    alone * bytes->cell;
        bytes->input(a);
      });
    } else {
      WinogradInputArgs a{};
      a.tap_stride = buffers.factor_stride / 2;
      each_tile(first, count, a, [&](int t) {
        a.factors = reinterpret_cast<int16_t*>(buffers.factors) + t * plan.depth;
        kernels.input[static_cast<int>(plan.form)](a);
      });
    }
  }

  /// fn(0), fn(1) ... of `count` tiles, with where each one's levels are in `args`.
  template <class Args, class Fn>
  void each_tile(int64_t first, int count, Args& args, const Fn& fn) const {
    const WinogradPlan& plan = call.plan;
    args.pitch = plan.in_pitch;
    args.channels = plan.shape.in_channels;
    Tile tile(plan, first);
    for (int t = 0; t < count; ++t, tile.step(plan)) {
      const uint8_t* const column =
          call.in + tile.image * plan.in_image_bytes + plan.in_base + tile.x * plan.in_pitch;
      for (int i = 0; i < plan.tile + 2; ++i)
        args.rows[i] = column + plan.in_row[tile.y + i];
      fn(t);
    }
  }

  /// The taps of groups [group, group + groups), which may have to be made.
  const uint8_t* taps_of(int64_t group, int groups) const {
    const WinogradTaps& taps = call.taps;
    if (call.packed_bits == 0) return call.data + group * taps.group_bytes;
    const int64_t bytes = winograd_packed_group_bytes(taps, call.packed_bits);
    for (int g = 0; g < groups; ++g) {
      const uint8_t* packed = call.data + (group + g) * bytes;
      const int8_t* weights = reinterpret_cast<const int8_t*>(packed);
      if (call.packed_bits < 8) {
        unpack(packed, call.packed_bits, bytes / (formats::kTileBytes / 8 * call.packed_bits),
               buffers.weights);
        weights = buffers.weights;
      }
      kernels.taps[static_cast<int>(call.plan.form)]({.weights = weights,
                                                      .elements = taps.elements(),
                                                      .narrow = taps.is_narrow.data(),
                                                      .offset = taps.offset.data(),
                                                      .taps = buffers.taps + g * taps.group_bytes});
      if (taps.in_bytes()) write_winograd_base(taps, buffers.taps + g * taps.group_bytes);
    }
    return buffers.taps;
  }

  void multiply(const uint8_t* taps_at, int groups, int count) const {
    const WinogradTaps& taps = call.taps;
    if (call.plan.bytes != nullptr) return multiply_bytes(taps_at, groups, count);
    WinogradProductArgs a{};
    a.factor_stride = call.plan.depth;
    a.group_bytes = taps.group_bytes;
    a.pairs = taps.cells();
    a.rows = count;
    a.groups = groups;
    for (int k = 0; k < taps.area; ++k) {
      a.factors = reinterpret_cast<const int16_t*>(buffers.factors + k * buffers.factor_stride);
      a.taps = taps_at + taps.offset[k];
      a.narrow = taps.is_narrow[k];
      a.products = buffers.products + k * buffers.product_stride;
      kernels.multiply(a);
    }
  }

  void multiply_bytes(const uint8_t* group, int groups, int count) const {
    const WinogradTaps& taps = call.taps;
    WinogradByteProductArgs a{};
    a.depth = call.plan.depth;
    a.cells = taps.cells();
    a.rows = count;
    a.product_stride = int64_t{groups} * kWinogradGroup;
    for (int g = 0; g < groups; ++g, group += taps.group_bytes)
      for (int k = 0; k < taps.area; ++k) {
        a.factors = reinterpret_cast<const int8_t*>(buffers.factors + k * buffers.factor_stride);
        a.taps = reinterpret_cast<const int8_t*>(group + taps.offset[k]);
        a.base = k == reference::kWinogradSumTap
                     ? reinterpret_cast<const int32_t*>(group + taps.base_offset)
                     : nullptr;
        a.products = buffers.products + k * buffers.product_stride + g * kWinogradGroup;
        call.plan.bytes->multiply(a);
      }
  }

  /// Tiles [t, t + tiles) of the block that begins with tile `first`.
  void finish(int64_t group, int groups, int64_t first, int t, int tiles) const {
    const WinogradPlan& plan = call.plan;
    const int width = groups * kWinogradGroup;
    // A tensor takes rows of positions that are neighbours, across tiles.
    const int64_t line = int64_t{plan.tile} * width;
    kernels.output[static_cast<int>(plan.form)](
        {.products = buffers.products + t * width,
         .tap_stride = buffers.product_stride,
         .tiles = tiles,
         .width = width,
         .sums = buffers.sums,
         .tile_stride = tensor != nullptr ? line : line * plan.tile,
         .row_stride = tensor != nullptr ? line * tiles : line});
    const int64_t channel = group * kWinogradGroup;
    const int cols = static_cast<int>(std::min<int64_t>(width, plan.shape.out_channels - channel));
    const int64_t per_run = tensor != nullptr ? plan.tiles_w : plan.tiles();
    for (int begin = 0, end; begin < tiles; begin = end) {
      // Tiles of one image, or of one of its rows.
      const int64_t index = first + t + begin;
      end = static_cast<int>(std::min<int64_t>(tiles, begin + per_run - index % per_run));
      if (tensor != nullptr)
        store(channel, cols, width, {index, begin, end - begin}, tiles);
      else
        to_image(channel, cols, groups, {index, begin, end - begin});
    }
  }

  /// Neighbouring tiles: the first one's index in the batch, and in the sums.
  struct Run {
    int64_t index;
    int begin, count;
  };

  void to_image(int64_t channel, int cols, int groups, const Run& run) const {
    const WinogradPlan& plan = call.plan;
    const int outputs = plan.tile * plan.tile, width = groups * kWinogradGroup;
    const int64_t image = run.index / plan.tiles(), first = run.index % plan.tiles() * outputs;
    RequantizeArgs q{};
    q.sums = buffers.sums + int64_t{run.begin} * outputs * width;
    q.tiles = groups;
    q.rows = run.count * outputs;
    q.cols = cols;
    q.whole = channel + width <= plan.out_pitch;
    q.out_offset = plan.out_offset.data() + first;
    q.out = call.out + image * plan.out_image_bytes + channel;
    if (call.residual != nullptr) {
      q.residual_offset = plan.residual_offset.data() + first;
      q.residual = call.residual + image * plan.residual_image_bytes + channel;
    }
    q.epilogue = call.epilogue;
    q.channel = channel;
    requantize(q);
  }

  void store(int64_t channel, int cols, int width, const Run& run, int tiles) const {
    const WinogradPlan& plan = call.plan;
    const bool interleaved = tensor->out.layout == Layout::NHWC;
    const int64_t channels = plan.shape.out_channels;
    const int64_t out_h = plan.shape.out_h(), out_w = plan.shape.out_w(), area = out_h * out_w;
    const Tile tile(plan, run.index);
    StoreArgs s{};
    s.sums_stride = width;
    s.cols = cols;
    s.correction = tensor->correction + channel;
    s.channel = channel;
    s.out = &tensor->out;
    s.position_stride = interleaved ? channels : 1;
    s.channel_stride = interleaved ? 1 : area;
    s.first = (tensor->first_image + tile.image) * area * channels + channel * s.channel_stride;
    s.rows = static_cast<int>(std::min<int64_t>(run.count * plan.tile, out_w - tile.x));
    s.position = buffers.positions;
    for (int64_t i = 0; i < std::min<int64_t>(plan.tile, out_h - tile.y); ++i) {
      std::iota(buffers.positions, buffers.positions + s.rows,
                static_cast<int32_t>((tile.y + i) * out_w + tile.x));
      s.sums = buffers.sums + (i * tiles + run.begin) * plan.tile * width;
      row.store(s);
    }
  }
};

int64_t steps_of(const WinogradTaps& taps, const WinogradKernels& kernels) {
  return (taps.groups() + kernels.groups - 1) / kernels.groups;
}

void run(const WinogradCall& call, const TensorWinogradCall* tensor, const WinogradKernels& kernels,
         const KernelRow& row, uint8_t* scratch, Part part) {
  const WinogradPlan& plan = call.plan;
  const int64_t tiles = plan.tiles() * call.images;
  // Parts by columns are whole steps of the kernels.
  const int64_t steps = steps_of(call.taps, kernels);
  const int64_t first = call.by_columns ? 0 : part.first(tiles);
  const int64_t last = call.by_columns ? tiles : part.last(tiles);
  const int64_t first_step = call.by_columns ? part.first(steps) : 0;
  const int64_t last_step = call.by_columns ? part.last(steps) : steps;
  if (first == last || first_step == last_step) return;
  Carver memory(scratch);
  const Loop loop{call,
                  tensor,
                  kernels,
                  row,
                  requantizer(row),
                  unpacker(row),
                  Buffers(plan, kernels, call.packed_bits == 0 ? 0 : call.taps.group_bytes, memory),
                  first_step * kernels.groups,
                  std::min(last_step * kernels.groups, call.taps.groups())};
  // Blocks of nearly equal size.
  const Part blocks{0, (last - first + plan.block - 1) / plan.block};
  for (Part block = blocks; block.index < blocks.count; ++block.index) {
    const int64_t begin = block.first(last - first), end = block.last(last - first);
    loop.block(first + begin, static_cast<int>(end - begin));
  }
}

}  // namespace

int64_t winograd_scratch_bytes(const WinogradPlan& plan, const WinogradKernels& kernels,
                               int64_t made_bytes) {
  Carver memory(nullptr);
  const Buffers buffers(plan, kernels, made_bytes, memory);
  return memory.taken();
}

std::pair<int64_t, int64_t> winograd_weight_range(const WinogradTaps& taps, int64_t group_bytes,
                                                  const WinogradKernels& kernels, Part part) {
  const int64_t steps = steps_of(taps, kernels);
  const auto at = [&](int64_t step) {
    return std::min(step * kernels.groups, taps.groups()) * group_bytes;
  };
  return {at(part.first(steps)), at(part.last(steps))};
}

void run_winograd(const WinogradCall& call, const WinogradKernels& kernels, const KernelRow& row,
                  uint8_t* scratch, Part part) {
  run(call, nullptr, kernels, row, scratch, part);
}

void run_winograd(const TensorWinogradCall& call, const WinogradKernels& kernels,
                  const KernelRow& row, uint8_t* scratch, Part part) {
  run(call.conv, &call, kernels, row, scratch, part);
}

}  // namespace adalayer::cpu

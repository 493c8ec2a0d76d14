#include "cpu/dispatch.hpp"

#include <cstring>
#include <string>

#include "core/status.hpp"
#include "core/thread_pool.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/packed_image.hpp"
#include "reference/reference.hpp"

namespace adalayer::cpu {
namespace {

using formats::kTileBytes;
using formats::PanelKind;
using formats::Panels;
using formats::PanelTag;

// Packed activations of one task should stay in the second-level cache (2 MiB on the machines this
// was tuned on, 1 MiB on older ones) beside the weights that stream past them.
constexpr int64_t kImageBudget = 512 << 10;
// Unpacked weights up to this size are kept whole, so that each activation block is read once and
// multiplied by all of them; larger ones go column pair by column pair over all activations.
constexpr int64_t kResidentWeights = 192 << 10;
// Below about this many nanoseconds of work a fork-join (2-5 us) costs more than it saves.
constexpr int64_t kSerialNanoseconds = 8000;
// Output positions of one image are int32 in the kernels.
constexpr int64_t kMaxPositions = int64_t{1} << 31;

/// Buffers of one thread; they grow to the largest layer and are then reused, so that a warm call
/// allocates nothing.
struct Scratch {
  AlignedBuffer image, row, weights, sums, position;
  AlignedBuffer correction, offsets;  // filled by the calling thread, read by all
};
Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

uint8_t* grown(AlignedBuffer& buffer, int64_t bytes) {
  if (static_cast<int64_t>(buffer.size()) < bytes) buffer.reset(static_cast<size_t>(bytes));
  return buffer.data();
}

/// What every task of one call reads.
struct Call {
  const ConvShape& shape;
  const ActivationIn& in;
  const Panels& panels;
  const OutputSpec& out;
  const KernelRow& kernels;
  UnpackTiles unpack_tiles;
  Gemv gemv;
  const PackedImage& image;
  int weight_bits;            // of the layer, before any unpacking at load
  const int32_t* correction;  // [out_channels]
  const int64_t* offsets;     // matmul: [steps]; depthwise: [taps rounded up to even]
  int64_t image_stride;       // bytes between packed images, slack included
};

int64_t output_elements(const ConvShape& s) { return s.out_h() * s.out_w(); }

StoreArgs store_args(const Call& call, int64_t n, int64_t channel, int cols) {
  const ConvShape& s = call.shape;
  const bool interleaved = call.out.layout == Layout::NHWC;
  const int64_t area = output_elements(s);
  const int64_t first =
      interleaved ? n * area * s.out_channels + channel : (n * s.out_channels + channel) * area;
  StoreArgs store{};
  store.cols = cols;
  store.correction = call.correction + channel;
  store.channel = channel;
  store.out = &call.out;
  store.first = first;
  store.position_stride = interleaved ? s.out_channels : 1;
  store.channel_stride = interleaved ? 1 : area;
  return store;
}

void pack_rows(const Call& call, int64_t n, int64_t first, int64_t last, uint8_t* packed) {
  uint8_t* row = grown(scratch().row, call.shape.in_w * call.shape.in_channels + 64);
  for (int64_t r = first; r < last; ++r)
    pack_row(call.shape, call.in, call.kernels, call.image, n, r, packed, row);
}

// ---------------------------------------------------------------------------------------- matmul

/// Output positions [first, first + rows) of the flattened image, or -1 between rows.
void fill_positions(const Call& call, int64_t first, int rows, int32_t* position) {
  const int64_t out_w = call.shape.out_w(), per_row = call.image.positions_per_row;
  int64_t y = first / per_row, x = first % per_row;
  for (int r = 0; r < rows; ++r) {
    position[r] = x < out_w ? static_cast<int32_t>(y * out_w + x) : -1;
    if (++x == per_row) {
      x = 0;
      ++y;
    }
  }
}

/// A rectangle of work: images x flattened positions x column pairs of all groups.
struct Block {
  int64_t image_first, image_last;
  int64_t position_first, position_last;
  int64_t pair_first, pair_last;  // over groups * ceil(column_tiles / 2)
};

/// At most kGemvRows positions per image: every weight is used once for all of them, so that none
/// is unpacked to memory.
void gemv_block(const Call& call, const uint8_t* packed, const Block& block) {
  // Column tiles whose sums are stored together: a few kilobytes of them, some hundred of weights.
  constexpr int64_t kTilesAtOnce = 32;
  const Panels& panels = call.panels;
  const int64_t pairs_per_group = (panels.column_tiles + 1) / 2;
  auto* sums = reinterpret_cast<int32_t*>(
      grown(scratch().sums, kGemvRows * kTilesAtOnce * formats::kTileWidth * 4));
  int32_t position[kGemvRows];
  GemvArgs args{};
  args.row_stride = call.shape.stride_w * call.image.pitch;
  args.step_offsets = call.offsets;
  args.steps = panels.reduction.steps;
  args.bits = panels.tag.bits;
  args.rows = static_cast<int>(block.position_last - block.position_first);
  args.sums = sums;
  args.sums_stride = kTilesAtOnce * formats::kTileWidth;
  fill_positions(call, block.position_first, args.rows, position);
  for (int64_t n = block.image_first; n < block.image_last; ++n) {
    const uint8_t* image = packed + (n - block.image_first) * call.image_stride;
    for (int64_t pair = block.pair_first; pair < block.pair_last;) {
      const int64_t g = pair / pairs_per_group, tile = pair % pairs_per_group * 2;
      const int64_t pairs =
          std::min({kTilesAtOnce / 2, pairs_per_group - tile / 2, block.pair_last - pair});
      args.column_tiles = std::min(pairs * 2, panels.column_tiles - tile);
      args.packed = panels.tile(g, tile);
      args.activations =
          image + g * call.image.group_bytes + block.position_first * args.row_stride;
      call.gemv(args);
      const int64_t column = tile * formats::kTileWidth, outs = call.shape.group_out();
      StoreArgs store = store_args(
          call, n, g * outs + column,
          static_cast<int>(std::min(args.column_tiles * formats::kTileWidth, outs - column)));
      store.sums = sums;
      store.sums_stride = args.sums_stride;
      store.position = position;
      store.rows = args.rows;
      call.kernels.store(store);
      pair += pairs;
    }
  }
}

void matmul_block(const Call& call, const uint8_t* packed, const Block& block) {
  const Panels& panels = call.panels;
  const int64_t steps = panels.reduction.steps;
  const int64_t pairs_per_group = (panels.column_tiles + 1) / 2;
  const int64_t pair_bytes = 2 * steps * kTileBytes;
  const bool unpack = panels.tag.bits < 8;
  const int64_t pair_count = block.pair_last - block.pair_first;
  const bool resident = pair_count * pair_bytes <= kResidentWeights;
  // How many column pairs are multiplied per visit of an activation block.
  const int64_t visit = resident ? pair_count : 1;

  Scratch& local = scratch();
  auto* unpacked = unpack ? grown(local.weights, visit * pair_bytes) : nullptr;
  auto* sums = reinterpret_cast<int32_t*>(grown(local.sums, kBlockRows * kBlockCols * 4));
  int32_t position[kBlockRows];

  GemmArgs gemm{};
  const int64_t row_stride = call.shape.stride_w * call.image.pitch;
  int32_t row_offsets[kBlockRows];
  for (int r = 0; r < kBlockRows; ++r)
    row_offsets[r] = static_cast<int32_t>(r * row_stride);
  gemm.row_offsets = row_offsets;
  gemm.row_stride = row_stride;
  gemm.step_offsets = call.offsets;
  gemm.live_quads = panels.live_quads.data();
  gemm.steps = steps;
  gemm.weight_bits = call.weight_bits;
  gemm.sums = sums;

  call.kernels.begin();
  for (int64_t visit_first = block.pair_first; visit_first < block.pair_last;
       visit_first += visit) {
    const int64_t visit_last = std::min(visit_first + visit, block.pair_last);
    if (unpack) {
      for (int64_t p = visit_first; p < visit_last; ++p) {
        const int64_t g = p / pairs_per_group, tile = p % pairs_per_group * 2;
        const int64_t tiles = std::min<int64_t>(2, panels.column_tiles - tile);
        call.unpack_tiles(panels.tile(g, tile), panels.tag.bits, tiles * steps,
                          reinterpret_cast<int8_t*>(unpacked + (p - visit_first) * pair_bytes));
      }
    }
    for (int64_t n = block.image_first; n < block.image_last; ++n) {
      const uint8_t* image = packed + (n - block.image_first) * call.image_stride;
      for (int64_t m = block.position_first; m < block.position_last; m += kBlockRows) {
        gemm.rows = static_cast<int>(std::min<int64_t>(kBlockRows, block.position_last - m));
        fill_positions(call, m, gemm.rows, position);
        for (int64_t p = visit_first; p < visit_last; ++p) {
          const int64_t g = p / pairs_per_group, tile = p % pairs_per_group * 2;
          gemm.activations = image + g * call.image.group_bytes + m * row_stride;
          gemm.tile0 = unpack ? reinterpret_cast<int8_t*>(unpacked + (p - visit_first) * pair_bytes)
                              : reinterpret_cast<const int8_t*>(panels.tile(g, tile));
          gemm.tile1 = tile + 1 < panels.column_tiles ? gemm.tile0 + steps * kTileBytes : nullptr;
          call.kernels.gemm(gemm);
          const int64_t column = tile * formats::kTileWidth;
          const int64_t outs = call.shape.group_out();
          StoreArgs store =
              store_args(call, n, g * outs + column,
                         static_cast<int>(std::min<int64_t>(kBlockCols, outs - column)));
          store.sums = sums;
          store.sums_stride = kBlockCols;
          store.position = position;
          store.rows = gemm.rows;
          call.kernels.store(store);
        }
      }
    }
  }
  call.kernels.end();
}

/// Parts of one image group that different threads take: by positions where the weights are small,
/// by output channels where they are large (each thread then unpacks only its own).
int64_t matmul_parts(const Call& call, int threads, bool* by_columns) {
  const Panels& panels = call.panels;
  const int64_t pairs = panels.groups * ((panels.column_tiles + 1) / 2);
  const int64_t blocks = (call.image.positions + kBlockRows - 1) / kBlockRows;
  const int64_t weight_bytes = pairs * 2 * panels.reduction.steps * kTileBytes;
  *by_columns = pairs >= threads && (weight_bytes > kResidentWeights || blocks < threads);
  // A few parts per thread even out what a neighbour on the core takes away.
  return *by_columns ? std::min<int64_t>(pairs, threads * 2)
                     : std::min<int64_t>(blocks, threads * 2);
}

void matmul_part(const Call& call, const uint8_t* packed, int64_t image_first, int64_t image_last,
                 int64_t part, int64_t parts, bool by_columns) {
  const int64_t pairs = call.panels.groups * ((call.panels.column_tiles + 1) / 2);
  const int64_t blocks = (call.image.positions + kBlockRows - 1) / kBlockRows;
  Block block{image_first, image_last, 0, call.image.positions, 0, pairs};
  if (by_columns) {
    block.pair_first = pairs * part / parts;
    block.pair_last = pairs * (part + 1) / parts;
  } else {
    block.position_first = blocks * part / parts * kBlockRows;
    block.position_last = std::min(blocks * (part + 1) / parts * kBlockRows, call.image.positions);
  }
  if (block.position_last - block.position_first <= kGemvRows)
    gemv_block(call, packed, block);
  else
    matmul_block(call, packed, block);
}

// ------------------------------------------------------------------------------------- depthwise

void depthwise_rows(const Call& call, const uint8_t* packed, int64_t n, int64_t first,
                    int64_t last) {
  const ConvShape& s = call.shape;
  const int64_t out_w = s.out_w(), taps = s.kernel_h * s.kernel_w;
  Scratch& local = scratch();
  DepthwiseArgs d{};
  d.tap_offsets = call.offsets;
  d.weights = reinterpret_cast<const int16_t*>(call.panels.data.data());
  d.pairs = (taps + 1) / 2;
  d.padded_channels = call.image.pitch;
  d.count = out_w;
  d.position_bytes = s.stride_w * call.image.pitch;
  d.sums = reinterpret_cast<int32_t*>(grown(local.sums, out_w * d.padded_channels * 4));
  auto* position = reinterpret_cast<int32_t*>(grown(local.position, out_w * 4));
  for (int64_t y = first; y < last; ++y) {
    d.activations = packed + y * call.image.row_bytes;
    call.kernels.depthwise(d);
    for (int64_t x = 0; x < out_w; ++x)
      position[x] = static_cast<int32_t>(y * out_w + x);
    StoreArgs store = store_args(call, n, 0, static_cast<int>(s.out_channels));
    store.sums = d.sums;
    store.sums_stride = d.padded_channels;
    store.position = position;
    store.rows = static_cast<int>(out_w);
    call.kernels.store(store);
  }
}

// ------------------------------------------------------------------------------------ scheduling

int64_t estimated_nanoseconds(const ConvShape& s) {
  const int64_t in = s.batch * s.in_channels * s.in_h * s.in_w;
  const int64_t out = s.batch * s.out_channels * output_elements(s);
  // Rough rates of one AMX core: 1000 multiply-accumulates and 8 elements per nanosecond.
  return s.macs() / 1000 + (in + out) / 8 + s.out_channels * s.reduction() / 32;
}

template <class Work>
void run_images(const Call& call, int threads, int64_t parts, const Work& work) {
  const int64_t images = call.shape.batch, rows = call.image.padded_rows();
  if (threads == 1 || images >= threads) {
    // Each task packs some images and multiplies them while they are in its cache.
    const int64_t fit = std::max<int64_t>(1, kImageBudget / call.image_stride);
    const int64_t chunk = std::min(fit, (images + threads - 1) / threads);
    parallel_for((images + chunk - 1) / chunk, threads, [&](int64_t task, int) {
      const int64_t first = task * chunk, last = std::min(first + chunk, images);
      uint8_t* packed = grown(scratch().image, (last - first) * call.image_stride);
      for (int64_t n = first; n < last; ++n)
        pack_rows(call, n, 0, rows, packed + (n - first) * call.image_stride);
      work(packed, first, last, 0, 1);
    });
    return;
  }
  uint8_t* packed = grown(scratch().image, images * call.image_stride);
  const int64_t row_parts = std::min<int64_t>(rows, threads * 2);
  parallel_for(images * row_parts, threads, [&](int64_t task, int) {
    const int64_t n = task / row_parts, part = task % row_parts;
    pack_rows(call, n, rows * part / row_parts, rows * (part + 1) / row_parts,
              packed + n * call.image_stride);
  });
  parallel_for(images * parts, threads, [&](int64_t task, int) {
    const int64_t n = task / parts;
    work(packed + n * call.image_stride, n, n + 1, task % parts, parts);
  });
}

/// Images of one pixel are the same bytes in both layouts; as interleaved ones they can be merged.
void prefer_interleaved(const ConvShape& s, ActivationIn& in, OutputSpec& out) {
  if (s.in_h == 1 && s.in_w == 1 && s.out_h() == 1 && s.out_w() == 1)
    in.layout = out.layout = Layout::NHWC;
}

/// A 1x1 convolution without padding over interleaved tensors does not care where images end: one
/// tall image makes full tiles of them all.
ConvShape flattened(const ConvShape& s, const ActivationIn& in, const OutputSpec& out) {
  const bool pointwise = s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 &&
                         s.pad_top == 0 && s.pad_left == 0 && s.pad_bottom == 0 && s.pad_right == 0;
  const bool interleaved = in.layout == Layout::NHWC && out.layout == Layout::NHWC;
  const bool addressable = s.batch * s.in_h * s.in_w < kMaxPositions;
  if (!pointwise || s.depthwise() || !interleaved || !addressable) return s;
  ConvShape flat = s;
  flat.batch = 1;
  flat.in_h = s.batch * s.in_h;
  return flat;
}

void run(const ConvShape& shape, const ActivationIn& in, const LayerWeights& weights,
         const OutputSpec& out, int threads, const KernelRow& kernels) {
  const Panels& panels = weights.panels;
  const bool depthwise = shape.depthwise();
  const PanelTag expected{.kind = depthwise ? PanelKind::Depthwise : PanelKind::Panels,
                          .bits = panels.tag.bits};
  if (panels.tag != expected)
    throw InvalidArgument("conv2d: the derived weights carry another layout's tag");

  Scratch& local = scratch();
  auto* correction = reinterpret_cast<int32_t*>(grown(local.correction, shape.out_channels * 4));
  for (int64_t o = 0; o < shape.out_channels; ++o)
    correction[o] = -in.grid.zero_point * panels.weight_sums[o];

  const int64_t taps = shape.kernel_h * shape.kernel_w;
  const auto& r = panels.reduction;
  const PackedImage image = depthwise ? PackedImage(shape, 1, 1, (shape.in_channels + 15) / 16 * 16)
                                      : PackedImage(shape, shape.groups, r.channel_blocks, r.pitch);
  auto* offsets = reinterpret_cast<int64_t*>(
      grown(local.offsets, (depthwise ? taps + 1 : r.steps) * static_cast<int64_t>(8)));
  if (depthwise) {
    for (int64_t t = 0; t < taps; ++t)
      offsets[t] = image.row_offset(t / shape.kernel_w * shape.dilation_h) +
                   t % shape.kernel_w * shape.dilation_w * image.pitch;
    offsets[taps] = 0;  // the missing partner of an odd tap; its weights are zero
  } else {
    int64_t step = 0;
    for (int64_t b = 0; b < r.channel_blocks; ++b)
      for (int64_t ky = 0; ky < shape.kernel_h; ++ky)
        for (int64_t cg = 0; cg < r.column_groups; ++cg)
          offsets[step++] = b * image.block_bytes + image.row_offset(ky * shape.dilation_h) +
                            cg * r.taps * shape.dilation_w * image.pitch;
  }
  // A block reads 32 positions and 64 bytes from each, whatever it keeps.
  const int64_t slack = kBlockRows * shape.stride_w * image.pitch + 64;
  const int64_t image_stride = (image.bytes + slack + 63) / 64 * 64;
  const Call call{shape,         in,      panels,
                  out,           kernels, unpacker(kernels),
                  gemv(kernels), image,   weights.header.bits,
                  correction,    offsets, image_stride};

  if (estimated_nanoseconds(shape) < kSerialNanoseconds) threads = 1;
  if (depthwise) {
    const int64_t out_h = shape.out_h();
    run_images(
        call, threads, std::min<int64_t>(out_h, threads * 2),
        [&](const uint8_t* packed, int64_t first, int64_t last, int64_t part, int64_t parts) {
          for (int64_t n = first; n < last; ++n)
            depthwise_rows(call, packed + (n - first) * image_stride, n, out_h * part / parts,
                           out_h * (part + 1) / parts);
        });
  } else {
    bool by_columns = false;
    const int64_t parts = matmul_parts(call, threads, &by_columns);
    run_images(
        call, threads, parts,
        [&](const uint8_t* packed, int64_t first, int64_t last, int64_t part, int64_t count) {
          matmul_part(call, packed, first, last, part, count, by_columns && count > 1);
        });
  }
}

/// Splits n elements among threads in runs of whole cache lines.
template <class Fn>
void split_elements(int64_t n, int threads, const Fn& fn) {
  constexpr int64_t kGrain = 1 << 15;
  const int64_t tasks = std::max<int64_t>(1, (n + kGrain - 1) / kGrain);
  parallel_for(tasks, threads, [&](int64_t task, int) {
    const int64_t first = task * kGrain;
    fn(first, std::min(n - first, kGrain));
  });
}

}  // namespace

LayerWeights derive_weights(const ConvShape& shape, std::span<const uint8_t> canonical) {
  LayerWeights weights;
  weights.header = formats::read_header(canonical);
  const auto& h = weights.header;
  if (h.out_channels != shape.out_channels || h.group_in != shape.group_in() ||
      h.kernel_h != shape.kernel_h || h.kernel_w != shape.kernel_w)
    fail<InvalidArgument>("conv2d: expected packed weights of shape [", shape.out_channels, ", ",
                          shape.group_in(), ", ", shape.kernel_h, ", ", shape.kernel_w, "], got [",
                          h.out_channels, ", ", h.group_in, ", ", h.kernel_h, ", ", h.kernel_w,
                          "]");
  check_accumulator(shape.reduction(), h.bits);
  std::vector<int8_t> dense = formats::unpack_canonical(canonical);
  if (active_kernels() == nullptr)
    weights.dense = std::move(dense);
  else if (shape.depthwise())
    weights.panels = formats::build_depthwise(shape, dense);
  else
    weights.panels = formats::build_panels(shape, dense, h.bits);
  return weights;
}

void conv2d(const ConvShape& shape, const ActivationIn& in, const LayerWeights& weights,
            const OutputSpec& out, int threads) {
  validate(shape);
  if (shape.batch == 0 || output_elements(shape) == 0) return;
  const KernelRow* kernels = active_kernels();
  if (kernels == nullptr) {
    if (weights.dense.empty())
      throw InvalidArgument("conv2d: the weights were derived for another instruction set");
    reference::conv2d(shape, in, weights.dense.data(), out, threads);
    return;
  }
  if (output_elements(shape) >= kMaxPositions)
    throw InvalidArgument("conv2d: an output image of 2^31 or more positions is not supported");
  ActivationIn from = in;
  OutputSpec to = out;
  prefer_interleaved(shape, from, to);
  run(flattened(shape, from, to), from, weights, to, threads, *kernels);
}

void quantize(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q, int threads) {
  const KernelRow* kernels = active_kernels();
  if (kernels == nullptr) return reference::quantize(x, n, grid, q);
  split_elements(n, threads, [&](int64_t first, int64_t count) {
    kernels->quantize_row(x + first, count, grid, q + first);
  });
}

void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y,
                   int threads) {
  const KernelRow* kernels = active_kernels();
  if (kernels == nullptr) return reference::fake_quantize(x, n, grid, scale, y);
  split_elements(n, threads, [&](int64_t first, int64_t count) {
    kernels->fake_quantize(x + first, count, grid, scale, y + first);
  });
}

}  // namespace adalayer::cpu

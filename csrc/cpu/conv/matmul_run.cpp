#include <algorithm>

#include "core/aligned_buffer.hpp"
#include "cpu/conv/matmul.hpp"
#include "formats/panels.hpp"

namespace adalayer::cpu {
namespace {

using formats::kTileBytes;
using formats::kTileWidth;

// Weights up to this size stay in the first-level cache beside a block of activations.
constexpr int64_t kFirstLevel = 24 << 10;
// A task's unpacked weights and its activations should stay in the second-level cache together;
// what does not costs about kThirdLevelCost times as much to read again.
constexpr int64_t kSecondLevel = 1 << 20;
constexpr int64_t kThirdLevelCost = 5;
constexpr int64_t kMostUnpacked = 4;  // times the second-level cache
// Bytes to fetch ahead with every step: three lines in the time of four tile products is about what
// memory delivers.
constexpr int64_t kFetchPerStep = 192;
constexpr int kTallRows = 64;
static_assert(kGemmRows >= kTallRows);
constexpr int64_t kSums = kGemmRows * kBlockCols;
constexpr int kTypicalPass = 14;
// Column tiles whose sums of a few rows are stored together.
constexpr int64_t kFewTiles = 32;
static_assert(kGemvRows * kFewTiles * kTileWidth <= 2 * kSums);

/// Buffers of one thread; they grow to the largest layer and stay.
struct Scratch {
  AlignedBuffer unpacked, sums;
  AlignedBuffer step_offsets, live_quads;  // of the steps that a column tile has
};
Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

/// One or two neighbouring column tiles of one group.
struct Columns {
  int64_t group = 0, tile = 0;
  int tiles = 0;
};

// Where the tiles of columns without a step would be: panels of zeros alone take no memory.
alignas(64) constexpr int8_t kNoTiles[64] = {};

/// The steps of the reduction that some columns have weights for.
struct Steps {
  int64_t count;
  const int64_t* offsets;
  const uint8_t* live_quads;
};

struct Loop {
  const ConvCall& call;
  const TensorConvCall* tensor;  // null where the output is an image
  const KernelRow& kernels;
  UnpackTiles unpack_tiles;  // null: tiles are multiplied as they are
  Gemv gemv;
  Requantize requantize;
  int8_t* unpacked;
  int32_t* sums;          // two blocks
  int64_t segment_begin;  // byte of the panels where the part's own weights begin
  bool fused;             // products and requantization are one call
  bool listed;            // column tiles have lists of steps
  Scratch& local;

  int64_t tile_of(const Columns& c) const { return c.group * call.plan.column_tiles + c.tile; }

  int64_t offset(const Columns& c) const {
    const int64_t tile = tile_of(c);
    return call.sparse != nullptr ? call.sparse->byte(tile, call.bits)
                                  : tile * call.plan.packed_tile_bytes(call.bits);
  }

  const uint8_t* packed(const Columns& c) const {
    if (call.weights == nullptr) return reinterpret_cast<const uint8_t*>(kNoTiles);
    return call.weights + offset(c);
  }

  int64_t packed_bytes(const Columns& c) const {
    if (call.sparse == nullptr) return c.tiles * call.plan.packed_tile_bytes(call.bits);
    const int64_t tile = tile_of(c);
    return call.sparse->byte(tile + c.tiles, call.bits) - call.sparse->byte(tile, call.bits);
  }

  /// Columns of more than one tile have the same list. Valid until the next call.
  Steps steps_of(const Columns& c, const ConvRun& run) const {
    const ConvPlan& plan = call.plan;
    if (!listed) return {plan.steps, run.step_offsets.data(), plan.live_quads.data()};
    const SparsePanels::List list = call.sparse->lists[tile_of(c)];
    auto* offsets = grown<int64_t>(local.step_offsets, plan.steps);
    auto* live_quads = grown<uint8_t>(local.live_quads, plan.steps);
    const int32_t* step = call.sparse->steps.data() + list.first;
    for (int32_t k = 0; k < list.count; ++k) {
      offsets[k] = run.step_offsets[step[k]];
      live_quads[k] = plan.live_quads[step[k]];
    }
    return {list.count, offsets, live_quads};
  }

  const uint8_t* activations(const Columns& c, int64_t n, const ConvRun& run) const {
    return call.in + n * call.plan.in_image_bytes + run.base + c.group * call.plan.shape.group_in();
  }

  WeightStream::Piece ahead(const Columns& c, bool fresh, int64_t steps) const {
    if (call.stream == nullptr) return {nullptr, 0};
    const int64_t used = fresh ? packed_bytes(c) : 0;
    return call.stream->take(call.segment, offset(c) - segment_begin,
                             std::max(used, steps * kFetchPerStep));
  }

  /// sums[r][16 * tiles] of positions [first, first + rows) of `run` in image `n`, times `columns`.
  /// `unpacked_at` is where the columns' unpacked tiles are, or go if `fresh`. Returns `tiles`.
  int multiply(const Columns& c, int8_t* unpacked_at, bool fresh, int64_t n, const ConvRun& run,
               int64_t first, int rows, int32_t* at) const {
    const ConvPlan& plan = call.plan;
    if (kernels.positions == Positions::Flattened) {
      const Steps steps = steps_of(c, run);
      const WeightStream::Piece fetch = ahead(c, fresh, steps.count);
      const uint8_t* weights = packed(c);
      const int64_t tile_bytes = steps.count * 128 * call.bits;
      const bool expanded = call.sparse != nullptr && !listed;
      if (expanded && fresh) unpack_tiles(weights, call.bits, c.tiles * steps.count, unpacked_at);
      BlockArgs b{};
      b.activations = activations(c, n, run) + first * plan.position_stride;
      b.row_stride = plan.position_stride;
      b.step_offsets = steps.offsets;
      b.steps = steps.count;
      b.bits = call.bits;
      for (int t = 0; t < c.tiles; ++t) {
        b.packed[t] = weights + t * tile_bytes;
        if (unpack_tiles != nullptr) b.unpacked[t] = unpacked_at + t * steps.count * kTileBytes;
        if (expanded) b.packed[t] = reinterpret_cast<const uint8_t*>(b.unpacked[t]);
      }
      b.unpack = fresh && unpack_tiles != nullptr && !expanded;
      b.rows = rows;
      b.sums = at;
      b.prefetch = fetch.begin;
      b.prefetch_bytes = fetch.bytes;
      kernels.block(b);
      return c.tiles;
    }
    GemmArgs g = gemm_args(c, unpacked_at, fresh, n, run, first, rows);
    g.sums = at;
    kernels.gemm(g);
    return 2;  // gemm's rows are 32 sums apart
  }

  GemmArgs gemm_args(const Columns& c, int8_t* unpacked_at, bool fresh, int64_t n,
                     const ConvRun& run, int64_t first, int rows) const {
    const Steps steps = steps_of(c, run);
    const uint8_t* weights = packed(c);
    if (fresh && unpack_tiles != nullptr)
      unpack_tiles(weights, call.bits, c.tiles * steps.count, unpacked_at);
    GemmArgs g{};
    g.activations = activations(c, n, run);
    g.row_offsets = run.in_offset.data() + first;
    g.step_offsets = steps.offsets;
    g.live_quads = steps.live_quads;
    g.steps = steps.count;
    g.tile0 = unpack_tiles != nullptr ? unpacked_at : reinterpret_cast<const int8_t*>(weights);
    const int64_t tile_bytes = unpack_tiles != nullptr
                                   ? steps.count * kTileBytes
                                   : call.plan.panel_bytes(steps.count, call.bits);
    g.tile1 = c.tiles == 2 ? g.tile0 + tile_bytes : nullptr;
    g.arranged = call.plan.arranged(call.bits);
    g.weight_bits = call.weight_bits;
    g.rows = rows;
    const WeightStream::Piece fetch = ahead(c, fresh, steps.count);
    if (fetch.bytes > 0 && steps.count > 0) {
      // About a line for every step of every pass of rows.
      const int64_t passes = (rows + kTypicalPass - 1) / kTypicalPass;
      g.fetch = fetch.begin;
      g.fetch_lines = static_cast<int>((fetch.bytes + 64 * passes * steps.count - 1) /
                                       (64 * passes * steps.count));
      g.fetch_row = fetch.bytes / rows;
    }
    return g;
  }

  /// All positions of all images times `columns` (any number of tiles for a tensor), where they are
  /// so few that every weight is used once: weights go from memory through registers into sums.
  void few(const Columns& c) const {
    const ConvRun& run = call.plan.runs.front();
    const auto positions = static_cast<int>(run.positions);
    const Steps steps = steps_of(c, run);
    GemvArgs g{};
    for (int64_t n = 0; n < call.images; ++n)
      for (int i = 0; i < positions; ++i)
        g.activations[g.rows++] = activations(c, n, run) + run.in_offset[i];
    g.step_offsets = steps.offsets;
    g.steps = steps.count;
    g.packed = packed(c);
    g.bits = call.bits;
    g.column_tiles = c.tiles;
    g.sums = sums;
    const int stride = std::max(c.tiles, 2);  // requantize takes one or two tiles
    g.sums_stride = stride * kTileWidth;
    gemv(g);
    for (int64_t n = 0; n < call.images; ++n)
      finish({c, &run, n, 0, positions, stride, sums + n * positions * g.sums_stride});
  }

  /// The block whose sums are ready but not yet stored. Its epilogue is issued behind the next
  /// block's products, so that the vector units work while the tile unit does.
  struct Pending {
    Columns columns;
    const ConvRun* run = nullptr;
    int64_t n = 0, first = 0;
    int rows = 0, tiles = 0;
    const int32_t* sums = nullptr;
  };

  void block(const Columns& c, int8_t* unpacked_at, bool fresh, int64_t n, const ConvRun& run,
             int64_t first, int rows, Pending& pending) const {
    if (fused) {
      kernels.gemm_requantize(gemm_args(c, unpacked_at, fresh, n, run, first, rows),
                              requantize_args(c, n, run, first), requantize);
      return;
    }
    int32_t* at = pending.sums == sums ? sums + kSums : sums;
    const int tiles = multiply(c, unpacked_at, fresh, n, run, first, rows, at);
    if (pending.run != nullptr) finish(pending);
    pending = {c, &run, n, first, rows, tiles, at};
  }

  void finish(const Pending& p) const {
    const Columns& c = p.columns;
    const ConvRun& run = *p.run;
    const int64_t n = p.n, first = p.first;
    const int rows = p.rows, tiles = p.tiles;
    const int32_t* const sums = p.sums;
    const ConvPlan& plan = call.plan;
    const int64_t outs = plan.shape.group_out();
    const int64_t column = c.tile * kTileWidth;
    const int64_t channel = c.group * outs + column;
    const int cols = static_cast<int>(std::min<int64_t>(c.tiles * kTileWidth, outs - column));
    if (tensor != nullptr) {
      const int64_t channels = plan.shape.out_channels, image = tensor->first_image + n;
      StoreArgs s{};
      s.sums_stride = tiles * kTileWidth;
      s.cols = cols;
      s.correction = tensor->correction + channel;
      s.channel = channel;
      s.out = &tensor->out;
      if (tensor->out.layout == Layout::NHWC) {
        s.first = image * plan.out_area * channels + channel;
        s.position_stride = channels;
        s.channel_stride = 1;
        s.sums = sums;
        s.position = run.position.data() + first;
        s.rows = rows;
        kernels.store(s);
        return;
      }
      s.first = (image * channels + channel) * plan.out_area;
      s.position_stride = 1;
      s.channel_stride = plan.out_area;
      // A store takes positions that are neighbours but for dropped ones in between. They rise.
      const int32_t* position = run.position.data() + first;
      const bool neighbours = !run.dropped && position[rows - 1] == position[0] + rows - 1;
      for (int begin = 0, end = 0; begin < rows; begin = end) {
        int32_t next = -1;
        for (end = neighbours ? rows : begin;
             end < rows && (position[end] < 0 || next < 0 || position[end] == next); ++end)
          if (position[end] >= 0) next = position[end] + 1;
        s.sums = sums + begin * s.sums_stride;
        s.position = position + begin;
        s.rows = end - begin;
        kernels.store(s);
      }
      return;
    }
    RequantizeArgs q = requantize_args(c, n, run, first);
    q.sums = sums;
    q.tiles = tiles;
    q.rows = rows;
    q.whole = q.whole && c.tiles == tiles;
    requantize(q);
  }

  /// All but the sums.
  RequantizeArgs requantize_args(const Columns& c, int64_t n, const ConvRun& run,
                                 int64_t first) const {
    const ConvPlan& plan = call.plan;
    const int64_t outs = plan.shape.group_out();
    const int64_t column = c.tile * kTileWidth;
    const int64_t channel = c.group * outs + column;
    RequantizeArgs q{};
    q.cols = static_cast<int>(std::min<int64_t>(c.tiles * kTileWidth, outs - column));
    q.whole = plan.shape.groups == 1 && column + c.tiles * kTileWidth <= plan.out_pitch;
    q.out_offset = run.out_offset.data() + first;
    q.out = call.out + n * plan.out_image_bytes + channel;
    if (call.residual != nullptr) {
      q.residual_offset = run.residual_offset.data() + first;
      q.residual = call.residual + n * plan.residual_image_bytes + channel;
    }
    q.epilogue = call.epilogue;
    q.channel = channel;
    return q;
  }
};

Columns columns_of(const ConvPlan& plan, int64_t pair) {
  const int64_t per_group = (plan.column_tiles + 1) / 2;
  Columns c{pair / per_group, pair % per_group * 2, 0};
  c.tiles = static_cast<int>(std::min<int64_t>(2, plan.column_tiles - c.tile));
  return c;
}

/// Rows of a block of listed positions: even blocks of `at_most`, and at least one for every part.
int even_rows(const ConvPlan& plan, int at_most, int64_t parts) {
  int64_t most = 0;
  for (const ConvRun& run : plan.runs)
    most = std::max(most, run.positions);
  int64_t blocks = (most + at_most - 1) / at_most;
  blocks = (blocks + parts - 1) / parts * parts;
  return static_cast<int>(std::max<int64_t>(1, (most + blocks - 1) / blocks));
}

/// A share of the positions: blocks [first, last) of `rows` over all runs of one image.
struct BlockRange {
  int64_t first, last;
  int rows;
};

template <class Fn>
void for_blocks(const ConvPlan& plan, const BlockRange& range, const Fn& fn) {
  int64_t before = 0;
  for (const ConvRun& run : plan.runs) {
    const int64_t blocks = (run.positions + range.rows - 1) / range.rows;
    const int64_t end = std::min(blocks, range.last - before);
    for (int64_t b = std::max<int64_t>(0, range.first - before); b < end; ++b) {
      const int64_t first = b * range.rows;
      fn(run, first, static_cast<int>(std::min<int64_t>(range.rows, run.positions - first)));
    }
    before += blocks;
  }
}

int64_t block_count(const ConvPlan& plan, int rows) {
  int64_t count = 0;
  for (const ConvRun& run : plan.runs)
    count += (run.positions + rows - 1) / rows;
  return count;
}

/// Bytes of the unpacked weights of `pairs` pairs, where every tile is there.
int64_t unpacked_bytes(const ConvPlan& plan, int64_t pairs) {
  return pairs * 2 * plan.steps * kTileBytes;
}

/// The share of the tiles that is there.
double stored_share(const SparsePanels* sparse) {
  if (sparse == nullptr || sparse->tiles == 0) return 1.0;
  return static_cast<double>(sparse->stored_tiles) / static_cast<double>(sparse->tiles);
}

/// Whether a block of positions should meet all of the task's columns before the next one does (the
/// weights are read again for every block), or each pair of columns all positions (the activations
/// are): whatever reads less from beyond the first-level cache.
bool rows_outside(const ConvCall& call, const BlockRange& range, int64_t pairs) {
  const ConvPlan& plan = call.plan;
  const int64_t images = call.images;
  const double share = stored_share(call.sparse);
  const auto held = [&](int64_t n) {
    return static_cast<int64_t>(share * static_cast<double>(unpacked_bytes(plan, n)));
  };
  const auto cost = [](int64_t bytes, int64_t near) {
    return bytes <= near ? int64_t{0} : bytes <= kSecondLevel ? bytes : bytes * kThirdLevelCost;
  };
  const int64_t weights = held(pairs);
  if (weights > kSecondLevel) return false;
  const int64_t blocks = range.last - range.first;
  const int64_t activations =
      plan.in_image_bytes * images * blocks / std::max<int64_t>(1, block_count(plan, range.rows));
  return images * blocks * cost(weights, kFirstLevel) + activations <=
         pairs * (cost(activations, kFirstLevel) + images * blocks * cost(held(1), kFirstLevel));
}

/// The columns and positions of one part, in the orders in which they may be visited.
struct Visits {
  const Loop& loop;
  const BlockRange& range;
  int64_t pair_first, pair_last;
  bool tall;

  /// Tiles of a pair that have lists of their own are multiplied one after the other.
  bool tiles_together(int64_t pair) const {
    return !tall && (!loop.listed || loop.call.sparse->joint[pair] != 0);
  }

  /// As few positions as a matrix-vector product takes.
  void few() const {
    const ConvPlan& plan = loop.call.plan;
    for (int64_t p = pair_first; p < pair_last;) {
      Columns c = columns_of(plan, p);
      if (loop.listed && !tiles_together(p)) {
        for (int t = 0; t < c.tiles; ++t)
          loop.few({c.group, c.tile + t, 1});
        ++p;
        continue;
      }
      if (loop.tensor != nullptr && !loop.listed)
        c.tiles = static_cast<int>(
            std::min({kFewTiles, plan.column_tiles - c.tile, 2 * (pair_last - p)}));
      loop.few(c);
      p += (c.tiles + 1) / 2;
    }
  }

  /// Every block of positions meets all columns, whose unpacked tiles are kept.
  void by_rows(Loop::Pending& pending) const {
    const ConvPlan& plan = loop.call.plan;
    bool fresh = true;
    for (int64_t n = 0; n < loop.call.images; ++n) {
      for_blocks(plan, range, [&](const ConvRun& run, int64_t first, int count) {
        for (int64_t p = pair_first; p < pair_last; ++p) {
          const Columns pair = columns_of(plan, p);
          const int per_visit = tiles_together(p) ? pair.tiles : 1;
          for (int t = 0; t < pair.tiles; t += per_visit) {
            int8_t* at = loop.unpack_tiles == nullptr
                             ? nullptr
                             : loop.unpacked + unpacked_bytes(plan, p - pair_first) +
                                   t * plan.steps * kTileBytes;
            loop.block({pair.group, pair.tile + t, per_visit}, at, fresh, n, run, first, count,
                       pending);
          }
        }
        fresh = false;
      });
    }
  }

  /// Every pair of columns meets all positions.
  void by_columns(Loop::Pending& pending) const {
    const ConvPlan& plan = loop.call.plan;
    for (int64_t p = pair_first; p < pair_last; ++p) {
      const Columns pair = columns_of(plan, p);
      const int per_visit = tiles_together(p) ? pair.tiles : 1;
      for (int t = 0; t < pair.tiles; t += per_visit) {
        const Columns columns{pair.group, pair.tile + t, per_visit};
        bool fresh = true;
        for (int64_t n = 0; n < loop.call.images; ++n) {
          for_blocks(plan, range, [&](const ConvRun& run, int64_t first, int count) {
            loop.block(columns, loop.unpacked, fresh, n, run, first, count, pending);
            fresh = false;
          });
        }
      }
    }
  }
};

void run(const ConvCall& call, const TensorConvCall* tensor, const KernelRow& kernels, Part part) {
  const ConvPlan& plan = call.plan;
  const int64_t pairs = plan.pairs();
  const int64_t pair_first = call.by_columns ? part.first(pairs) : 0;
  const int64_t pair_last = call.by_columns ? part.last(pairs) : pairs;
  if (pair_first == pair_last) return;

  const bool bitmask = call.sparse != nullptr && call.sparse->kind == Panels::Bitmask;
  const bool listed = call.sparse != nullptr && !bitmask;
  // Four row tiles by one column: every weight tile is unpacked and used once.
  const bool flattened = kernels.positions == Positions::Flattened;
  const bool tall = flattened && call.bits < 8 && plan.runs.size() == 1 &&
                    plan.runs[0].positions > kBlockRows && plan.runs[0].positions <= kTallRows;
  const bool fused = tensor == nullptr && !flattened && kernels.gemm_requantize != nullptr;
  const int rows = tall ? kTallRows
                   : flattened
                       ? kBlockRows
                       : even_rows(plan, kernels.gemm_rows, call.by_columns ? 1 : part.count);
  const int64_t blocks = block_count(plan, rows);
  BlockRange range{0, blocks, rows};
  if (!call.by_columns) {
    range.first = part.first(blocks);
    range.last = part.last(blocks);
    if (range.first == range.last) return;
  }

  Scratch& local = scratch();
  const bool few = !plan.arranged(call.bits) && plan.runs.size() == 1 &&
                   call.images * plan.runs[0].positions <= kGemvRows &&
                   range.last - range.first == blocks;
  const BitmaskKernels readers = bitmask ? bitmask_kernels(kernels) : BitmaskKernels{};
  const UnpackTiles unpack = bitmask ? readers.expand : call.bits < 8 ? unpacker(kernels) : nullptr;
  const int64_t all_pairs = pair_last - pair_first;
  // All unpacked weights of the part are kept for the next block of positions.
  const bool can_hold =
      unpack == nullptr || unpacked_bytes(plan, all_pairs) <= kMostUnpacked * kSecondLevel;
  const bool together =
      !tall && !few && can_hold && rows_outside(call, range, all_pairs) != call.other_order;
  const int64_t held = together ? all_pairs : 1;
  const Loop loop{call,
                  tensor,
                  kernels,
                  unpack,
                  bitmask ? readers.gemv : gemv(kernels),
                  requantizer(kernels),
                  unpack != nullptr && !few
                      ? grown<int8_t>(local.unpacked, unpacked_bytes(plan, held))
                      : nullptr,
                  grown<int32_t>(local.sums, 2 * kSums),
                  call.by_columns ? weight_range(plan, call.sparse, call.bits, part).first : 0,
                  fused,
                  listed,
                  local};

  const Visits visits{loop, range, pair_first, pair_last, tall};
  if (few) return visits.few();
  Loop::Pending pending;
  if (together)
    visits.by_rows(pending);
  else
    visits.by_columns(pending);
  if (pending.run != nullptr) loop.finish(pending);
}

}  // namespace

WeightStream::Piece WeightStream::take(int64_t segment, int64_t at, int64_t want) {
  const int64_t used = segments_[segment].before + at;
  const int64_t total = segments_.back().before + segments_.back().bytes;
  asked_ = std::max(asked_, used);
  while (current_ + 1 < segments_.size() && asked_ >= segments_[current_ + 1].before)
    ++current_;
  const Segment& s = segments_[current_];
  const int64_t room = std::min({used + window_, total, s.before + s.bytes}) - asked_;
  const int64_t bytes = std::min(room, want) & ~int64_t{63};
  if (bytes <= 0) return {nullptr, 0};
  const Piece piece{s.begin + (asked_ - s.before), bytes};
  asked_ += bytes;
  return piece;
}

std::pair<int64_t, int64_t> weight_range(const ConvPlan& plan, const SparsePanels* sparse, int bits,
                                         Part part) {
  const auto tile = [&](int64_t pair) {
    if (pair == plan.pairs()) return plan.shape.groups * plan.column_tiles;
    const Columns c = columns_of(plan, pair);
    return c.group * plan.column_tiles + c.tile;
  };
  const auto at = [&](int64_t pair) {
    return sparse != nullptr ? sparse->byte(tile(pair), bits)
                             : tile(pair) * plan.packed_tile_bytes(bits);
  };
  return {at(part.first(plan.pairs())), at(part.last(plan.pairs()))};
}

bool prefers_columns(const ConvPlan& plan, int64_t panel_bytes, int threads) {
  if (plan.pairs() < threads) return false;
  const int64_t blocks = block_count(plan, kBlockRows);
  return blocks < threads || panel_bytes > plan.in_image_bytes;
}

void run_conv(const ConvCall& call, const KernelRow& kernels, Part part) {
  run(call, nullptr, kernels, part);
}

void run_conv(const TensorConvCall& call, const KernelRow& kernels, Part part) {
  run(call.conv, &call, kernels, part);
}

}  // namespace adalayer::cpu

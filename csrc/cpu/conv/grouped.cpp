#include "cpu/conv/grouped.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/status.hpp"
#include "cpu/grouped_kernels.hpp"
#include "cpu/image/rows.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

constexpr int64_t kGranule = 16;
// Interleaved columns of one tile, to stay in the first-level cache beside the image's rows.
constexpr int64_t kScratchBudget = 24 << 10;
// One block's share of an image that is worth fetching ahead, to the first level too.
constexpr int64_t kFetchBudget = 16 << 10;
// At least this many columns per tile, whatever the budgets say.
constexpr int64_t kLeastColumns = 8;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

const GroupedKernels* active_grouped() {
  const KernelRow* row = active_kernels();
  return row == nullptr ? nullptr : row->grouped;
}

GroupedKind kind_of(const ConvShape& s) {
  if (s.group_in() == 1 && s.groups > 1) return GroupedKind::Depthwise;
  const int64_t g = s.group_in();
  const bool square = g == s.group_out() && s.groups > 1;
  if (square && (g == 2 || g == 4 || g == 8 || g == 16)) return GroupedKind::InLane;
  return GroupedKind::Broadcast;
}

/// Output rows that one depthwise tile makes from one set of interleaved rows.
int strip_rows(const ConvShape& s, GroupedKind kind) {
  return kind == GroupedKind::Depthwise && s.stride_h == 1 && s.dilation_h == 1 ? 2 : 1;
}

/// Input rows of a tile: as many as it reads, rounded up to whole runs.
int64_t tile_rows(const ConvShape& s, GroupedKind kind, const GroupedKernels& k) {
  if (kind != GroupedKind::Depthwise) return s.kernel_h;
  return round_up(s.kernel_h + strip_rows(s, kind) - 1, k.rows);
}

// ---------------------------------------------------------------------------------------- blocks

std::vector<GroupedBlock> blocks_of(const ConvShape& s, GroupedKind kind, int lanes) {
  const int64_t granules = (s.out_channels + kGranule - 1) / kGranule;
  const bool expands = kind == GroupedKind::Depthwise && s.group_out() > 1;
  std::vector<GroupedBlock> blocks;
  for (int64_t g = 0; g < granules;) {
    GroupedBlock b;
    b.first = g;
    // Three granules of four lie in one vector as they are; one or two take several rows. Spread
    // channels lie elsewhere in the input than in the output, so that a granule stands alone.
    b.granules = expands ? 1 : static_cast<int>(std::min<int64_t>(lanes, granules - g));
    b.splits = b.granules * 2 > lanes ? 1 : lanes / b.granules;
    b.bytes = std::min(b.granules * kGranule, s.out_channels - g * kGranule);
    g += b.granules;
    if (b.splits == 1) b.granules = lanes;
    blocks.push_back(b);
  }
  return blocks;
}

/// Channel of dword i of 128-bit piece `lane` of vector t.
int64_t channel_of(const GroupedBlock& b, const uint8_t* order, int lane, int t, int i) {
  return (b.first + lane % b.granules) * kGranule + order[4 * t + i];
}

/// order[4 * t + i] (grouped_kernels.hpp) for groups of 1, 2 or 4 dwords. Depthwise sums have
/// natural order, which is also that of groups of 16.
void fill_order(int quads, uint8_t* order) {
  for (int t = 0; t < 4; ++t)
    for (int i = 0; i < 4; ++i) {
      // Dword i serves the group that it lies in, and there the outputs of its place in it.
      const int group = i / quads, place = i % quads;
      order[4 * t + i] = static_cast<uint8_t>(group * 4 * quads + t * quads + place);
    }
}

int group_quads(const ConvShape& s, GroupedKind kind) {
  if (kind == GroupedKind::Depthwise) return 4;
  return static_cast<int>((s.group_in() + 3) / 4);
}

// --------------------------------------------------------------------------------------- weights

/// Writes weights as the instruction set multiplies them: bytes, or int16 where halves == 2.
struct WeightWriter {
  uint8_t* to;
  bool words;
  void put(int8_t w) {
    if (words) {
      const int16_t wide = w;
      std::memcpy(to, &wide, 2);
      to += 2;
    } else {
      *to++ = static_cast<uint8_t>(w);
    }
  }
};

struct Source {
  const ConvShape& s;
  std::span<const int8_t> weights;

  int8_t at(int64_t o, int64_t i, int64_t ky, int64_t kx) const {
    return weights[static_cast<size_t>(((o * s.group_in() + i) * s.kernel_h + ky) * s.kernel_w +
                                       kx)];
  }
};

void write_depthwise(const Source& src, const GroupedKernels& k, WeightWriter& out) {
  const ConvShape& s = src.s;
  const int rows = strip_rows(s, GroupedKind::Depthwise);
  const int64_t runs = tile_rows(s, GroupedKind::Depthwise, k) / k.rows;
  uint8_t order[16];
  fill_order(4, order);
  for (const GroupedBlock& b : blocks_of(s, GroupedKind::Depthwise, k.lanes))
    for (int t = 0; t < 4; ++t)
      for (int64_t run = 0; run < runs; ++run)
        for (int64_t kx = 0; kx < s.kernel_w; ++kx)
          for (int r = 0; r < rows; ++r)
            for (int lane = 0; lane < k.lanes; ++lane)
              for (int i = 0; i < 4; ++i)
                for (int row = 0; row < k.rows; ++row) {
                  const int64_t o = channel_of(b, order, lane, t, i);
                  const int64_t ky = run * k.rows + row - r;
                  const bool real = o < s.out_channels && ky >= 0 && ky < s.kernel_h;
                  out.put(real ? src.at(o, 0, ky, kx) : int8_t{0});
                }
}

void write_in_lane(const Source& src, const GroupedKernels& k, WeightWriter& out) {
  const ConvShape& s = src.s;
  const int quads = group_quads(s, GroupedKind::InLane);
  const int64_t width = 4 * quads;  // channels that share dwords
  uint8_t order[16];
  fill_order(quads, order);
  for (const GroupedBlock& b : blocks_of(s, GroupedKind::InLane, k.lanes))
    for (int64_t ky = 0; ky < s.kernel_h; ++ky)
      for (int64_t kx = 0; kx < s.kernel_w; ++kx)
        for (int quad = 0; quad < quads; ++quad)
          for (int half = 0; half < k.halves; ++half)
            for (int t = 0; t < 4; ++t)
              for (int lane = 0; lane < k.lanes; ++lane)
                for (int i = 0; i < 4; ++i)
                  for (int byte = half; byte < 4; byte += k.halves) {
                    const int64_t o = channel_of(b, order, lane, t, i);
                    const int64_t in = o / width * width + quad * 4 + byte;
                    const bool real = o < s.out_channels && in / s.group_in() == o / s.group_out();
                    out.put(real ? src.at(o, in % s.group_in(), ky, kx) : int8_t{0});
                  }
}

void write_broadcast(const Source& src, const GroupedKernels& k, WeightWriter& out) {
  const ConvShape& s = src.s;
  const int quads = group_quads(s, GroupedKind::Broadcast);
  const int width = 4 * k.lanes;
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t first = 0; first < s.group_out(); first += 2 * width) {
      const int tiles = s.group_out() - first > width ? 2 : 1;
      for (int64_t ky = 0; ky < s.kernel_h; ++ky)
        for (int64_t kx = 0; kx < s.kernel_w; ++kx)
          for (int quad = 0; quad < quads; ++quad)
            for (int half = 0; half < k.halves; ++half)
              for (int o = 0; o < tiles * width; ++o)
                for (int byte = half; byte < 4; byte += k.halves) {
                  const int64_t in = quad * 4 + byte;
                  const bool real = first + o < s.group_out() && in < s.group_in();
                  out.put(real ? src.at(g * s.group_out() + first + o, in, ky, kx) : int8_t{0});
                }
    }
}

/// Bytes of one block's weights (of one pair of tiles: with two tiles).
int64_t block_weights(const ConvShape& s, GroupedKind kind, const GroupedKernels& k) {
  const int64_t vector = kGranule * k.lanes;
  const int64_t taps = s.kernel_h * s.kernel_w * group_quads(s, kind) * k.halves;
  switch (kind) {
    case GroupedKind::Depthwise:
      return 4 * tile_rows(s, kind, k) / k.rows * s.kernel_w * strip_rows(s, kind) * vector;
    case GroupedKind::InLane:
      return taps * 4 * vector;
    default:
      return taps * 2 * vector;
  }
}

// ------------------------------------------------------------------------------------- execution

/// Buffers of one thread; they grow to the largest layer and are then reused.
struct Scratch {
  AlignedBuffer columns, pointers, rows, constants, sink;
};
Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

/// Where the sums go that no epilogue follows.
struct SumsView {
  int32_t* data = nullptr;
  int64_t pitch = 0, columns = 0, first_row = 0;

  int32_t* pixel(int64_t y, int64_t x) const {
    return data + ((y - first_row) * columns + x) * pitch;
  }
};

/// Everything that the tiles of one call share.
struct Job {
  const ConvShape& s;
  const GroupedWeights& weights;
  const ConvEpilogue& epilogue;
  ConstImageView in, residual;
  ImageView out;  // or `sums`
  SumsView sums;
  const GroupedKernels& kernels;
  uint8_t order[16], narrow[16], widen[64];
  bool natural;  // order is 0, 1, 2 ...

  const uint8_t* input_row(int64_t y) const {
    return in.data + in.layout->row_offset(y + in.layout->pad_top) +
           (in.layout->pad_left - s.pad_left) * in.layout->pitch;
  }
};

GroupedTile tile_of(const Job& job) {
  const ConvShape& s = job.s;
  const ConvEpilogue& e = job.epilogue;
  GroupedTile t{};
  t.pitch = job.in.layout->pitch;
  t.kernel_w = s.kernel_w;
  t.stride_w = s.stride_w;
  t.dilation_w = s.dilation_w;
  t.weight_rows = strip_rows(s, job.weights.kind);
  t.quads = group_quads(s, job.weights.kind);
  t.splits = 1;
  t.out_rows = 1;
  t.row_count = tile_rows(s, job.weights.kind, job.kernels);
  t.out_pitch = job.out.data == nullptr ? 0 : job.out.layout->pitch;
  t.sums_pitch = job.sums.pitch;
  t.residual_pitch = job.residual.data == nullptr ? 0 : job.residual.layout->pitch;
  t.widen = job.widen;
  t.narrow = job.natural ? nullptr : job.narrow;
  t.residual_scale = e.residual_scale;
  t.residual_zero = e.residual_zero;
  t.inv_scale = e.finish.inv_scale;
  t.lo = e.finish.lo;
  t.hi = e.finish.hi;
  t.zero_point = e.finish.zero_point;
  t.bounded = e.bounded;
  return t;
}

/// Where the input rows of output rows [y_first, y_last) begin: finding a row in its phase takes a
/// division.
class InputRows {
 public:
  InputRows(const Job& job, int64_t y_first, int64_t y_last) {
    const ConvShape& s = job.s;
    first_ = y_first * s.stride_h - s.pad_top;
    last_ = (y_last - 1) * s.stride_h - s.pad_top + (s.kernel_h - 1) * s.dilation_h;
    rows_ = reinterpret_cast<const uint8_t**>(grown<uint8_t>(
        scratch().rows, (last_ - first_ + 1) * static_cast<int64_t>(sizeof(const uint8_t*))));
    for (int64_t y = first_; y <= last_; ++y)
      rows_[y - first_] = job.input_row(y);
  }
  /// Rows below the last one meet only zero weights and need not exist.
  const uint8_t* operator[](int64_t y) const { return rows_[std::min(y, last_) - first_]; }

 private:
  int64_t first_, last_;
  const uint8_t** rows_;
};

/// Pointers of one tile, in the thread's memory.
struct Pointers {
  const uint8_t** rows;
  const uint8_t** residual;
  uint8_t** out;
  int32_t** sums;

  Pointers(int64_t row_count, int lanes) {
    const int64_t rows_n = row_count * lanes, outs_n = 2 * lanes;
    auto* at = reinterpret_cast<const uint8_t**>(grown<uint8_t>(
        scratch().pointers, (rows_n + 3 * outs_n) * static_cast<int64_t>(sizeof(void*))));
    rows = at;
    residual = at + rows_n;
    out = const_cast<uint8_t**>(residual + outs_n);
    sums = reinterpret_cast<int32_t**>(out + outs_n);
  }
};

/// Copies elements [first, first + n) of 4 bytes; a missing array (correction) is all zeros.
void copy_dwords(const void* array, int64_t first, int64_t n, uint8_t* to) {
  if (array == nullptr)
    std::memset(to, 0, static_cast<size_t>(n * 4));
  else
    std::memcpy(to, static_cast<const uint8_t*>(array) + first * 4, static_cast<size_t>(n * 4));
}

/// Correction, scale and bias of a block in the order of its sums.
void order_constants(const Job& job, const GroupedBlock& b, uint8_t* to) {
  const ConvEpilogue& e = job.epilogue;
  const void* arrays[3] = {e.correction, e.scale, e.bias};
  for (const void* array : arrays)
    for (int v = 0; v < 4; ++v)
      for (int lane = 0; lane < job.kernels.lanes; ++lane, to += 16) {
        if (job.natural) {
          copy_dwords(array, channel_of(b, job.order, lane, v, 0), 4, to);
          continue;
        }
        for (int i = 0; i < 4; ++i)
          copy_dwords(array, channel_of(b, job.order, lane, v, i), 1, to + 4 * i);
      }
}

/// Splits `count` columns into equal tiles of at most `most`.
template <class Fn>
void column_tiles(int64_t count, int64_t most, const Fn& fn) {
  if (count <= most) return fn(0, count);
  int64_t x = 0;
  for (int64_t tiles = (count + most - 1) / most; tiles > 0; --tiles) {
    const int64_t n = (count - x + tiles - 1) / tiles;
    fn(x, n);
    x += n;
  }
}

void fetch_row(const uint8_t* p, int64_t pitch, int64_t pixels) {
  for (int64_t x = 0; x < pixels; ++x)
    __builtin_prefetch(p + x * pitch);
}

/// What is left to do when the tiles of some rows are done: a table, or the order of the sums.
void finish_rows(const Job& job, int64_t y_first, int64_t y_last) {
  if (job.sums.data == nullptr) {
    for (int64_t y = y_first; y < y_last; ++y)
      apply_table(image_kernels(), job.epilogue.finish, job.out, y);
    return;
  }
  if (job.natural) return;
  int32_t* const end = job.sums.pixel(y_last, 0);
  for (int32_t* granule = job.sums.pixel(y_first, 0); granule < end; granule += kGranule) {
    int32_t ordered[kGranule];
    for (int64_t i = 0; i < kGranule; ++i)
      ordered[job.order[i]] = granule[i];
    std::memcpy(granule, ordered, sizeof ordered);
  }
}

/// Points a tile of a block at its input and output rows: columns from `x` on of `strips` strips,
/// of `strip` rows each, from `y0` on. What is written below `y_last` goes to `sink`.
void point_at(const Job& job, const GroupedTile& t, const Pointers& p, const InputRows& input,
              const GroupedBlock& b, int64_t x, int64_t y0, int64_t strips, int64_t y_last,
              uint8_t* sink) {
  const ConvShape& s = job.s;
  const int64_t strip = strip_rows(s, job.weights.kind), channel = b.first * kGranule;
  const int64_t multiplier = job.weights.kind == GroupedKind::Depthwise ? s.group_out() : 1;
  const int64_t in_offset = x * s.stride_w * t.pitch + channel / multiplier;
  for (int split = 0; split < b.splits; ++split) {
    // Splits without rows of their own repeat the last strip, and drop what they find.
    const int64_t y = y0 + std::min<int64_t>(split, strips - 1) * strip;
    for (int64_t r = 0; r < t.row_count; ++r)
      p.rows[split * t.row_count + r] =
          input[y * s.stride_h - s.pad_top + r * s.dilation_h] + in_offset;
    for (int r = 0; r < t.out_rows; ++r) {
      const bool real = split < strips && y + r < y_last;
      const int64_t at = split * t.out_rows + r, row = std::min(y + r, y_last - 1);
      if (t.sums != nullptr)
        p.sums[at] = real ? job.sums.pixel(row, x) + channel : reinterpret_cast<int32_t*>(sink);
      else
        p.out[at] = real ? job.out.pixel(row, x) + channel : sink;
      if (t.residual != nullptr) p.residual[at] = job.residual.pixel(row, x) + channel;
    }
  }
}

/// Depthwise and InLane: strips of rows, block by block.
void run_blocks(Job& job, int64_t y_first, int64_t y_last) {
  const ConvShape& s = job.s;
  const GroupedKernels& k = job.kernels;
  const GroupedKind kind = job.weights.kind;
  const bool depthwise = kind == GroupedKind::Depthwise;
  const int64_t vector = kGranule * k.lanes, out_w = s.out_w();
  const int64_t multiplier = depthwise ? s.group_out() : 1;
  const int64_t block_bytes = block_weights(s, kind, k);
  const int strip = strip_rows(s, kind);
  GroupedTile t = tile_of(job);

  int64_t most = out_w;
  if (depthwise) {
    const int64_t column_bytes = 4 * vector * (t.row_count / k.rows);
    const int64_t halo = (s.kernel_w - 1) * s.dilation_w + 1;
    most = std::max((kScratchBudget / column_bytes - halo) / s.stride_w + 1, kLeastColumns);
    most = std::min(most, out_w);
    t.scratch = grown<uint8_t>(scratch().columns, ((most - 1) * s.stride_w + halo) * column_bytes);
  }
  const Pointers p(t.row_count, k.lanes);
  t.rows = p.rows;
  t.out = p.out;
  t.residual = job.residual.data == nullptr ? nullptr : p.residual;
  t.sums = job.sums.data == nullptr ? nullptr : p.sums;
  uint8_t* sink =
      grown<uint8_t>(scratch().sink, most * std::max(t.out_pitch, 4 * t.sums_pitch) + 64);
  uint8_t expand[64];
  const InputRows input(job, y_first, y_last);
  const std::vector<GroupedBlock>& blocks = job.weights.blocks;

  auto* constants =
      grown<uint8_t>(scratch().constants, static_cast<int64_t>(blocks.size()) * 12 * vector);
  for (size_t b = 0; b < blocks.size(); ++b)
    order_constants(job, blocks[b], constants + b * static_cast<size_t>(12 * vector));

  const auto run_tile = [&](size_t index, int64_t y0, int64_t strips) {
    const GroupedBlock& b = blocks[index];
    const int64_t channel = b.first * kGranule;
    t.splits = b.splits;
    t.bytes = b.bytes;
    t.weights = job.weights.data.data() + static_cast<int64_t>(index) * block_bytes;
    t.constants = constants + static_cast<int64_t>(index) * 12 * vector;
    t.out_rows = static_cast<int>(std::min<int64_t>(strip, y_last - y0));
    t.expand = nullptr;
    if (multiplier > 1) {
      for (int64_t i = 0; i < vector; ++i)
        expand[i] =
            static_cast<uint8_t>((channel + i % kGranule) / multiplier - channel / multiplier);
      t.expand = expand;
    }
    column_tiles(out_w, most, [&](int64_t x, int64_t n) {
      t.count = n;
      point_at(job, t, p, input, b, x, y0, strips, y_last, sink);
      (depthwise ? k.depthwise : k.in_lane)(t);
    });
  };

  // Block by block: its weights and the rows that strips share stay in the first-level cache. In a
  // small image the next block, a cache line or more away in every pixel, is fetched meanwhile.
  const bool fetch = s.in_h * s.in_w * vector <= kFetchBudget;
  for (size_t b = 0; b < blocks.size(); ++b) {
    const int64_t rows = static_cast<int64_t>(blocks[b].splits) * strip;
    for (int64_t y0 = y_first; y0 < y_last; y0 += rows) {
      if (fetch && b + 1 < blocks.size()) {
        const int64_t next = blocks[b + 1].first * kGranule, end = std::min(y0 + rows, y_last);
        for (int64_t y = y0 * s.stride_h; y < end * s.stride_h && y < s.in_h; ++y)
          fetch_row(job.in.row(y) + next / multiplier, t.pitch, s.in_w);
        for (int64_t y = y0; y < end && t.sums == nullptr; ++y)
          fetch_row(job.out.row(y) + next, t.out_pitch, out_w);
      }
      run_tile(b, y0, std::min<int64_t>(blocks[b].splits, (y_last - y0 + strip - 1) / strip));
    }
  }
  finish_rows(job, y_first, y_last);
}

/// Broadcast: group by group, whose weights stay in the first-level cache.
void run_groups(Job& job, int64_t y_first, int64_t y_last) {
  const ConvShape& s = job.s;
  const GroupedKernels& k = job.kernels;
  const int width = 4 * k.lanes;
  const int64_t out_w = s.out_w(), group_out = s.group_out(), vector = width * 4;
  const int64_t pairs = (group_out + 2 * width - 1) / (2 * width);
  const int64_t tiles = (group_out + width - 1) / width;
  const int64_t pair_bytes = block_weights(s, GroupedKind::Broadcast, k);
  const int64_t group_bytes = pair_bytes / 2 * tiles;
  GroupedTile t = tile_of(job);
  const Pointers p(t.row_count, 1);
  t.rows = p.rows;
  t.out = p.out;
  t.residual = job.residual.data == nullptr ? nullptr : p.residual;
  t.sums = job.sums.data == nullptr ? nullptr : p.sums;
  const InputRows input(job, y_first, y_last);
  t.count = out_w;

  // Constants of every tile, zero where the group has no channel: [group][pair][array][tile].
  auto* constants = grown<uint8_t>(scratch().constants, s.groups * tiles * 3 * vector);
  uint8_t* to = constants;
  const void* arrays[3] = {job.epilogue.correction, job.epilogue.scale, job.epilogue.bias};
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t first = 0; first < group_out; first += 2 * width) {
      const int64_t slots = group_out - first > width ? 2 * width : width;
      const int64_t real = std::min(slots, group_out - first);
      for (const void* array : arrays) {
        copy_dwords(array, g * group_out + first, real, to);
        std::memset(to + real * 4, 0, static_cast<size_t>((slots - real) * 4));
        to += slots * 4;
      }
    }

  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t first = pair * 2 * width, channel = g * group_out + first;
      t.tiles = group_out - first > width ? 2 : 1;
      t.bytes = std::min<int64_t>(t.tiles * width, group_out - first);
      t.weights = job.weights.data.data() + g * group_bytes + pair * pair_bytes;
      t.constants = constants + (g * tiles + pair * 2) * 3 * vector;
      for (int64_t y = y_first; y < y_last; ++y) {
        for (int64_t r = 0; r < s.kernel_h; ++r)
          p.rows[r] = input[y * s.stride_h - s.pad_top + r * s.dilation_h] + g * s.group_in();
        if (t.sums != nullptr)
          p.sums[0] = job.sums.pixel(y, 0) + channel;
        else
          p.out[0] = job.out.row(y) + channel;
        if (t.residual != nullptr) p.residual[0] = job.residual.row(y) + channel;
        k.broadcast(t);
      }
    }
  finish_rows(job, y_first, y_last);
}

/// The formulas, for machines without vectors.
void run_plain(const ConvShape& s, const int8_t* weights, const ConvEpilogue& e, ConstImageView in,
               ConstImageView residual, ImageView out, int64_t y_first, int64_t y_last) {
  const int64_t group_in = s.group_in(), group_out = s.group_out();
  for (int64_t y = y_first; y < y_last; ++y)
    for (int64_t x = 0; x < s.out_w(); ++x)
      for (int64_t o = 0; o < s.out_channels; ++o) {
        const int64_t channel = o / group_out * group_in;
        const int8_t* w = weights + o * s.reduction();
        int32_t sum = e.correction == nullptr ? 0 : e.correction[o];
        for (int64_t i = 0; i < group_in; ++i)
          for (int64_t ky = 0; ky < s.kernel_h; ++ky)
            for (int64_t kx = 0; kx < s.kernel_w; ++kx)
              sum += int32_t{*w++} *
                     in.pixel(y * s.stride_h - s.pad_top + ky * s.dilation_h,
                              x * s.stride_w - s.pad_left + kx * s.dilation_w)[channel + i];
        float value = conv_value(sum, e.scale[o], e.bias[o]);
        if (residual.data != nullptr)
          value += dequantize_value(residual.pixel(y, x)[o], e.residual_scale, e.residual_zero);
        out.pixel(y, x)[o] = finish_u8(value, e.finish);
      }
}

void run_rows(Job& job, int64_t y_first, int64_t y_last) {
  // Sums of Broadcast are in natural order, as those of groups of 16.
  const bool in_lane = job.weights.kind == GroupedKind::InLane;
  fill_order(in_lane ? group_quads(job.s, job.weights.kind) : 4, job.order);
  std::memset(job.widen, 0x80, sizeof job.widen);  // a shuffle's zero
  for (int n = 0; n < 16; ++n) {
    job.narrow[job.order[n]] = static_cast<uint8_t>(n);
    job.widen[4 * n] = job.order[n];
    job.natural = job.natural && job.order[n] == n;
  }
  if (job.weights.kind == GroupedKind::Broadcast)
    run_groups(job, y_first, y_last);
  else
    run_blocks(job, y_first, y_last);
}

void check_view(const char* what, const ImageLayout* layout, int64_t c, int64_t h, int64_t w) {
  if (layout == nullptr || layout->channels != c || layout->h != h || layout->w != w)
    fail<InvalidArgument>("grouped convolution: expected the ", what, " to be ", c, " x ", h, " x ",
                          w, ", got another layout");
}

void check_input(const ConvShape& shape, const GroupedWeights& weights, ConstImageView in) {
  check_view("input", in.layout, shape.in_channels, shape.in_h, shape.in_w);
  if (in.layout->pad_top < shape.pad_top || in.layout->pad_left < shape.pad_left)
    fail<InvalidArgument>("grouped convolution: expected an input padded by at least ",
                          shape.pad_top, " rows and ", shape.pad_left, " columns, got ",
                          in.layout->pad_top, " and ", in.layout->pad_left);
  if (weights.isa != active_isa())
    throw InvalidArgument("grouped convolution: weights built for another instruction set");
}

}  // namespace

bool grouped_suits(const ConvShape& shape) {
  if (shape.groups < 2) return false;
  if (shape.group_in() == 1) return true;
  // A matmul of 64 input bytes by 16 outputs uses group_in / 64 of its products (less where a group
  // has fewer than 16 outputs). The kernels here use nearly all of theirs, from units that are an
  // eighth as fast as AMX and as fast as the other matmuls.
  const int64_t most = active_isa() == Isa::Amx ? 8 : 32;
  return shape.group_in() <= most;
}

double grouped_bytes(const ConvShape& shape) {
  const GroupedKernels* k = active_grouped();
  if (k == nullptr)
    return static_cast<double>(shape.out_channels) * static_cast<double>(shape.reduction());
  const GroupedKind kind = kind_of(shape);
  const auto block = static_cast<double>(block_weights(shape, kind, *k));
  if (kind == GroupedKind::Broadcast) {
    const int64_t width = 4 * k->lanes;
    const int64_t tiles = (shape.group_out() + width - 1) / width;
    return block / 2 * static_cast<double>(tiles) * static_cast<double>(shape.groups);
  }
  // A block holds at least one granule.
  const int64_t granules = (shape.out_channels + kGranule - 1) / kGranule;
  const bool alone = kind == GroupedKind::Depthwise && shape.group_out() > 1;
  const int64_t blocks = alone ? granules : (granules + k->lanes - 1) / k->lanes;
  return static_cast<double>(blocks) * (block + static_cast<double>(sizeof(GroupedBlock)));
}

GroupedWeights build_grouped(const ConvShape& shape, std::span<const int8_t> weights) {
  validate(shape);
  if (static_cast<int64_t>(weights.size()) != shape.out_channels * shape.reduction())
    fail<InvalidArgument>("grouped convolution: expected ", shape.out_channels * shape.reduction(),
                          " weights, got ", weights.size());
  GroupedWeights built;
  built.isa = active_isa();
  const GroupedKernels* k = active_grouped();
  if (k == nullptr) {
    built.data = AlignedBuffer(weights.size());
    std::memcpy(built.data.data(), weights.data(), weights.size());
    return built;
  }
  built.kind = kind_of(shape);
  const int64_t bytes = block_weights(shape, built.kind, *k);
  const Source source{shape, weights};
  WeightWriter writer{nullptr, k->halves == 2};
  if (built.kind == GroupedKind::Broadcast) {
    const int64_t width = 4 * k->lanes;
    const int64_t tiles = (shape.group_out() + width - 1) / width;
    built.data = AlignedBuffer(static_cast<size_t>(bytes / 2 * tiles * shape.groups));
    writer.to = built.data.data();
    write_broadcast(source, *k, writer);
    return built;
  }
  built.blocks = blocks_of(shape, built.kind, k->lanes);
  built.data = AlignedBuffer(built.blocks.size() * static_cast<size_t>(bytes));
  writer.to = built.data.data();
  if (built.kind == GroupedKind::Depthwise)
    write_depthwise(source, *k, writer);
  else
    write_in_lane(source, *k, writer);
  return built;
}

void run_grouped(const ConvShape& shape, const GroupedWeights& weights,
                 const ConvEpilogue& epilogue, ConstImageView in, ConstImageView residual,
                 ImageView out, Part part) {
  check_input(shape, weights, in);
  check_view("output", out.layout, shape.out_channels, shape.out_h(), shape.out_w());
  if (residual.data != nullptr)
    check_view("residual", residual.layout, shape.out_channels, shape.out_h(), shape.out_w());
  const int64_t y_first = part.first(shape.out_h()), y_last = part.last(shape.out_h());
  if (y_first == y_last || shape.out_w() == 0) return;
  const GroupedKernels* kernels = active_grouped();
  if (kernels == nullptr)
    return run_plain(shape, reinterpret_cast<const int8_t*>(weights.data.data()), epilogue, in,
                     residual, out, y_first, y_last);
  Job job{shape, weights, epilogue, in, residual, out, {}, *kernels, {}, {}, {}, true};
  run_rows(job, y_first, y_last);
}

void grouped_sums(const ConvShape& shape, const GroupedWeights& weights, ConstImageView in,
                  int64_t y_first, int64_t y_last, int32_t* sums) {
  check_input(shape, weights, in);
  const GroupedKernels* kernels = active_grouped();
  if (kernels == nullptr)
    throw InvalidArgument("grouped convolution: sums alone need vector kernels");
  if (y_first == y_last) return;
  const ConvEpilogue none;
  const SumsView view{sums, grouped_sums_pitch(shape), shape.out_w(), y_first};
  Job job{shape, weights, none, in, {}, {}, view, *kernels, {}, {}, {}, true};
  run_rows(job, y_first, y_last);
}

int64_t grouped_sums_pitch(const ConvShape& shape) {
  // Blocks are written whole.
  return round_up(shape.out_channels, kGranule * 4);
}

}  // namespace adalayer::cpu

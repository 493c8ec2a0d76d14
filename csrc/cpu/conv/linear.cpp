#include "cpu/conv/linear.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/conv/product_tiles.hpp"
#include "cpu/image_kernels.hpp"
#include "formats/panels.hpp"

namespace adalayer::cpu {
namespace {

using formats::kTileBytes;
using formats::kTileDepth;
using formats::kTileWidth;

// Rows that share a pass over the weights, which are unpacked for each.
constexpr int kRows = kGemmRows / 2;
// A thread that has fewer rows takes a share of the outputs.
constexpr int64_t kRowsOfPart = 16;
// Rows of a chunk lie no farther apart, so that 32 bits count them.
constexpr int64_t kMostOffset = int64_t{1} << 30;

int64_t row_pitch(int64_t inputs) {
  const int64_t bytes = tile_count(inputs, kTileDepth) * kTileDepth;
  return bytes % 1024 == 0 ? bytes + kTileDepth : bytes;
}

int64_t group_inputs(const LinearSpec& s, int64_t group) {
  return std::min(s.group, s.inputs - group * s.group);
}

/// The input row of a job.
struct Place {
  int64_t image, position;
};
Place place(const LinearJob& job, int64_t row) {
  return {row / job.positions, row % job.positions};
}

template <class View>
auto* pixel_of(const View& view, const Place& at) {
  const ImageLayout& l = *view.layout;
  return view.pixel(at.position / l.w, at.position % l.w) + at.image * l.image_bytes;
}

}  // namespace

/// Rows whose levels lie somewhere.
struct Linear::Chunk {
  int64_t first = 0;
  int rows = 0;
  const uint8_t* levels = nullptr;
  int32_t offsets[kRows];  // bytes from there
};

struct Linear::Memory {
  int32_t* sums;
  float* reals;
  int8_t* unpacked;
  uint8_t* levels;
  int64_t wide;  // columns of sums and reals of few rows

  explicit Memory(const Linear& l) : wide(l.columns_ * kTileWidth) {
    thread_local AlignedBuffer memory;
    const int64_t block = std::max<int64_t>(kRows * kBlockCols, kGemvRows * wide);
    const int64_t tiles = 2 * l.depth_ * kTileBytes;
    const int64_t bytes = 8 * block + tiles + kRows * row_pitch(l.spec_.inputs) + 4 * kTileDepth;
    auto* at = grown<uint8_t>(memory, bytes);
    unpacked = reinterpret_cast<int8_t*>(at);
    sums = reinterpret_cast<int32_t*>(at + tiles);
    reals = reinterpret_cast<float*>(sums + block);
    levels = reinterpret_cast<uint8_t*>(reals + block);
  }
};

Linear::Linear(const LinearSpec& spec, std::span<const int8_t> weights, int bits)
    : spec_(spec),
      bits_(bits),
      depth_(tile_count(spec.group, kTileDepth)),
      columns_(tile_count(spec.outputs, kTileWidth)),
      kernels_(active_kernels()) {
  const int64_t groups = spec.groups();
  std::vector<int32_t> totals(static_cast<size_t>(groups * columns_ * kTileWidth), 0);
  for (int64_t o = 0; o < spec.outputs; ++o)
    for (int64_t i = 0; i < spec.inputs; ++i)
      totals[i / spec.group * columns_ * kTileWidth + o] += weights[o * spec.inputs + i];
  totals_ = std::make_shared<const std::vector<int32_t>>(std::move(totals));
  AlignedBuffer held;
  if (kernels_ == nullptr) {
    held = AlignedBuffer(weights.size());
    std::memcpy(held.data(), weights.data(), weights.size());
  } else {
    // Products of bytes that do not fit the sums of some kernels have an order of their own.
    if (kernels_->arrangement != nullptr && product_bits(*kernels_, bits, spec.qmax) == 8)
      arrangement_ = kernels_->arrangement;
    column_bytes_ = column_bytes(depth_, bits_, arrangement_);
    held = AlignedBuffer(static_cast<size_t>(groups * columns_ * column_bytes_));
    for (int64_t g = 0; g < groups; ++g)
      pack_columns(weights.data() + g * spec.group, spec.inputs, spec.outputs,
                   group_inputs(spec, g), bits_, arrangement_, spec.qmax,
                   held.data() + g * columns_ * column_bytes_);
  }
  weights_ = std::make_shared<const AlignedBuffer>(std::move(held));
  set_scales();
}

Linear::Linear(const Linear& like, const LinearSpec& spec, bool other_scales) : Linear(like) {
  spec_ = spec;
  if (other_scales) set_scales();
}

void Linear::set_scales() {
  const int64_t groups = spec_.groups(), width = columns_ * kTileWidth;
  std::vector<float> scales(static_cast<size_t>(groups * width), 0.0f);
  for (int64_t o = 0; o < spec_.outputs; ++o)
    for (int64_t g = 0; g < groups; ++g)
      scales[g * width + o] = spec_.scale[o * groups + g];
  scales_ = std::make_shared<const std::vector<float>>(std::move(scales));
}

/// Levels of the rows from `row` on, of as many as go together; returns the row behind them.
int64_t Linear::stage(const LinearJob& job, int64_t row, int64_t end, Chunk& chunk,
                      const Memory& m) const {
  chunk.first = row;
  chunk.rows = 0;
  end = std::min(end, row + kRows);
  if (job.levels.data != nullptr) {
    chunk.levels = pixel_of(job.levels, place(job, row));
    for (; row < end; ++row, ++chunk.rows) {
      const int64_t offset = pixel_of(job.levels, place(job, row)) - chunk.levels;
      if (offset > kMostOffset || offset < -kMostOffset) break;
      chunk.offsets[chunk.rows] = static_cast<int32_t>(offset);
    }
    return row;
  }
  const int64_t pitch = row_pitch(spec_.inputs);
  const ActivationGrid grid{job.inv_scale, spec_.zero_point, spec_.qmax};
  chunk.levels = m.levels;
  for (; row < end; ++row, ++chunk.rows) {
    const Place at = place(job, row);
    const int64_t offset = chunk.rows * pitch;
    image_kernels().quantize_pixels(
        {job.reals.at(at.image, at.position), spec_.inputs, 1, 1, m.levels + offset, pitch}, grid);
    chunk.offsets[chunk.rows] = static_cast<int32_t>(offset);
  }
  return row;
}

const uint8_t* Linear::tiles(int64_t group, int64_t column) const {
  // The last group may have fewer tiles.
  const int64_t depth = tile_count(group_inputs(spec_, group), kTileDepth);
  return weights_->data() + group * columns_ * column_bytes_ +
         column * column_bytes(depth, bits_, arrangement_);
}

void Linear::begin(int rows, int64_t column, int64_t width, float* reals, int64_t real_row) const {
  const int64_t first = column * kTileWidth;
  const int64_t there = std::min(width, spec_.outputs - first);
  for (int r = 0; r < rows; ++r, reals += real_row) {
    std::copy_n(spec_.bias + first, there, reals);
    std::fill(reals + there, reals + width, 0.0f);
  }
}

void Linear::add(const Chunk& chunk, int64_t group, int64_t column, int64_t width,
                 const int32_t* sums, int64_t sum_row, float* reals, int64_t real_row) const {
  const int64_t at = (group * columns_ + column) * kTileWidth;
  image_kernels().add_group({sums, sum_row, totals_->data() + at, scales_->data() + at,
                             spec_.zero_point, spec_.step, chunk.rows, width, reals, real_row});
}

/// Sums of one or two columns of tiles, [rows][kBlockCols].
void Linear::multiply(const Chunk& chunk, int64_t group, int64_t column, int count,
                      const Memory& m) const {
  const int64_t inputs = group_inputs(spec_, group);
  const int64_t depth = tile_count(inputs, kTileDepth);
  const auto* held = reinterpret_cast<const int8_t*>(tiles(group, column));
  int64_t bytes = column_bytes_;
  if (arrangement_ == nullptr) {
    unpacker (*kernels_)(tiles(group, column), bits_, count* depth, m.unpacked);
    held = m.unpacked;
    bytes = depth * kTileBytes;
  } else {
    bytes = column_bytes(depth, bits_, arrangement_);
  }
  thread_local std::vector<int64_t> offsets;
  thread_local std::vector<uint8_t> quads;
  offsets.resize(static_cast<size_t>(depth));
  quads.resize(static_cast<size_t>(depth));
  for (int64_t step = 0; step < depth; ++step) {
    offsets[step] = step * kTileDepth;
    quads[step] = live_quads(inputs, step);
  }
  GemmArgs g{};
  g.activations = chunk.levels + group * spec_.group;
  g.row_offsets = chunk.offsets;
  g.step_offsets = offsets.data();
  g.live_quads = quads.data();
  g.steps = depth;
  g.tile0 = held;
  g.tile1 = count == 2 ? held + bytes : nullptr;
  g.weight_bits = product_bits(*kernels_, bits_, spec_.qmax);
  g.arranged = arrangement_ != nullptr;
  g.rows = chunk.rows;
  g.sums = m.sums;
  kernels_->gemm(g);
}

void Linear::run_pairs(const LinearJob& job, const Chunk& chunk, Columns columns,
                       const Memory& m) const {
  for (int64_t column = columns.first; column < columns.last; column += 2) {
    const auto count = static_cast<int>(std::min<int64_t>(2, columns.last - column));
    const int64_t width = count * kTileWidth;
    begin(chunk.rows, column, width, m.reals, kBlockCols);
    for (int64_t group = 0; group < spec_.groups(); ++group) {
      multiply(chunk, group, column, count, m);
      add(chunk, group, column, width, m.sums, kBlockCols, m.reals, kBlockCols);
    }
    write(job, chunk, column, width, m.reals, kBlockCols);
  }
}

/// Every weight is used once: all columns of a group, then those of the next one.
void Linear::run_few(const LinearJob& job, const Chunk& chunk, Columns columns,
                     const Memory& m) const {
  const int64_t width = (columns.last - columns.first) * kTileWidth;
  const Gemv product = gemv(*kernels_);
  thread_local std::vector<int64_t> offsets;
  while (static_cast<int64_t>(offsets.size()) < depth_)
    offsets.push_back(static_cast<int64_t>(offsets.size()) * kTileDepth);
  begin(chunk.rows, columns.first, width, m.reals, m.wide);
  for (int64_t group = 0; group < spec_.groups(); ++group) {
    GemvArgs g{};
    for (int r = 0; r < chunk.rows; ++r)
      g.activations[r] = chunk.levels + chunk.offsets[r] + group * spec_.group;
    g.step_offsets = offsets.data();
    g.steps = tile_count(group_inputs(spec_, group), kTileDepth);
    g.packed = tiles(group, columns.first);
    g.bits = bits_;
    g.rows = chunk.rows;
    g.column_tiles = columns.last - columns.first;
    g.sums = m.sums;
    g.sums_stride = m.wide;
    product(g);
    add(chunk, group, columns.first, width, m.sums, m.wide, m.reals, m.wide);
  }
  write(job, chunk, columns.first, width, m.reals, m.wide);
}

void Linear::run_scalar(const LinearJob& job, const Chunk& chunk, Columns columns,
                        const Memory& m) const {
  const auto* weights = reinterpret_cast<const int8_t*>(weights_->data());
  const int64_t inputs = spec_.inputs;
  for (int64_t column = columns.first; column < columns.last; ++column) {
    begin(chunk.rows, column, kTileWidth, m.reals, kBlockCols);
    for (int64_t group = 0; group < spec_.groups(); ++group) {
      const int64_t first = group * spec_.group, last = first + group_inputs(spec_, group);
      for (int r = 0; r < chunk.rows; ++r) {
        const uint8_t* levels = chunk.levels + chunk.offsets[r];
        for (int64_t n = 0; n < kTileWidth; ++n) {
          const int64_t o = column * kTileWidth + n;
          int32_t sum = 0;
          for (int64_t i = first; o < spec_.outputs && i < last; ++i)
            sum += weights[o * inputs + i] * levels[i];
          m.sums[r * kBlockCols + n] = sum;
        }
      }
      add(chunk, group, column, kTileWidth, m.sums, kBlockCols, m.reals, kBlockCols);
    }
    write(job, chunk, column, kTileWidth, m.reals, kBlockCols);
  }
}

void Linear::write(const LinearJob& job, const Chunk& chunk, int64_t column, int64_t width,
                   float* reals, int64_t real_row) const {
  const ImageKernels& kernels = image_kernels();
  const int64_t first = column * kTileWidth, count = std::min(width, spec_.outputs - first);
  for (int r = 0; r < chunk.rows; ++r, reals += real_row) {
    const Place at = place(job, chunk.first + r);
    if (job.level_out.data != nullptr) {
      uint8_t* to = pixel_of(job.level_out, at) + first;
      kernels.finish_floats(reals, count, spec_.finish, to);
      if (const uint8_t* table = spec_.finish.table)
        for (int64_t j = 0; j < count; ++j)
          to[j] = table[to[j]];
      continue;
    }
    const int64_t channel = job.real_out.channel;
    float* to = job.real_out.at(at.image, at.position) + first * channel;
    for (int64_t j = 0; j < count; ++j)
      to[j * channel] = min_x86(max_x86(reals[j], spec_.lo), spec_.hi);
  }
}

void Linear::run(const LinearJob& job, Part part) const {
  int64_t row = 0, end = job.rows();
  Columns columns{0, columns_};
  if (end >= part.count * kRowsOfPart) {
    row = part.first(job.rows());
    end = part.last(job.rows());
  } else {
    const int64_t pairs = tile_count(columns_, 2);
    columns = {2 * part.first(pairs), std::min(columns_, 2 * part.last(pairs))};
  }
  if (columns.first == columns.last) return;
  const Memory m(*this);
  Chunk chunk;
  while (row < end) {
    row = stage(job, row, end, chunk, m);
    if (kernels_ == nullptr)
      run_scalar(job, chunk, columns, m);
    else if (chunk.rows <= kGemvRows && arrangement_ == nullptr)
      run_few(job, chunk, columns, m);
    else
      run_pairs(job, chunk, columns, m);
  }
}

double linear_bytes(const LinearSpec& spec) {
  const auto groups = static_cast<double>(spec.groups());
  const auto depth = static_cast<double>(tile_count(spec.group, kTileDepth));
  const auto columns = static_cast<double>(tile_count(spec.outputs, kTileWidth));
  // (Whole numbers while it is built.)
  const double whole = static_cast<double>(spec.outputs) * static_cast<double>(spec.inputs);
  // An order of bytes takes no more than as much again.
  return groups * columns * (depth * kTileBytes * 2.0 + 8.0 * kTileWidth) + whole;
}

double linear_scratch(const LinearSpec& spec) {
  const auto inputs = static_cast<double>(spec.inputs), outputs = static_cast<double>(spec.outputs);
  return 8.0 * (kRows * kBlockCols + kGemvRows * (outputs + kTileWidth)) +
         (kRows + 2.0 * kTileWidth) * (inputs + 2.0 * kTileDepth) + 2.0 * kTileBytes;
}

}  // namespace adalayer::cpu

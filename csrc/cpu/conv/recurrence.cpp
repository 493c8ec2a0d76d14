#include "cpu/conv/recurrence.hpp"

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

// Steps whose products are put side by side at once, where they lie in planes: a line of the cache.
constexpr int64_t kStepsTogether = 16;
// Kernels read whole registers of whole numbers.
constexpr int64_t kBehind = 16;
// Packed tiles are unpacked by every product. Where all of them fit the second-level cache anyhow,
// they are kept as bytes.
constexpr int64_t kKeptAsBytes = 256 << 10;

AlignedBuffer panels(std::span<const int8_t> weights, int64_t outputs, int64_t hidden, int bits,
                     const TileArrangement* arrangement, int qmax) {
  const int64_t bytes = column_bytes(tile_count(hidden, kTileDepth), bits, arrangement);
  AlignedBuffer packed(static_cast<size_t>(bytes * tile_count(outputs, kTileWidth)));
  pack_columns(weights.data(), hidden, outputs, hidden, bits, arrangement, qmax, packed.data());
  return packed;
}

/// out[s][g] = in[g * channel + s * step]
void side_by_side(const float* in, int64_t channel, int64_t step, int64_t channels, int64_t steps,
                  float* out) {
  for (int64_t g = 0; g < channels; ++g)
    for (int64_t s = 0; s < steps; ++s)
      out[s * channels + g] = in[g * channel + s * step];
}

}  // namespace

/// Rows of kGemvRows images each.
struct Recurrence::Memory {
  float *states, *cells, *products;
  int32_t* sums;
  uint8_t* levels;
  int64_t level_row, sum_row, product_row;

  explicit Memory(const Recurrence& r)
      : level_row(r.depth_ * kTileDepth),
        sum_row(r.columns_ * kTileWidth + kBehind),
        product_row(r.spec_.outputs() * kStepsTogether) {
    const int64_t hidden = r.spec_.hidden;
    const int64_t floats = kGemvRows * (2 * hidden + product_row + sum_row);
    thread_local AlignedBuffer memory;
    const auto bytes = static_cast<size_t>(4 * floats + kGemvRows * level_row + kTileDepth);
    if (memory.size() < bytes) memory = AlignedBuffer(bytes);
    states = reinterpret_cast<float*>(memory.data());
    cells = states + kGemvRows * hidden;
    products = cells + kGemvRows * hidden;
    sums = reinterpret_cast<int32_t*>(products + kGemvRows * product_row);
    levels = reinterpret_cast<uint8_t*>(sums + kGemvRows * sum_row);
  }
  uint8_t* levels_of(int row) const { return levels + row * level_row; }
};

Recurrence::Recurrence(const RecurrenceSpec& spec, std::span<const int8_t> weights, int bits)
    : spec_(spec),
      bits_(bits),
      depth_(tile_count(spec.hidden, kTileDepth)),
      columns_(tile_count(spec.outputs(), kTileWidth)) {
  const int64_t outputs = spec.outputs();
  std::vector<int32_t> correction(static_cast<size_t>(columns_ * kTileWidth + kBehind), 0);
  for (int64_t o = 0; o < outputs; ++o) {
    int32_t sum = 0;
    for (int64_t i = 0; i < spec.hidden; ++i)
      sum += weights[o * spec.hidden + i];
    correction[o] = -spec.state.zero_point * sum;
  }
  correction_ = std::make_shared<const std::vector<int32_t>>(std::move(correction));
  AlignedBuffer held;
  if (const KernelRow* kernels = active_kernels()) {
    gemv_ = gemv(*kernels);
    // Products of bytes that do not fit the sums of a vector by matrix product have another one.
    const int qmax = std::max(1, static_cast<int>(spec.state.hi) + spec.state.zero_point);
    if (kernels->arrangement != nullptr && product_bits(*kernels, bits, qmax) == 8)
      arranged_ = kernels;
    if (depth_ * columns_ * kTileBytes <= kKeptAsBytes) bits_ = 8;
    held = panels(weights, outputs, spec.hidden, bits_,
                  arranged_ == nullptr ? nullptr : kernels->arrangement, qmax);
  } else {
    held = AlignedBuffer(weights.size());
    std::memcpy(held.data(), weights.data(), weights.size());
  }
  weights_ = std::make_shared<const AlignedBuffer>(std::move(held));
}

void Recurrence::start(const RecurrenceJob& job, int64_t image, int row, const Memory& m) const {
  const int64_t hidden = spec_.hidden;
  const auto begin = [&](const float* given, float* to) {
    if (given == nullptr)
      std::fill_n(to, hidden, 0.0f);
    else
      std::copy_n(given + image * hidden, hidden, to);
  };
  float* states = m.states + row * hidden;
  begin(job.state, states);
  begin(job.cell, m.cells + row * hidden);
  const U8Finish grid = spec_.fed_back();
  uint8_t* levels = m.levels_of(row);
  for (int64_t j = 0; j < hidden; ++j)
    levels[j] = finish_u8(states[j], grid);
  std::fill(levels + hidden, levels + m.level_row, uint8_t{0});
}

void Recurrence::multiply(const Memory& m, int rows) const {
  const int64_t hidden = spec_.hidden;
  if (gemv_ == nullptr) {
    const auto* weights = reinterpret_cast<const int8_t*>(weights_->data());
    for (int row = 0; row < rows; ++row)
      for (int64_t o = 0; o < spec_.outputs(); ++o) {
        int32_t sum = 0;
        for (int64_t i = 0; i < hidden; ++i)
          sum += weights[o * hidden + i] * m.levels_of(row)[i];
        m.sums[row * m.sum_row + o] = sum;
      }
    return;
  }
  thread_local std::vector<int64_t> offsets;
  while (static_cast<int64_t>(offsets.size()) < depth_)
    offsets.push_back(static_cast<int64_t>(offsets.size()) * kTileDepth);
  if (arranged_ != nullptr) return multiply_arranged(m, offsets.data(), rows);
  GemvArgs g{};
  for (int row = 0; row < rows; ++row)
    g.activations[row] = m.levels_of(row);
  g.step_offsets = offsets.data();
  g.steps = depth_;
  g.packed = weights_->data();
  g.bits = bits_;
  g.rows = rows;
  g.column_tiles = columns_;
  g.sums = m.sums;
  g.sums_stride = m.sum_row;
  gemv_(g);
}

void Recurrence::multiply_arranged(const Memory& m, const int64_t* offsets, int rows) const {
  thread_local std::vector<uint8_t> quads;
  quads.resize(static_cast<size_t>(depth_));
  for (int64_t step = 0; step < depth_; ++step)
    quads[step] = live_quads(spec_.hidden, step);
  int32_t row_offsets[kGemvRows], sums[kGemvRows * kBlockCols];
  for (int row = 0; row < rows; ++row)
    row_offsets[row] = static_cast<int32_t>(row * m.level_row);
  const int64_t bytes = column_bytes(depth_, 8, arranged_->arrangement);
  GemmArgs g{};
  g.activations = m.levels;
  g.row_offsets = row_offsets;
  g.step_offsets = offsets;
  g.live_quads = quads.data();
  g.steps = depth_;
  g.weight_bits = 8;
  g.arranged = true;
  g.rows = rows;
  g.sums = sums;
  for (int64_t column = 0; column < columns_; column += 2) {
    const int64_t count = std::min<int64_t>(2, columns_ - column);
    g.tile0 = reinterpret_cast<const int8_t*>(weights_->data()) + column * bytes;
    g.tile1 = count == 2 ? g.tile0 + bytes : nullptr;
    arranged_->gemm(g);
    for (int row = 0; row < rows; ++row)
      std::copy_n(sums + row * kBlockCols, count * kTileWidth,
                  m.sums + row * m.sum_row + column * kTileWidth);
  }
}

void Recurrence::write(const RecurrenceJob& job, int64_t image, int64_t t, const float* state,
                       const float* cell, const uint8_t* levels) const {
  const int64_t hidden = spec_.hidden;
  if (job.reals.data == nullptr) {
    const ImageLayout& l = *job.levels.layout;
    uint8_t* to = job.levels.pixel(t / l.w, t % l.w) + image * l.image_bytes;
    if (const uint8_t* table = spec_.state.table)
      for (int64_t j = 0; j < hidden; ++j)
        to[j] = table[levels[j]];
    else
      std::copy_n(levels, hidden, to);
    return;
  }
  const int64_t channel = job.reals.channel;
  float* to = job.reals.at(image, t);
  for (int64_t j = 0; j < hidden; ++j)
    to[j * channel] = state[j];
  for (int64_t j = 0; spec_.cells && j < hidden; ++j)
    to[(hidden + j) * channel] = cell[j];
}

void Recurrence::run_few(const RecurrenceJob& job, int64_t first, int rows) const {
  const ImageKernels& kernels = image_kernels();
  const Memory m(*this);
  const int64_t hidden = spec_.hidden, outputs = spec_.outputs();
  for (int row = 0; row < rows; ++row)
    start(job, first + row, row, m);
  RecurrentCell cell{};
  cell.kind = spec_.kind;
  cell.hidden = hidden;
  cell.correction = correction_->data();
  cell.scale = spec_.scale;
  cell.bias = spec_.bias;
  cell.finish = spec_.fed_back();
  const bool apart = job.products.channel != 1;
  int64_t begin = 0;  // first step of those that are side by side
  for (int64_t k = 0; k < spec_.steps; ++k) {
    const int64_t t = spec_.step(k);
    if (apart && k % kStepsTogether == 0) {
      const int64_t count = std::min(kStepsTogether, spec_.steps - k);
      begin = spec_.reverse ? t - count + 1 : t;
      for (int row = 0; row < rows; ++row)
        side_by_side(job.products.at(first + row, begin), job.products.channel, job.products.step,
                     outputs, count, m.products + row * m.product_row);
    }
    multiply(m, rows);
    for (int row = 0; row < rows; ++row) {
      cell.sums = m.sums + row * m.sum_row;
      cell.products = apart ? m.products + row * m.product_row + (t - begin) * outputs
                            : job.products.at(first + row, t);
      cell.state = m.states + row * hidden;
      cell.cell = m.cells + row * hidden;
      cell.levels = m.levels_of(row);
      kernels.recurrent_cell(cell);
      write(job, first + row, t, cell.state, cell.cell, cell.levels);
    }
  }
}

void Recurrence::run(const RecurrenceJob& job, Part part) const {
  const int64_t last = part.last(job.images);
  for (int64_t n = part.first(job.images); n < last; n += kGemvRows)
    run_few(job, n, static_cast<int>(std::min<int64_t>(kGemvRows, last - n)));
}

double recurrence_bytes(int64_t outputs, int64_t hidden) {
  const auto o = static_cast<double>(tile_count(outputs, kTileWidth));
  const auto i = static_cast<double>(tile_count(hidden, kTileDepth));
  // (Whole numbers while it is built.)
  // An order of bytes takes no more than as much again.
  return o * i * kTileBytes * 3.0 + 4.0 * (o * kTileWidth + kBehind);
}

double recurrence_scratch(const RecurrenceSpec& spec) {
  const auto outputs = static_cast<double>(spec.outputs()),
             hidden = static_cast<double>(spec.hidden);
  return kGemvRows *
         (4.0 * (2.0 * hidden + outputs * kStepsTogether + outputs + 32.0) + hidden + 64.0);
}

}  // namespace adalayer::cpu

#include "cuda/conv_sparse.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "core/thread_pool.hpp"
#include "cuda/packing.hpp"

namespace adalayer::cuda {

namespace {

// Below this share of empty cells the form without them is not worth its memory.
constexpr double kFewestEmpty = 0.1;
constexpr int kPieceValues = 16;
constexpr int kCellPieces = kCellDepth / kPieceValues;  // of one cell's depth

/// The reduction of one block of channels without what is empty.
struct BlockSteps {
  std::vector<int32_t> kept;      // pieces, in the order in which they are multiplied
  std::vector<uint32_t> present;  // [steps] bit 2 * cell + half
};

bool any(const int8_t* w, int64_t count) {
  return std::any_of(w, w + count, [](int8_t v) { return v != 0; });
}

/// Output channel of row `row` of cell `cell`: unlike in the other forms the channels of a cell are
/// neighbours, as pruning removes them.
int64_t block_row(int64_t cell, int row) { return cell * kCellChannels + block_channel(1, 0, row); }

/// Of the block of channels whose cells are `first_cell` and on.
BlockSteps block_steps(const ProductMatrix& m, int64_t channels, int64_t base, int64_t first_cell,
                       int cells) {
  const int64_t count = m.columns / kPieceValues;
  // Bit c: cell c has weights in the piece.
  std::vector<uint32_t> used(static_cast<size_t>(count), 0);
  for (int cell = 0; cell < cells; ++cell)
    for (int row = 0; row < kCellChannels; ++row) {
      const int64_t o = block_row(first_cell + cell, row);
      if (o >= channels) continue;
      const int8_t* w = m.row(base + o);
      for (int64_t k = 0; k < count; ++k)
        if (any(w + k * kPieceValues, kPieceValues)) used[k] |= 1u << cell;
    }
  BlockSteps found;
  for (int64_t k = 0; k < count; ++k)
    if (used[k] != 0) found.kept.push_back(static_cast<int32_t>(k));
  // The order of a reduction is free: pieces that the same cells use come together, so that more
  // cells are empty. Neighbours in memory stay neighbours.
  std::stable_sort(found.kept.begin(), found.kept.end(),
                   [&](int32_t a, int32_t b) { return used[a] < used[b]; });
  const size_t per_step = 2 * kCellPieces;
  found.present.assign((found.kept.size() + per_step - 1) / per_step, 0);
  for (size_t k = 0; k < found.kept.size(); ++k)
    for (int cell = 0; cell < cells; ++cell)
      if ((used[found.kept[k]] >> cell & 1) != 0)
        found.present[k / per_step] |= 1u << (2 * cell + k % per_step / kCellPieces);
  return found;
}

}  // namespace

int64_t cell_channel(int64_t channels, int64_t cell, int row) {
  const int64_t all = cells_of(static_cast<int>(channels));
  const int cells = static_cast<int>(std::min<int64_t>(4, all - cell / 4 * 4));
  return cell / 4 * kBlockChannels + block_channel(cells, static_cast<int>(cell % 4), row);
}

void put_weight(uint8_t* cell, int bits, int row, int depth, int8_t w) {
  const int h = depth / 32, column = depth % 32;
  const int r = row / 8 + column / 16 * 2;
  const int lane = row % 8 * 4 + column % 16 / 4, i = column % 4;
  const auto v = static_cast<uint32_t>(static_cast<uint8_t>(w << (8 - bits)));
  int left = bits, top = 8;
  for (const int plane : {8, 4, 2, 1}) {
    if (left < plane) continue;
    const FieldPlace at = field_place(bits, plane, lane, h, r, i);
    const uint32_t field = (v >> (top - plane)) & ((1u << plane) - 1);
    cell[at.byte] = static_cast<uint8_t>(cell[at.byte] | field << at.bit);
    top -= plane;
    left -= plane;
  }
}

int64_t add_blocks(const ProductMatrix& m, const std::vector<int32_t>& pieces, ProductPlan& p,
                   ImageBuilder& image) {
  if (p.piece != kPieceValues || m.columns == 0) return 0;
  const int64_t blocks = (p.cells + 3) / 4, all = blocks * p.groups;
  std::vector<BlockSteps> found(static_cast<size_t>(all));
  parallel_for(all, default_threads(), [&](int64_t b, int) {
    const int64_t first = b % blocks * 4;
    found[b] = block_steps(m, p.group_out, b / blocks * p.group_out, first,
                           static_cast<int>(std::min<int64_t>(4, p.cells - first)));
  });
  std::vector<int32_t> first_steps{0};
  std::vector<uint32_t> step_cells;
  uint32_t stored = 0;
  int64_t longest = 0;
  for (const BlockSteps& b : found) {
    for (const uint32_t present : b.present) {
      step_cells.push_back(stored);
      step_cells.push_back(present);
      stored += static_cast<uint32_t>(std::popcount(present));
    }
    longest = std::max(longest, static_cast<int64_t>(b.present.size()));
    first_steps.push_back(static_cast<int32_t>(step_cells.size() / 2));
  }
  const int64_t depth_cells = (m.columns + kCellDepth - 1) / kCellDepth;
  const int64_t dense = depth_cells * p.cells * p.groups;
  if (static_cast<double>(stored) > (1.0 - kFewestEmpty) * static_cast<double>(dense)) return 0;

  const int64_t cell_bytes = int64_t{kCellBytesPerBit} * p.bits;
  std::vector<uint8_t> packed(static_cast<size_t>(stored * cell_bytes), 0);
  std::vector<int32_t> own_pieces(step_cells.size() / 2 * (kStepDepth / kPieceValues) * 2);
  for (size_t k = 0; k < own_pieces.size(); k += 2)
    own_pieces[k + 1] = kMaxTaps | kMaxTaps << 8;  // a tap that no position has
  parallel_for(all, default_threads(), [&](int64_t b, int) {
    const int64_t base = b / blocks * p.group_out, first = b % blocks * 4;
    const int cells = static_cast<int>(std::min<int64_t>(4, p.cells - first));
    for (size_t k = 0; k < found[b].kept.size(); ++k) {
      const int32_t piece = found[b].kept[k];
      const auto step = first_steps[b] + static_cast<int64_t>(k / (2 * kCellPieces));
      const int half = static_cast<int>(k % (2 * kCellPieces) / kCellPieces);
      const int depth = static_cast<int>(k % kCellPieces) * kPieceValues;
      const size_t place = (static_cast<size_t>(first_steps[b]) * 2 * kCellPieces + k) * 2;
      own_pieces[place] = pieces[2 * piece];
      own_pieces[place + 1] = pieces[2 * piece + 1];
      const uint32_t start = step_cells[2 * step], present = step_cells[2 * step + 1];
      for (int cell = 0; cell < cells; ++cell) {
        const int bit = 2 * cell + half;
        if ((present >> bit & 1) == 0) continue;
        const auto number = start + std::popcount(present & ((1u << bit) - 1));
        uint8_t* to = packed.data() + number * cell_bytes;
        for (int row = 0; row < kCellChannels; ++row) {
          const int64_t o = block_row(first + cell, row);
          if (o >= p.group_out) continue;
          const int8_t* w = m.row(base + o) + int64_t{piece} * kPieceValues;
          for (int i = 0; i < kPieceValues; ++i)
            if (w[i] != 0) put_weight(to, p.bits, row, depth + i, w[i]);
        }
      }
    }
  });
  p.blocks.there = true;
  p.blocks.longest = longest;
  p.blocks.stored_cells = stored;
  p.blocks.steps = static_cast<int64_t>(step_cells.size() / 2);
  p.blocks.first_steps = image.add(first_steps);
  p.blocks.step_cells = image.add(step_cells);
  p.blocks.pieces = image.add(own_pieces);
  p.blocks.weights = image.add(packed);
  return static_cast<int64_t>(packed.size());
}

int64_t add_structured(const ProductMatrix& m, ProductPlan& p, ImageBuilder& image) {
  if (p.piece != kPieceValues || m.columns == 0) return 0;
  const auto is_structured = [](const int8_t* w, int64_t columns) {
    for (int64_t k = 0; k < columns; k += 4)
      if ((w[k] != 0) + (w[k + 1] != 0) + (w[k + 2] != 0) + (w[k + 3] != 0) > 2) return false;
    return true;
  };
  const int64_t channels = int64_t{p.groups} * p.group_out;
  for (int64_t o = 0; o < channels; ++o)
    if (!is_structured(m.row(o), m.columns)) return 0;

  const int64_t cell_bytes = int64_t{kCellBytesPerBit} * p.bits + kPlacesBytes;
  p.structured_group_bytes = int64_t{p.steps} * p.cells * cell_bytes;
  std::vector<uint8_t> packed(static_cast<size_t>(p.structured_group_bytes * p.groups), 0);
  parallel_for(int64_t{p.groups} * p.cells, default_threads(), [&](int64_t task, int) {
    const int64_t g = task / p.cells, cell = task % p.cells;
    for (int row = 0; row < kCellChannels; ++row) {
      const int64_t o = cell_channel(p.group_out, cell, row);
      const int8_t* w = o < p.group_out ? m.row(g * p.group_out + o) : nullptr;
      for (int64_t step = 0; step < p.steps; ++step) {
        uint8_t* to =
            packed.data() + g * p.structured_group_bytes + (step * p.cells + cell) * cell_bytes;
        uint8_t* places = to + cell_bytes - kPlacesBytes;
        for (int four = 0; four < kStepDepth / 4; ++four) {
          // Two places in order, even where fewer weights differ from zero.
          std::array<int, 2> kept{0, 1};
          const int64_t k = step * kStepDepth + four * 4;
          if (w != nullptr && k < m.columns) {
            int count = 0;
            std::array<int, 2> there{};
            for (int i = 0; i < 4; ++i)
              if (w[k + i] != 0) there[count++] = i;
            if (count == 2) kept = there;
            if (count == 1) kept = there[0] < 3 ? std::array{there[0], 3} : std::array{2, 3};
            for (int i = 0; i < 2; ++i)
              put_weight(to, p.bits, row, 2 * four + i, w[k + kept[i]]);
          }
          const FieldPlace at = places_place(row, four);
          places[at.byte] =
              static_cast<uint8_t>(places[at.byte] | (kept[0] | kept[1] << 2) << at.bit);
        }
      }
    }
  });
  p.structured = image.add(packed);
  return static_cast<int64_t>(packed.size());
}

}  // namespace adalayer::cuda

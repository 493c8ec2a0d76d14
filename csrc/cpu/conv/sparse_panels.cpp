#include "cpu/conv/sparse_panels.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/conv/matmul.hpp"
#include "formats/panels.hpp"

namespace adalayer::cpu {
namespace {

using formats::kTileBytes;

// A product of one column tile costs this much of one that is shared by two, whose activations are
// loaded once for both.
constexpr double kAlone = 1.25;

/// Whether tile `step` of column tile `tile` holds anything but zeros. Most do, in the first rows.
bool holds_weights(const ConvPlan& plan, std::span<const int8_t> weights, int64_t tile,
                   int64_t step) {
  const int64_t outs = plan.shape.group_out(), reduction = plan.shape.reduction();
  const int64_t first = tile % plan.column_tiles * formats::kTileWidth;
  const int64_t last = std::min(first + formats::kTileWidth, outs);
  const int32_t* from = plan.source.data() + step * formats::kTileDepth;
  for (int64_t o = first; o < last; ++o) {
    const int8_t* row = weights.data() + (tile / plan.column_tiles * outs + o) * reduction;
    for (int64_t depth = 0; depth < formats::kTileDepth; ++depth)
      if (from[depth] >= 0 && row[from[depth]] != 0) return true;
  }
  return false;
}

/// [tile of all groups][step]: whether it holds anything.
std::vector<uint8_t> live_tiles(const ConvPlan& plan, std::span<const int8_t> weights) {
  std::vector<uint8_t> live;
  live.reserve(static_cast<size_t>(plan.all_tiles() * plan.steps));
  for (int64_t t = 0; t < plan.all_tiles(); ++t)
    for (int64_t step = 0; step < plan.steps; ++step)
      live.push_back(static_cast<uint8_t>(holds_weights(plan, weights, t, step)));
  return live;
}

}  // namespace

int64_t dense_products(const ConvPlan& plan) {
  int64_t quads = 0;
  for (const uint8_t live : plan.live_quads)
    quads += live;
  return quads * plan.all_tiles();
}

SparsePanels plan_blocks(const ConvPlan& plan, std::span<const int8_t> weights) {
  SparsePanels sparse;
  sparse.kind = Panels::Blocks;
  sparse.tiles = plan.all_tiles() * plan.steps;
  const std::vector<uint8_t> live = live_tiles(plan, weights);
  const auto is_live = [&](int64_t tile, int64_t step) {
    return live[tile * plan.steps + step] != 0;
  };
  const auto add_list = [&](int64_t first, int64_t tiles) {
    SparsePanels::List list{static_cast<int32_t>(sparse.steps.size()), 0};
    int64_t quads = 0;
    for (int64_t step = 0; step < plan.steps; ++step) {
      bool wanted = false;
      for (int64_t t = 0; t < tiles; ++t)
        wanted = wanted || is_live(first + t, step);
      if (!wanted) continue;
      sparse.steps.push_back(static_cast<int32_t>(step));
      ++list.count;
      quads += plan.live_quads[step];
    }
    for (int64_t t = 0; t < tiles; ++t) {
      sparse.lists.push_back(list);
      sparse.at.push_back(sparse.stored_tiles);
      sparse.stored_tiles += list.count;
    }
    return quads * tiles;
  };
  for (int64_t group = 0; group < plan.shape.groups; ++group)
    for (int64_t t = 0; t < plan.column_tiles; t += 2) {
      const int64_t first = group * plan.column_tiles + t;
      int64_t alone = 0, either = 0;
      for (int64_t step = 0; step < plan.steps; ++step) {
        const bool a = is_live(first, step);
        const bool b = t + 1 < plan.column_tiles && is_live(first + 1, step);
        alone += (a + b) * plan.live_quads[step];
        either += (a || b) * 2 * plan.live_quads[step];
      }
      const bool two = t + 1 < plan.column_tiles;
      const bool joint = two && static_cast<double>(either) <= kAlone * static_cast<double>(alone);
      sparse.joint.push_back(static_cast<uint8_t>(joint));
      if (joint) {
        sparse.products += add_list(first, 2);
      } else {
        const int64_t quads = add_list(first, 1) + (two ? add_list(first + 1, 1) : 0);
        // A tile without a neighbour costs the same in the dense panels.
        sparse.products += two ? static_cast<int64_t>(kAlone * static_cast<double>(quads)) : quads;
      }
    }
  sparse.at.push_back(sparse.stored_tiles);
  if (plan.arranged(8)) {
    sparse.extra.push_back(0);
    for (const SparsePanels::List& list : sparse.lists)
      sparse.extra.push_back(sparse.extra.back() + plan.arrangement->extra_bytes(list.count));
  }
  return sparse;
}

SparsePanels plan_bitmask(const ConvPlan& plan, std::span<const int8_t> weights, int bits) {
  SparsePanels sparse;
  sparse.kind = Panels::Bitmask;
  sparse.tiles = sparse.stored_tiles = plan.all_tiles() * plan.steps;
  alignas(64) int8_t tile[kTileBytes];
  int64_t bytes = 0;
  for (int64_t t = 0; t < plan.all_tiles(); ++t) {
    sparse.at.push_back(bytes);
    for (int64_t step = 0; step < plan.steps; ++step) {
      fill_tile(plan, weights, t, step, tile);
      bytes += formats::bitmask_tile_bytes(tile, bits);
    }
  }
  // Readers touch a little of what follows; the next panels are aligned.
  sparse.at.push_back((bytes + formats::kBitmaskSlack + 63) / 64 * 64);
  return sparse;
}

void pack_sparse(const ConvPlan& plan, const SparsePanels& sparse, std::span<const int8_t> weights,
                 int bits, uint8_t* out) {
  if (sparse.kind == Panels::Blocks) {
    PanelWriter writer(plan, weights, bits, out);
    for (int64_t t = 0; t < plan.all_tiles(); ++t) {
      const SparsePanels::List list = sparse.lists[t];
      writer.write(t, {sparse.steps.data() + list.first, static_cast<size_t>(list.count)});
    }
    return;
  }
  alignas(64) int8_t tile[kTileBytes];
  uint8_t* to = out;
  for (int64_t t = 0; t < plan.all_tiles(); ++t)
    for (int64_t step = 0; step < plan.steps; ++step) {
      fill_tile(plan, weights, t, step, tile);
      to += formats::pack_bitmask_tile(tile, bits, to);
    }
  std::memset(to, 0, static_cast<size_t>(out + sparse.bytes(bits) - to));
}

}  // namespace adalayer::cpu

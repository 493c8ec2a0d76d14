// Weights of a product on tensor cores in cells, and the two forms that leave zeros out.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/conv_plan.hpp"

namespace adalayer::cuda {

/// Weights of a product: a row per output channel, in the order of its pieces.
struct ProductMatrix {
  int64_t columns = 0;
  std::vector<int8_t> w;
  const int8_t* row(int64_t channel) const { return w.data() + channel * columns; }
};

/// Output channel, within a group of `channels`, of row `row` of cell `cell`; it may lie beyond.
int64_t cell_channel(int64_t channels, int64_t cell, int row);

/// Writes one weight into its cell, whose bits were zero.
void put_weight(uint8_t* cell, int bits, int row, int depth, int8_t w);

/// Packs the form without empty cells, where enough of them are empty to matter. `pieces` are the
/// dense form's. Fills `p.blocks`, or leaves it; returns the bytes of the packed weights.
int64_t add_blocks(const ProductMatrix& m, const std::vector<int32_t>& pieces, ProductPlan& p,
                   ImageBuilder& image);

/// Packs the form for sparse tensor cores, where of every four neighbours at most two weights
/// differ from zero. Fills `p.structured`, or leaves it; returns the bytes of the packed weights.
int64_t add_structured(const ProductMatrix& m, ProductPlan& p, ImageBuilder& image);

}  // namespace adalayer::cuda

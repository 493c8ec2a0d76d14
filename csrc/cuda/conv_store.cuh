// What the convolutions on tensor cores have in common after they have multiplied: sums of several
// blocks come together, and are stored.
#pragma once

#include "cuda/conv_output.cuh"
#include "cuda/conv_pipeline.cuh"

namespace adalayer::cuda {

/// Adds this block's sums to those of the other blocks that share its tile. Returns whether all
/// have arrived: that block alone has the totals in `sums`, and leaves zeros behind.
template <class T>
ADALAYER_DEVICE bool collect(const ConvParams& p, int32_t tile, int32_t (&sums)[4][T::kColumns][4],
                             uint8_t* shared) {
  int32_t* total = p.partial + static_cast<int64_t>(tile) * T::kSums + thread_index();
  ADALAYER_UNROLL
  for (int cell = 0; cell < 4; ++cell)
    ADALAYER_UNROLL
  for (int j = 0; j < T::kColumns; ++j)
    ADALAYER_UNROLL
  for (int r = 0; r < 4; ++r)
    atomic_add(total + ((cell * T::kColumns + j) * 4 + r) * T::kThreads, sums[cell][j][r]);
  thread_fence();
  sync_threads();  // also: nobody reads the stages any more
  auto* last = reinterpret_cast<int32_t*>(shared);
  if (thread_index() == 0) *last = atomic_add(p.arrived + tile, 1) == p.splits - 1;
  sync_threads();
  if (*last == 0) return false;
  thread_fence();
  ADALAYER_UNROLL
  for (int cell = 0; cell < 4; ++cell)
    ADALAYER_UNROLL
  for (int j = 0; j < T::kColumns; ++j)
    ADALAYER_UNROLL
  for (int r = 0; r < 4; ++r) {
    int32_t* at = total + ((cell * T::kColumns + j) * 4 + r) * T::kThreads;
    sums[cell][j][r] = load_shared_by_blocks(at);
    *at = 0;
  }
  if (thread_index() == 0) p.arrived[tile] = 0;
  return true;
}

/// Levels of 2 * kCells neighbouring channels, beginning at `channel`, of one pixel.
template <int kCells>
ADALAYER_DEVICE void store_levels(const ConvOutput& o, const float* y, int32_t pixel,
                                  int32_t channel, int32_t end, bool together) {
  const int64_t at = static_cast<int64_t>(pixel) * o.pitch + channel;
  constexpr int kCount = 2 * kCells;
  if (together) {
    if (channel + kCount > end) return;
    alignas(8) uint8_t residual[8] = {}, q[8];
    if (o.residual != nullptr) {
      if constexpr (kCells == 4)
        *reinterpret_cast<Words2*>(residual) = *reinterpret_cast<const Words2*>(o.residual + at);
      else if constexpr (kCells == 2)
        *reinterpret_cast<uint32_t*>(residual) =
            *reinterpret_cast<const uint32_t*>(o.residual + at);
      else
        *reinterpret_cast<uint16_t*>(residual) =
            *reinterpret_cast<const uint16_t*>(o.residual + at);
    }
    ADALAYER_UNROLL
    for (int c = 0; c < kCount; ++c)
      q[c] = output_level(y[c], o.residual != nullptr, residual[c], o);
    if constexpr (kCells == 4)
      *reinterpret_cast<Words2*>(o.levels + at) = *reinterpret_cast<const Words2*>(q);
    else if constexpr (kCells == 2)
      *reinterpret_cast<uint32_t*>(o.levels + at) = *reinterpret_cast<const uint32_t*>(q);
    else
      *reinterpret_cast<uint16_t*>(o.levels + at) = *reinterpret_cast<const uint16_t*>(q);
    return;
  }
  ADALAYER_UNROLL
  for (int c = 0; c < kCount; ++c) {
    if (channel + c >= end) return;
    const uint8_t r = o.residual == nullptr ? 0 : o.residual[at + c];
    o.levels[at + c] = output_level(y[c], o.residual != nullptr, r, o);
  }
}

/// Stores a warp's sums of kCells cells from `cell` on, whose channels are permuted among them;
/// `first` is their first channel within the group that begins at `base`.
template <class T, int kCells>
ADALAYER_DEVICE void store_block(const ConvParams& p, int32_t base, int32_t first, int32_t position,
                                 const int32_t (&sums)[4][T::kColumns][4], int cell = 0) {
  const ConvOutput& o = p.out;
  const int lane = thread_index() % 32;
  const int32_t mine = first + lane / 4 * 2 * kCells;  // this lane's first channel in the group
  const int32_t channel = base + mine, end = base + p.group_out;
  const bool vector = p.vector_store != 0;
  // The last group's stores may fill the pixel's padding.
  const int32_t limit = vector && end == o.channels_count ? o.pitch : end;
  if (channel >= limit) return;
  ChannelConstants constants[2 * kCells];
  ADALAYER_UNROLL
  for (int c = 0; c < 2 * kCells; ++c) {
    // (The array goes on for a block of zeros behind its end.)
    const auto v = load_constant(reinterpret_cast<const Words4*>(o.channels + channel + c));
    constants[c] = {bits_to_float(v.x), bits_to_float(v.y), static_cast<int32_t>(v.z), 0};
  }
  ADALAYER_UNROLL
  for (int j = 0; j < T::kColumns; ++j) {
    ADALAYER_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int32_t at = position + j * 8 + lane % 4 * 2 + e;
      if (at >= p.positions) continue;
      const int32_t pixel = output_pixel(o, at, p.plane, p.width);
      float y[2 * kCells];
      ADALAYER_UNROLL
      for (int c = 0; c < 2 * kCells; ++c)
        y[c] = sum_value(sums[cell + c / 2][j][c % 2 * 2 + e] >> p.shift, constants[c]);
      if (o.levels != nullptr) {
        store_levels<kCells>(o, y, pixel, channel, limit, vector);
      } else {
        ADALAYER_UNROLL
        for (int c = 0; c < 2 * kCells; ++c)
          if (channel + c < end) store_number(y[c], pixel, channel + c, o);
      }
    }
  }
}

/// The end of a block: `cells` of the warp's 64 channels exist, of the tile's block `warp_m` of
/// them; its positions are the stretch `warp_n` of 8 * T::kColumns. All threads call it; `shared`
/// may be overwritten as soon as they have.
template <class T>
ADALAYER_DEVICE void store_part(const ConvParams& p, const Part<T>& part, int cells, int warp_m,
                                int warp_n, int32_t (&sums)[4][T::kColumns][4], uint8_t* shared) {
  if (p.splits > 1) {
    const int32_t number = part.group * static_cast<int32_t>(grid_x()) + part.tile;
    if (!collect<T>(p, number, sums, shared)) return;
  }
  const int32_t base = part.group * p.group_out;
  const int32_t first = (part.tile_m * T::kWarpsM + warp_m) * kBlockChannels;
  const int32_t position = part.tile_n * T::kN + warp_n * 8 * T::kColumns;
  if constexpr (T::kForm == Form::Blocks) {
    // A cell is neighbouring channels, so that it is empty where a block of them is.
    ADALAYER_UNROLL
    for (int cell = 0; cell < 4; ++cell)
      if (cell < cells)
        store_block<T, 1>(p, base, first + cell * kCellChannels, position, sums, cell);
    return;
  }
  if (cells == 4)
    store_block<T, 4>(p, base, first, position, sums);
  else if (cells == 2)
    store_block<T, 2>(p, base, first, position, sums);
  else if (cells == 1)
    store_block<T, 1>(p, base, first, position, sums);
}

}  // namespace adalayer::cuda

// Convolution as an implicit product on tensor cores, weights on the left: output channels are the
// rows and positions the columns. A block multiplies kM channels with kN positions, step by step of
// 128 bytes of the reduction; activations and packed weights wait in shared memory, kStages deep,
// and weights become bytes in registers.
#pragma once

#include "cuda/conv_output.cuh"
#include "cuda/kernels.hpp"
#include "cuda/packing.hpp"

namespace adalayer::cuda {

/// kWarpsM x kWarpsN warps of 64 channels x 8 * kColumns positions each. kPiece: bytes of the input
/// that surely lie together (its pitch is a multiple of them).
template <int kBits_, int kWarpsM_, int kWarpsN_, int kColumns_, int kStages_, int kPiece_,
          Form kForm_ = Form::Dense>
struct ConvTile {
  static constexpr int kBits = kBits_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kColumns = kColumns_, kStages = kStages_, kPiece = kPiece_;
  static constexpr Form kForm = kForm_;
  static constexpr int kM = kBlockChannels * kWarpsM, kN = 8 * kColumns * kWarpsN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kInputBytes = kN * kStepDepth;
  static constexpr int kCellBytes = kCellBytesPerBit * kBits;
  // A row of cells in one step.
  static constexpr int kCellStepBytes =
      kForm == Form::Structured ? kCellBytes + kPlacesBytes : 2 * kCellBytes;
  static constexpr int kWeightBytes = kM / kCellChannels * kCellStepBytes;
  static constexpr int kStageBytes = kInputBytes + kWeightBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kRowsApart = kThreads / 8;
  static constexpr int kRows = (kN + kRowsApart - 1) / kRowsApart;  // of the input, per thread
  static constexpr int kSums = kM * kN;
  static_assert(kColumns % 2 == 0 && kWeightBytes % 16 == 0);
  static_assert(kForm != Form::Blocks || kWarpsM == 1);
};

/// What a thread loads of the input: one chunk of 16 bytes in each of kRows rows, every step.
template <class T>
struct InputLoader {
  static constexpr int kPieces = 16 / T::kPiece;
  const ConvParams& p;
  const uint8_t* in;  // of the group
  int32_t offset[T::kRows];
  uint32_t inside[T::kRows];      // bits 0..14 vertical taps, 16..30 horizontal ones
  int32_t next[kPieces][2] = {};  // pieces of the step that is loaded next

  ADALAYER_DEVICE InputLoader(const ConvParams& params, int32_t first_position, int32_t group)
      : p(params), in(params.in + static_cast<int64_t>(group) * params.group_in_bytes) {
    ADALAYER_UNROLL
    for (int r = 0; r < T::kRows; ++r) {
      const int row = thread_index() / 8 + r * T::kRowsApart;
      const int32_t position = first_position + row;
      offset[r] = 0;
      inside[r] = 0;
      if (position >= p.positions || row >= T::kN) continue;
      const int32_t n = position / p.plane, rest = position - n * p.plane;
      const int32_t y = rest / p.width * p.stride_y, x = rest % p.width * p.stride_x;
      offset[r] = n * p.in_image_bytes + y * p.in_row_bytes + x * p.in_pixel_bytes;
      for (int k = 0; k < p.taps_y; ++k)
        if (static_cast<uint32_t>(y + p.tap_y[k]) < static_cast<uint32_t>(p.in_h))
          inside[r] |= 1u << k;
      for (int k = 0; k < p.taps_x; ++k)
        if (static_cast<uint32_t>(x + p.tap_x[k]) < static_cast<uint32_t>(p.in_w))
          inside[r] |= 1u << (16 + k);
    }
  }

  /// Reads which pieces step `k` consists of; to be called a step before load().
  ADALAYER_DEVICE void look_up(int32_t k) {
    const int32_t first = (k * 8 + thread_index() % 8) * kPieces;
    ADALAYER_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const Words2 piece =
          load_constant(reinterpret_cast<const Words2*>(p.pieces + 2 * (first + i)));
      next[i][0] = static_cast<int32_t>(piece.x);
      next[i][1] = static_cast<int32_t>(piece.y);
    }
  }

  ADALAYER_DEVICE void load(uint8_t* stage) const {
    ADALAYER_UNROLL
    for (int r = 0; r < T::kRows; ++r) {
      const int row = thread_index() / 8 + r * T::kRowsApart;
      if (T::kRowsApart * T::kRows > T::kN && row >= T::kN) break;
      uint8_t* to = stage + chunk_offset(row, thread_index() % 8);
      ADALAYER_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        const uint32_t taps = static_cast<uint32_t>(next[i][1]);
        const bool there =
            ((inside[r] >> (taps & 15u)) & (inside[r] >> (16u + (taps >> 8))) & 1u) != 0;
        const uint8_t* from = there ? in + offset[r] + next[i][0] : p.zero_page;
        copy_async<T::kPiece>(to + i * T::kPiece, from);
      }
    }
  }
};

/// Packed weights of a block's channels, one step: consecutive bytes.
template <class T>
struct WeightLoader {
  const uint8_t* from;
  const uint32_t* step_cells;  // Form::Blocks
  uint32_t stride;             // bytes of a step; Form::Blocks: the step's first cell
  int32_t bytes;

  ADALAYER_DEVICE WeightLoader(const ConvParams& p, int32_t tile_m, int32_t group)
      : from(p.weights), step_cells(p.step_cells), stride(0), bytes(0) {
    if constexpr (T::kForm != Form::Blocks) {
      from += group * p.group_weight_bytes + static_cast<int64_t>(tile_m) * T::kWeightBytes;
      stride = static_cast<uint32_t>(p.cells * T::kCellStepBytes);
      const int32_t left = p.cells - tile_m * (T::kM / kCellChannels);
      bytes = (left < T::kM / kCellChannels ? left : T::kM / kCellChannels) * T::kCellStepBytes;
    }
  }

  /// Form::Blocks: finds what step `k` consists of; to be called a step before load().
  ADALAYER_DEVICE void look_up(int32_t k) {
    if constexpr (T::kForm == Form::Blocks) {
      const auto cells = load_constant(reinterpret_cast<const Words2*>(step_cells + 2 * k));
      stride = cells.x;
      bytes = count_bits(cells.y) * T::kCellBytes;
    }
  }

  ADALAYER_DEVICE void load(uint8_t* stage, int32_t k) const {
    uint8_t* to = stage + T::kInputBytes;
    const auto times = static_cast<uint32_t>(T::kForm == Form::Blocks ? T::kCellBytes : k);
    const uint8_t* step = from + static_cast<uint64_t>(times) * stride;
    for (int32_t at = thread_index() * 16; at < bytes; at += T::kThreads * 16)
      copy_async<16>(to + at, step + at);
  }
};

/// Half `h` of a cell as a left operand.
template <int kBits>
ADALAYER_DEVICE void load_weights(const uint8_t* cell, int h, uint32_t out[4]) {
  using U = Unpack<kBits>;
  const int lane = thread_index() % 32;
  uint32_t wide[4] = {}, two = 0, one = 0;
  if constexpr (U::kEight) {
    const auto v = *reinterpret_cast<const Words4*>(cell + h * 512 + lane * 16);
    wide[0] = v.x, wide[1] = v.y, wide[2] = v.z, wide[3] = v.w;
  }
  if constexpr (U::kFour) {
    const auto v = *reinterpret_cast<const Words2*>(cell + h * 256 + lane * 8);
    wide[0] = v.x, wide[1] = v.y;
  }
  if constexpr (U::kTwo)
    two = *reinterpret_cast<const uint32_t*>(cell + plane_offset(kBits, 2) + h * 128 + lane * 4);
  if constexpr (U::kOne)
    one = *reinterpret_cast<const uint32_t*>(cell + plane_offset(kBits, 1) + lane * 4);
  U::half(h, wide, two, one, out);
}

/// Activations of 8 * kColumns positions and half `half` (32 values) of a stage, as right operands:
/// registers `first` and `first + 1` of each.
template <class T, int kRegisters>
ADALAYER_DEVICE void load_input(const uint8_t* stage, int row, int half, int first,
                                uint32_t (&right)[T::kColumns][kRegisters]) {
  const int chunk = half * 2 + thread_index() % 32 / 8 % 2;
  ADALAYER_UNROLL
  for (int j = 0; j < T::kColumns; j += 2) {
    uint32_t v[4];
    load_matrices(stage + chunk_offset(row + j * 8, chunk), v);
    right[j][first] = v[0], right[j][first + 1] = v[1];
    right[j + 1][first] = v[2], right[j + 1][first + 1] = v[3];
  }
}

/// Products of one stage. `cells` of the warp's four hold channels; `halves` of the step's four
/// stretches of 32 hold values; `stored` (Form::Blocks): which cells are there.
template <class T>
ADALAYER_DEVICE void multiply_stage(const uint8_t* stage, int warp_m, int warp_n, int cells,
                                    int halves, uint32_t stored,
                                    int32_t (&sums)[4][T::kColumns][4]) {
  const int lane = thread_index() % 32;
  const uint8_t* weights = stage + T::kInputBytes + warp_m * 4 * T::kCellStepBytes;
  // Two columns of eight positions at a time: which row this lane names.
  const int row = warp_n * 8 * T::kColumns + lane / 16 * 8 + lane % 8;
  if constexpr (T::kForm == Form::Structured) {
    ADALAYER_UNROLL
    for (int product = 0; product < 2; ++product) {
      if (2 * product >= halves) break;
      uint32_t right[T::kColumns][4];
      load_input<T, 4>(stage, row, 2 * product, 0, right);
      load_input<T, 4>(stage, row, 2 * product + 1, 2, right);
      ADALAYER_UNROLL
      for (int cell = 0; cell < 4; ++cell) {
        if (cell >= cells) break;
        const uint8_t* at = weights + cell * T::kCellStepBytes;
        uint32_t left[4];
        load_weights<T::kBits>(at, product, left);
        const uint32_t places =
            *reinterpret_cast<const uint32_t*>(at + T::kCellBytes + product * 128 + lane * 4);
        ADALAYER_UNROLL
        for (int j = 0; j < T::kColumns; ++j)
          multiply_structured(sums[cell][j], left, right[j], places);
      }
    }
  } else {
    ADALAYER_UNROLL
    for (int half = 0; half < 4; ++half) {
      if (half >= halves) break;
      const int odd = half / 2;  // of the step's two cells one behind the other
      if (T::kForm == Form::Blocks && (stored >> odd & 0x55u) == 0) continue;
      uint32_t right[T::kColumns][2];
      load_input<T, 2>(stage, row, half, 0, right);
      ADALAYER_UNROLL
      for (int cell = 0; cell < 4; ++cell) {
        if (cell >= cells) break;
        int at = cell * 2 + odd;
        if constexpr (T::kForm == Form::Blocks) {
          if ((stored >> at & 1u) == 0) continue;
          at = count_bits(stored & ((1u << at) - 1u));
        }
        uint32_t left[4];
        load_weights<T::kBits>(weights + at * T::kCellBytes, half % 2, left);
        ADALAYER_UNROLL
        for (int j = 0; j < T::kColumns; ++j)
          multiply_s8_u8(sums[cell][j], left, right[j]);
      }
    }
  }
}

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

template <class T>
ADALAYER_KERNEL ADALAYER_THREADS(T::kThreads) conv_mma(ADALAYER_PARAMS ConvParams p) {
  uint8_t* const shared = shared_memory();
  const int warp = thread_index() / 32;
  const int warp_m = warp % T::kWarpsM, warp_n = warp / T::kWarpsM;
  const auto group = static_cast<int32_t>(block_z());
  const auto tile = static_cast<int32_t>(block_x());
  const int32_t tile_m = tile % p.tiles_m, tile_n = tile / p.tiles_m;
  const auto split = static_cast<int32_t>(block_y());
  int32_t first_step = 0, steps = p.steps;
  if constexpr (T::kForm == Form::Blocks) {
    const int32_t* block = p.block_steps + group * p.tiles_m + tile_m;
    first_step = load_constant(block);
    steps = load_constant(block + 1) - first_step;
  }
  const int32_t begin =
      first_step + static_cast<int32_t>(static_cast<int64_t>(steps) * split / p.splits);
  const int32_t end =
      first_step + static_cast<int32_t>(static_cast<int64_t>(steps) * (split + 1) / p.splits);

  // Weights never change: they are on their way before the kernel in front has ended.
  WeightLoader<T> weights(p, tile_m, group);
  ADALAYER_UNROLL
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (begin + s >= end) break;
    weights.look_up(begin + s);
    weights.load(shared + s * T::kStageBytes, begin + s);
  }
  if (begin + T::kStages - 1 < end) weights.look_up(begin + T::kStages - 1);
  let_next_kernel_start();
  InputLoader<T> input(p, tile_n * T::kN, group);
  if (begin < end) input.look_up(begin);
  wait_for_earlier_kernels();
  ADALAYER_UNROLL
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (begin + s < end) {
      input.load(shared + s * T::kStageBytes);
      if (begin + s + 1 < end) input.look_up(begin + s + 1);
    }
    copy_commit();
  }

  int32_t sums[4][T::kColumns][4] = {};
  // Cells of this warp that hold channels.
  int cells = p.cells - (tile_m * T::kWarpsM + warp_m) * 4;
  cells = cells < 0 ? 0 : cells > 4 ? 4 : cells;
  int slot = 0;
  for (int32_t k = begin; k < end; ++k) {
    copy_wait<T::kStages - 2>();
    sync_threads();  // this stage is there for all, and nobody reads the one before it
    uint32_t stored = 0;
    if constexpr (T::kForm == Form::Blocks) stored = load_constant(p.step_cells + 2 * k + 1);
    const int32_t ahead = k + T::kStages - 1;
    if (ahead < end) {
      uint8_t* stage = shared + (slot + T::kStages - 1) % T::kStages * T::kStageBytes;
      weights.load(stage, ahead);
      input.load(stage);
      if (ahead + 1 < end) {
        weights.look_up(ahead + 1);
        input.look_up(ahead + 1);
      }
    }
    copy_commit();
    const int32_t left = T::kForm == Form::Blocks ? 4 : (p.depth - k * kStepDepth) / 32;
    multiply_stage<T>(shared + slot * T::kStageBytes, warp_m, warp_n, cells, left, stored, sums);
    slot = slot + 1 == T::kStages ? 0 : slot + 1;
  }
  copy_wait<0>();

  if (p.splits > 1) {
    const int32_t number = group * static_cast<int32_t>(grid_x()) + tile;
    if (!collect<T>(p, number, sums, shared)) return;
  }
  const int32_t base = group * p.group_out;
  const int32_t first = (tile_m * T::kWarpsM + warp_m) * kBlockChannels;
  const int32_t position = tile_n * T::kN + warp_n * 8 * T::kColumns;
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

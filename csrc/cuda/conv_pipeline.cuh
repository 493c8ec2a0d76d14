// What the convolutions on tensor cores have in common before they multiply: which part of the
// product a block computes, and its input and packed weights on their way to shared memory, step by
// step of 128 bytes of the reduction.
#pragma once

#include "cuda/kernels.hpp"
#include "cuda/packing.hpp"
#include "cuda/params.hpp"
#include "cuda/simt.cuh"

namespace adalayer::cuda {

/// A tile of the table for weights of some bits in some form. kPiece: bytes of the input that
/// surely lie together (its pitch is a multiple of them).
template <int kBits_, Tile kTile, int kPiece_ = 16, Form kForm_ = Form::Dense>
struct ConvTile {
  static constexpr TileShape kShape = shape_of(kTile);
  static constexpr int kBits = kBits_, kWarpsM = kShape.warps_m, kWarpsN = kShape.warps_n;
  static constexpr int kColumns = kShape.columns, kStages = kShape.stages, kPiece = kPiece_;
  static constexpr Form kForm = kForm_;
  static constexpr int kM = kShape.channels(), kN = kShape.positions();
  static constexpr int kThreads = kShape.threads();
  static constexpr int kInputBytes = kN * kStepDepth;
  static constexpr int kCellBytes = kCellBytesPerBit * kBits;
  // A row of cells in one step.
  static constexpr int kCellStepBytes =
      kForm == Form::Structured ? kCellBytes + kPlacesBytes : 2 * kCellBytes;
  static constexpr int kWeightBytes = kM / kCellChannels * kCellStepBytes;
  static constexpr int kStageBytes = kInputBytes + kWeightBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kAhead = kStages - 1;  // stages on their way beside the one in use
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

  ADALAYER_DEVICE InputLoader(const ConvParams& params, int32_t group)
      : p(params), in(params.in + static_cast<int64_t>(group) * params.group_in_bytes) {}

  /// Finds where the rows of the positions from `first_position` on are.
  ADALAYER_DEVICE void find_rows(int32_t first_position) {
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

/// The part of a product that a block computes.
template <class T>
struct Part {
  int32_t group, tile, tile_m, tile_n;
  int32_t begin, end;  // steps of the reduction

  ADALAYER_DEVICE explicit Part(const ConvParams& p)
      : group(static_cast<int32_t>(block_z())),
        tile(static_cast<int32_t>(block_x())),
        tile_m(tile % p.tiles_m),
        tile_n(tile / p.tiles_m) {
    int32_t first = 0, steps = p.steps;
    if constexpr (T::kForm == Form::Blocks) {
      const int32_t* block = p.block_steps + group * p.tiles_m + tile_m;
      first = load_constant(block);
      steps = load_constant(block + 1) - first;
    }
    const auto split = static_cast<int64_t>(block_y());
    begin = first + static_cast<int32_t>(steps * split / p.splits);
    end = first + static_cast<int32_t>(steps * (split + 1) / p.splits);
  }

  /// Of four cells of 16 channels from `first_cell` of the tile on, those that hold channels.
  ADALAYER_DEVICE int cells(const ConvParams& p, int first_cell) const {
    const int left = p.cells - tile_m * (T::kM / kCellChannels) - first_cell;
    return left < 0 ? 0 : left > 4 ? 4 : left;
  }
};

/// The steps of a part, T::kAhead of them on their way to shared memory while one is multiplied.
template <class T>
struct Pipeline {
  uint8_t* const shared;
  const int32_t begin, end;
  WeightLoader<T> weights;
  InputLoader<T> input;
  int slot = 0;

  /// Starts the first stages. Weights never change: they are on their way before the kernel in
  /// front has ended.
  ADALAYER_DEVICE Pipeline(const ConvParams& p, const Part<T>& part, uint8_t* memory)
      : shared(memory),
        begin(part.begin),
        end(part.end),
        weights(p, part.tile_m, part.group),
        input(p, part.group) {
    ADALAYER_UNROLL
    for (int s = 0; s < T::kAhead; ++s) {
      if (begin + s >= end) break;
      weights.look_up(begin + s);
      weights.load(shared + s * T::kStageBytes, begin + s);
    }
    if (begin + T::kAhead < end) weights.look_up(begin + T::kAhead);
    let_next_kernel_start();
    input.find_rows(part.tile_n * T::kN);
    if (begin < end) input.look_up(begin);
    wait_for_earlier_kernels();
    ADALAYER_UNROLL
    for (int s = 0; s < T::kAhead; ++s) {
      if (begin + s < end) {
        input.load(shared + s * T::kStageBytes);
        if (begin + s + 1 < end) input.look_up(begin + s + 1);
      }
      copy_commit();
    }
  }

  /// The stage of step `k`, to be called for each step in turn. Its copies have arrived when
  /// copy_wait<T::kAhead - 1> returns in every thread; then nobody may use the stage any more that
  /// is T::kStages - T::kAhead steps back: it is filled again here.
  ADALAYER_DEVICE const uint8_t* next(int32_t k) {
    const int32_t ahead = k + T::kAhead;
    if (ahead < end) {
      uint8_t* stage = shared + (slot + T::kAhead) % T::kStages * T::kStageBytes;
      weights.load(stage, ahead);
      input.load(stage);
      if (ahead + 1 < end) {
        weights.look_up(ahead + 1);
        input.look_up(ahead + 1);
      }
    }
    copy_commit();
    const uint8_t* stage = shared + slot * T::kStageBytes;
    slot = slot + 1 == T::kStages ? 0 : slot + 1;
    return stage;
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

}  // namespace adalayer::cuda

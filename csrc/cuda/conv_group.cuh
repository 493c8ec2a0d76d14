// The product of conv_mma.cuh with instructions of four warps (compute capability 9.0a): a group of
// warps multiplies 64 channels with all positions of the block at once. Weights become bytes in
// registers, as there; activations are read from the stages by the tensor cores themselves, which
// know their order in memory (chunk_offset()), while the weights of the next step are unpacked.
//
// Stages are filled by the threads and not by the copy unit: what lies outside of an image must
// become the input's zero point there, and that unit can only write zeros.
#pragma once

#include "cuda/conv_store.cuh"

namespace adalayer::cuda {

/// A group of four warps has 64 channels x all positions.
template <int kBits, Tile kTile>
struct GroupTile : ConvTile<kBits, kTile> {
  using Base = ConvTile<kBits, kTile>;
  // The tensor cores may still read the stage before the one that is multiplied now.
  static constexpr int kAhead = Base::kStages - 2;
  static constexpr int kPositions = Base::kN;
  static constexpr int kBlocks = Base::kShape.blocks;  // that registers are to suffice for
  // One warp's sums: 16 channels x all positions.
  static constexpr int kWarpSums = kPositions / 2;
  static_assert(GroupTile::kStageBytes % 1024 == 0);  // the order of chunks counts from there
  static_assert(GroupTile::kSums * 4 <= GroupTile::kSharedBytes);
};

/// All weights of a step for this warp's cell.
template <class T>
ADALAYER_DEVICE void load_cell(const uint8_t* stage, int cell, uint32_t (&left)[4][4]) {
  const uint8_t* from = stage + T::kInputBytes + cell * T::kCellStepBytes;
  ADALAYER_UNROLL
  for (int half = 0; half < 4; ++half)
    load_weights<T::kBits>(from + half / 2 * T::kCellBytes, half % 2, left[half]);
}

/// One step. Its products are under way at the end, those of the step before it are done.
template <class T>
ADALAYER_DEVICE void group_step(Pipeline<T>& pipeline, int32_t k, int cell, uint32_t (&left)[4][4],
                                int32_t (&sums)[T::kWarpSums]) {
  copy_wait<T::kAhead - 1>();
  show_to_tensor_cores();
  sync_threads();  // this stage is there for all, and nobody reads the one two steps before it
  const uint8_t* stage = pipeline.next(k);
  load_cell<T>(stage, cell, left);
  start_group_products();
  ADALAYER_UNROLL
  for (int half = 0; half < 4; ++half)
    multiply_group<T::kPositions>(sums, left[half], stage + half * 32);
  commit_group_products();
  wait_group_products<1>();
}

/// From one cell and all positions to all four cells of the group's channels and a quarter of the
/// positions: what conv_mma has, and stores eight neighbouring channels at once from.
template <class T>
ADALAYER_DEVICE void redistribute(const int32_t (&sums)[T::kWarpSums], uint8_t* shared, int group,
                                  int warp, int32_t (&mine)[4][T::kColumns][4]) {
  const int lane = thread_index() % 32;
  auto* room = reinterpret_cast<Words4*>(shared) + group * (T::kPositions / 8 * 4 * 32);
  ADALAYER_UNROLL
  for (int j = 0; j < T::kPositions / 8; ++j)
    room[(j * 4 + warp) * 32 + lane] = {
        static_cast<uint32_t>(sums[4 * j]), static_cast<uint32_t>(sums[4 * j + 1]),
        static_cast<uint32_t>(sums[4 * j + 2]), static_cast<uint32_t>(sums[4 * j + 3])};
  sync_threads();
  ADALAYER_UNROLL
  for (int j = 0; j < T::kColumns; ++j)
    ADALAYER_UNROLL
  for (int cell = 0; cell < 4; ++cell) {
    const Words4 v = room[((warp * T::kColumns + j) * 4 + cell) * 32 + lane];
    mine[cell][j][0] = static_cast<int32_t>(v.x);
    mine[cell][j][1] = static_cast<int32_t>(v.y);
    mine[cell][j][2] = static_cast<int32_t>(v.z);
    mine[cell][j][3] = static_cast<int32_t>(v.w);
  }
}

template <class T>
ADALAYER_KERNEL ADALAYER_THREADS(T::kThreads, T::kBlocks) conv_group(ADALAYER_PARAMS ConvParams p) {
  if constexpr (!kHasGroupProducts) return;
  uint8_t* const shared = shared_memory();
  const int group = thread_index() / 128, warp = thread_index() / 32 % 4;
  const Part<T> part(p);
  const int cells = part.cells(p, group * 4);
  Pipeline<T> pipeline(p, part, shared);
  int32_t sums[T::kWarpSums] = {};
  // Two sets of weights in turn: the products of one step still read theirs.
  uint32_t even[4][4], odd[4][4];
  int32_t k = part.begin;
  for (; k + 1 < part.end; k += 2) {  // (no way around the second: the compiler would see a race)
    group_step<T>(pipeline, k, group * 4 + warp, even, sums);
    group_step<T>(pipeline, k + 1, group * 4 + warp, odd, sums);
  }
  if (k < part.end) group_step<T>(pipeline, k, group * 4 + warp, even, sums);
  finish_group_products(sums);
  copy_wait<0>();
  sync_threads();  // nobody reads the stages any more
  int32_t mine[4][T::kColumns][4];
  redistribute<T>(sums, shared, group, warp, mine);
  store_part<T>(p, part, cells, group, warp, mine, shared);
}

}  // namespace adalayer::cuda

// Convolution as an implicit product on tensor cores, weights on the left: output channels are the
// rows and positions the columns. A block multiplies kM channels with kN positions, step by step of
// 128 bytes of the reduction; activations and packed weights wait in shared memory, kStages deep,
// and weights become bytes in registers.
#pragma once

#include "cuda/conv_store.cuh"

namespace adalayer::cuda {

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

template <class T>
ADALAYER_KERNEL ADALAYER_THREADS(T::kThreads) conv_mma(ADALAYER_PARAMS ConvParams p) {
  uint8_t* const shared = shared_memory();
  const int warp = thread_index() / 32;
  const int warp_m = warp % T::kWarpsM, warp_n = warp / T::kWarpsM;
  const Part<T> part(p);
  const int cells = part.cells(p, warp_m * 4);
  Pipeline<T> pipeline(p, part, shared);
  int32_t sums[4][T::kColumns][4] = {};
  for (int32_t k = part.begin; k < part.end; ++k) {
    copy_wait<T::kAhead - 1>();
    sync_threads();  // this stage is there for all, and nobody reads the one before it
    uint32_t stored = 0;
    if constexpr (T::kForm == Form::Blocks) stored = load_constant(p.step_cells + 2 * k + 1);
    const uint8_t* stage = pipeline.next(k);
    const int32_t left = T::kForm == Form::Blocks ? 4 : (p.depth - k * kStepDepth) / 32;
    multiply_stage<T>(stage, warp_m, warp_n, cells, left, stored, sums);
  }
  copy_wait<0>();
  store_part<T>(p, part, cells, warp_m, warp_n, sums, shared);
}

}  // namespace adalayer::cuda

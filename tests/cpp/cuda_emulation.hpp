// A GPU in software: all names of csrc/cuda/simt.cuh for an ordinary C++ compiler. A file that
// includes this first can include CUDA kernels and run their launches.
//
// The threads of a block are fibers. Barriers, matrix products and shuffles wait for whom the
// hardware waits for; between them fibers run in a random order, and asynchronous copies arrive at
// the last moment that the waits allow, so that a missing barrier or wait gives wrong results. A
// barrier that not all reach, a misaligned access of a copy or matrix load and one outside of the
// block's shared memory throw. What it cannot show is the hardware's own behaviour.
#pragma once

#define ADALAYER_CUDA_EMULATION 1
#define ADALAYER_DEVICE inline
#define ADALAYER_HD inline
#define ADALAYER_KERNEL inline void
#define ADALAYER_PARAMS const
#define ADALAYER_THREADS(...)
#define ADALAYER_UNROLL
#define ADALAYER_KERNEL_ADDRESS(kernel, Params) \
  reinterpret_cast<const void*>(&emulation::invoke<Params, &kernel>)

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace adalayer::cuda::emulation {

/// Calls a kernel with parameters that lie anywhere.
template <class Params, void (*kKernel)(Params)>
void invoke(const void* params) {
  Params copy;
  std::memcpy(static_cast<void*>(&copy), params, sizeof copy);
  kKernel(copy);
}

// ---- the running thread ---------------------------------------------------------------------

int thread();
int threads();
uint32_t block(int axis);
uint32_t grid(int axis);
uint8_t* shared();
void barrier();
/// What all lanes of the warp hand in, one after another, `bytes` each; waits for them.
const uint8_t* exchange(const void* mine, size_t bytes);
void start_copy(void* to, const void* from, int bytes);
void commit_copies();
void finish_copies(int newest_groups_left);
/// This thread's finished copies may be read by products of four warps.
void show_copies();
/// A product of four warps, done when finish_products allows: sums [columns / 2], a [4] and b may
/// be read and written until then.
void start_product(int columns, int32_t* sums, const uint32_t* a, const uint8_t* b);
void commit_products();
void finish_products(int newest_groups_left);
/// Throws unless [p, p + bytes) is aligned and in the block's shared memory.
void check_shared(const void* p, int bytes);

// ---- launches (host side) -------------------------------------------------------------------

/// Runs all blocks of a launch, in a random order.
void run(const void* function, const uint32_t grid[3], int threads, int shared_bytes,
         const void* params);
/// The order of everything from here on.
void seed(uint64_t value);

float half_to_float(uint16_t v);
uint16_t float_to_half(float v);

}  // namespace adalayer::cuda::emulation

namespace adalayer::cuda {

inline int thread_index() { return emulation::thread(); }
inline int block_threads() { return emulation::threads(); }
inline uint32_t block_x() { return emulation::block(0); }
inline uint32_t block_y() { return emulation::block(1); }
inline uint32_t block_z() { return emulation::block(2); }
inline uint32_t grid_x() { return emulation::grid(0); }
inline uint8_t* shared_memory() { return emulation::shared(); }
inline void sync_threads() { emulation::barrier(); }
inline void thread_fence() {}
inline void wait_for_earlier_kernels() {}
inline void let_next_kernel_start() {}

template <int kBytes>
void copy_async(void* to, const void* from) {
  emulation::start_copy(to, from, kBytes);
}
inline void copy_commit() { emulation::commit_copies(); }
template <int kGroups>
void copy_wait() {
  emulation::finish_copies(kGroups);
}

struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
template <class T>
T load_constant(const T* p) {
  return *p;
}
inline int32_t load_shared_by_blocks(const int32_t* p) { return *p; }
inline Words4 load_streamed(const Words4* p) { return *p; }
inline int32_t atomic_add(int32_t* p, int32_t v) {
  const int32_t before = *p;
  *p = before + v;
  return before;
}

template <class T>
T shuffle_xor(T v, int lanes) {
  const uint8_t* all = emulation::exchange(&v, sizeof v);
  T other;
  std::memcpy(&other, all + static_cast<size_t>((thread_index() % 32) ^ lanes) * sizeof v,
              sizeof v);
  return other;
}

inline void load_matrices(const void* row, uint32_t out[4]) {
  emulation::check_shared(row, 16);
  const uint8_t* all = emulation::exchange(&row, sizeof row);
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const uint8_t* from;
    std::memcpy(&from, all + static_cast<size_t>(i * 8 + lane / 4) * sizeof from, sizeof from);
    std::memcpy(&out[i], from + 4 * (lane % 4), 4);
  }
}

namespace emulation {
/// Both operands of a product as every lane holds them.
struct Operands {
  uint32_t a[4], b[2];
};
}  // namespace emulation

inline void multiply_s8_u8(int32_t c[4], const uint32_t a[4], const uint32_t b[2]) {
  const emulation::Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* all =
      reinterpret_cast<const emulation::Operands*>(emulation::exchange(&mine, sizeof mine));
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  for (int r = 0; r < 4; ++r) {
    const int row_half = r / 2, column = 2 * t + r % 2;
    auto sum = static_cast<uint32_t>(c[r]);
    for (int quad = 0; quad < 4; ++quad)
      for (int k16 = 0; k16 < 2; ++k16)
        for (int i = 0; i < 4; ++i) {
          const uint32_t left = all[g * 4 + quad].a[k16 * 2 + row_half] >> (8 * i);
          const uint32_t right = all[column * 4 + quad].b[k16] >> (8 * i);
          sum +=
              static_cast<uint32_t>(static_cast<int8_t>(left) * static_cast<int32_t>(right & 0xFF));
        }
    c[r] = static_cast<int32_t>(sum);
  }
}

namespace emulation {
struct StructuredOperands {
  uint32_t a[4], b[4], which;
};
/// Throws: the places of two of four values are not in order.
[[noreturn]] void disordered();
}  // namespace emulation

inline void multiply_structured(int32_t c[4], const uint32_t a[4], const uint32_t b[4],
                                uint32_t which) {
  const emulation::StructuredOperands mine{
      {a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, which};
  const auto* all = reinterpret_cast<const emulation::StructuredOperands*>(
      emulation::exchange(&mine, sizeof mine));
  const int lane = thread_index() % 32;
  for (int r = 0; r < 4; ++r) {
    const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
    auto sum = static_cast<uint32_t>(c[r]);
    for (int four = 0; four < 16; ++four) {  // columns 4 * four .. 4 * four + 3 of a
      const uint32_t places =
          all[row % 8 * 4 + row / 8 + four / 8 * 2].which >> (four % 8 * 4) & 15;
      if ((places & 3) >= places >> 2) emulation::disordered();
      for (int i = 0; i < 2; ++i) {
        const int given = 2 * four + i, k = 4 * four + static_cast<int>(places >> (2 * i) & 3);
        const auto& left = all[row % 8 * 4 + given % 16 / 4];
        const auto& right = all[column * 4 + k % 16 / 4];
        const uint32_t w = left.a[given / 16 * 2 + row / 8] >> (given % 4 * 8);
        const uint32_t x = right.b[k / 16] >> (k % 4 * 8);
        sum += static_cast<uint32_t>(static_cast<int8_t>(w) * static_cast<int32_t>(x & 0xFF));
      }
    }
    c[r] = static_cast<int32_t>(sum);
  }
}

constexpr bool kHasGroupProducts = true;
inline void show_to_tensor_cores() { emulation::show_copies(); }
inline void start_group_products() {}
inline void commit_group_products() { emulation::commit_products(); }
template <int kGroups>
void wait_group_products() {
  emulation::finish_products(kGroups);
}
template <int kSums>
void finish_group_products(int32_t (&)[kSums]) {
  emulation::finish_products(0);
}
template <int kColumns>
void multiply_group(int32_t (&d)[kColumns / 2], const uint32_t (&a)[4], const uint8_t* b) {
  emulation::start_product(kColumns, d, a, b);
}

template <bool kBfloat>
void multiply_half(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  const emulation::Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* all =
      reinterpret_cast<const emulation::Operands*>(emulation::exchange(&mine, sizeof mine));
  const auto number = [](uint32_t word, int i) {
    const auto v = static_cast<uint16_t>(word >> (16 * i));
    return kBfloat ? std::bit_cast<float>(uint32_t{v} << 16) : emulation::half_to_float(v);
  };
  const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  for (int r = 0; r < 4; ++r) {
    const int row_half = r / 2, column = 2 * t + r % 2;
    double sum = static_cast<double>(c[r]);
    for (int quad = 0; quad < 4; ++quad)
      for (int k8 = 0; k8 < 2; ++k8)
        for (int i = 0; i < 2; ++i)
          sum += static_cast<double>(number(all[g * 4 + quad].a[k8 * 2 + row_half], i)) *
                 static_cast<double>(number(all[column * 4 + quad].b[k8], i));
    c[r] = static_cast<float>(sum);
  }
}

inline float fma_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float div_rn(float a, float b) { return a / b; }
inline double mul_rn(double a, double b) { return a * b; }
inline double add_rn(double a, double b) { return a + b; }
inline double sub_rn(double a, double b) { return a - b; }
inline double div_rn(double a, double b) { return a / b; }
inline double sqrt_rn(double a) { return std::sqrt(a); }
inline float to_float_rn(double a) { return static_cast<float>(a); }
inline double to_double_rn(int64_t a) { return static_cast<double>(a); }
inline float to_float_rn(int32_t a) { return static_cast<float>(a); }
inline int32_t round_even(float a) { return static_cast<int32_t>(std::nearbyintf(a)); }
inline float round_even_float(float a) { return std::nearbyintf(a); }
inline float max_number(float a, float b) { return std::fmax(a, b); }
inline float min_number(float a, float b) { return std::fmin(a, b); }
inline float bits_to_float(uint32_t v) { return std::bit_cast<float>(v); }
inline uint32_t float_bits(float v) { return std::bit_cast<uint32_t>(v); }
inline uint16_t to_half_rn(float v) { return emulation::float_to_half(v); }
inline uint16_t to_bfloat_rn(float v) {
  const auto bits = std::bit_cast<uint32_t>(v);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint32_t sub_half_pairs(uint32_t a, uint32_t b) {
  uint32_t c = 0;
  for (int s = 0; s < 32; s += 16)
    c |= static_cast<uint32_t>(to_half_rn(emulation::half_to_float(static_cast<uint16_t>(a >> s)) -
                                          emulation::half_to_float(static_cast<uint16_t>(b >> s))))
         << s;
  return c;
}
inline uint32_t sub_bfloat_pairs(uint32_t a, uint32_t b) {
  uint32_t c = 0;
  for (int s = 0; s < 32; s += 16)
    c |= static_cast<uint32_t>(
             to_bfloat_rn(std::bit_cast<float>(a >> s << 16) - std::bit_cast<float>(b >> s << 16)))
         << s;
  return c;
}
inline uint32_t max_bytes(uint32_t a, uint32_t b) {
  uint32_t most = 0;
  for (int s = 0; s < 32; s += 8)
    most |= std::max((a >> s) & 0xFF, (b >> s) & 0xFF) << s;
  return most;
}

inline int count_bits(uint32_t v) { return std::popcount(v); }

}  // namespace adalayer::cuda

// What kernels use of the machine: thread numbers, barriers, asynchronous copies, tensor cores, and
// float operations with a stated rounding.
//
// Kernels are written against these names alone. The tests compile the same kernels as ordinary C++
// over a machine in software (tests/cpp/cuda_emulation.hpp defines all names of this file), so that
// everything but the instructions themselves is checked without a GPU.
#pragma once

#if !defined(ADALAYER_CUDA_EMULATION)

#include <cstdint>

#define ADALAYER_DEVICE __device__ __forceinline__
#define ADALAYER_HD __host__ __device__ __forceinline__
#define ADALAYER_KERNEL __global__ void
#define ADALAYER_PARAMS const __grid_constant__
#define ADALAYER_THREADS(...) __launch_bounds__(__VA_ARGS__)
#define ADALAYER_UNROLL _Pragma("unroll")
#define ADALAYER_KERNEL_ADDRESS(kernel, Params) reinterpret_cast<const void*>(&kernel)

namespace adalayer::cuda {

// ---- where a thread is ----------------------------------------------------------------------

ADALAYER_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ADALAYER_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
ADALAYER_DEVICE uint32_t block_x() { return blockIdx.x; }
ADALAYER_DEVICE uint32_t block_y() { return blockIdx.y; }
ADALAYER_DEVICE uint32_t block_z() { return blockIdx.z; }
ADALAYER_DEVICE uint32_t grid_x() { return gridDim.x; }

/// The block's dynamic shared memory.
ADALAYER_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t adalayer_shared[];
  return adalayer_shared;
}

// ---- order ----------------------------------------------------------------------------------

ADALAYER_DEVICE void sync_threads() { __syncthreads(); }
ADALAYER_DEVICE void thread_fence() { __threadfence(); }

/// A kernel may start before the one in front of it has ended. Until this returns it must not touch
/// what other kernels of the stream write or read; every kernel calls it.
ADALAYER_DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// From here on the next kernel may take what room this one leaves.
ADALAYER_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- memory ---------------------------------------------------------------------------------

/// Copies kBytes (4, 8 or 16) from global to shared memory; done after copy_wait.
template <int kBytes>
ADALAYER_DEVICE void copy_async(void* to_shared, const void* from) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes)
                 : "memory");
}
ADALAYER_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most kGroups of this thread's newest groups are under way.
template <int kGroups>
ADALAYER_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

/// Data that no running kernel writes.
template <class T>
ADALAYER_DEVICE T load_constant(const T* p) {
  return __ldg(p);
}
template <>
ADALAYER_DEVICE Words2 load_constant<Words2>(const Words2* p) {
  const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
  return {v.x, v.y};
}
template <>
ADALAYER_DEVICE Words4 load_constant<Words4>(const Words4* p) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
}
/// Data that other blocks have written: not from the first-level cache.
ADALAYER_DEVICE int32_t load_shared_by_blocks(const int32_t* p) { return __ldcg(p); }
/// Weights that are read once: they leave the cache to others.
ADALAYER_DEVICE Words4 load_streamed(const Words4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return {v.x, v.y, v.z, v.w};
}

ADALAYER_DEVICE int32_t atomic_add(int32_t* p, int32_t v) { return atomicAdd(p, v); }

// ---- warps ----------------------------------------------------------------------------------

template <class T>
ADALAYER_DEVICE T shuffle_xor(T v, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
}

/// Four 8 x 16-byte matrices. Lane l names row l % 8 of matrix l / 8; of matrix i it receives bytes
/// 4 * (l % 4) to 4 * (l % 4) + 3 of row l / 4 in out[i].
ADALAYER_DEVICE void load_matrices(const void* row_in_shared, uint32_t out[4]) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row_in_shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

/// c[16 x 8] += a[16 x 32] * b[32 x 8], a signed and b unsigned bytes. With g = lane / 4 and
/// t = lane % 4: a[0] holds row g, columns 4t .. 4t+3; a[1] row g + 8; a[2] and a[3] the same rows,
/// columns 16 later. b[0] holds rows 4t .. 4t+3 of column g, b[1] those 16 later. c[0] and c[1] are
/// row g, columns 2t and 2t + 1; c[2] and c[3] row g + 8.
ADALAYER_DEVICE void multiply_s8_u8(int32_t c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// c[16 x 8] += a[16 x 64] * b[64 x 8], a signed and b unsigned bytes; of four neighbouring values
/// of a row of `a` two are given, the others are zeros. a[r] holds what a[r] of multiply_s8_u8
/// holds, of the 16 x 32 values given; b[i] rows 16i + 4t .. 16i + 4t + 3 of column g. `which`: of
/// row g + 8 * (t % 2), columns 32 * (t / 2) and on; four bits for four columns, the places of the
/// first (lower bits) and the second value, which are in order.
ADALAYER_DEVICE void multiply_structured(int32_t c[4], const uint32_t a[4], const uint32_t b[4],
                                         uint32_t which) {
// (The promise of order is of CUDA 12.5; without it the same instruction may be slower.)
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define ADALAYER_MMA_SPARSE "mma.sp::ordered_metadata"
#else
#define ADALAYER_MMA_SPARSE "mma.sp"
#endif
  asm(ADALAYER_MMA_SPARSE
      ".sync.aligned.m16n8k64.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(which));
#undef ADALAYER_MMA_SPARSE
}

// Products of four warps whose numbers are 4i to 4i + 3, asynchronous: they read their operands and
// write their sums at any time until wait_group_products says that they are done. Compute
// capability 9.0a alone has them; a kernel that is compiled for another one does nothing instead.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasGroupProducts = false;
#else
constexpr bool kHasGroupProducts = true;
#endif

/// What this thread's finished asynchronous copies have brought may be read by such products, of
/// any thread behind a barrier.
ADALAYER_DEVICE void show_to_tensor_cores() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
/// Registers of products that follow have been written.
ADALAYER_DEVICE void start_group_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
ADALAYER_DEVICE void commit_group_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/// Waits until at most kGroups of the newest commits are under way.
template <int kGroups>
ADALAYER_DEVICE void wait_group_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}
/// Waits until the sums are there.
template <int kSums>
ADALAYER_DEVICE void finish_group_products(int32_t (&d)[kSums]) {
  wait_group_products<0>();
  ADALAYER_UNROLL
  for (int i = 0; i < kSums; ++i)
    asm volatile("" : "+r"(d[i])::"memory");  // nothing reads them before
}

#define ADALAYER_NAMES10(t)                                                                        \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
#define ADALAYER_NAMES60                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " ADALAYER_NAMES10(1) ADALAYER_NAMES10(2) \
      ADALAYER_NAMES10(3) ADALAYER_NAMES10(4) ADALAYER_NAMES10(5)
#define ADALAYER_SUMS4(i) "+r"(d[i]), "+r"(d[(i) + 1]), "+r"(d[(i) + 2]), "+r"(d[(i) + 3])
#define ADALAYER_SUMS16(i) \
  ADALAYER_SUMS4(i), ADALAYER_SUMS4((i) + 4), ADALAYER_SUMS4((i) + 8), ADALAYER_SUMS4((i) + 12)
#define ADALAYER_SUMS64(i)                                                  \
  ADALAYER_SUMS16(i), ADALAYER_SUMS16((i) + 16), ADALAYER_SUMS16((i) + 32), \
      ADALAYER_SUMS16((i) + 48)

/// d[64 x kColumns] += a[64 x 32] * b[32 x kColumns], a signed and b unsigned bytes. Warp w of the
/// four holds rows 16w .. 16w + 15 of `a`, as in multiply_s8_u8, and the same rows of `d`: c of
/// multiply_s8_u8 for columns 8j .. 8j + 7 is d[4j] .. d[4j + 3]. `b` lies in shared memory, a
/// column in each row of 128 bytes: its 32 values begin at `b`, 0, 32, 64 or 96 bytes behind a
/// multiple of 1024, and chunks of 16 bytes are rotated within the row by the row's number modulo 8
/// (bits 7 to 9 of an address are added to bits 4 to 6 without carry).
template <int kColumns>
ADALAYER_DEVICE void multiply_group(int32_t (&d)[kColumns / 2], const uint32_t (&a)[4],
                                    const uint8_t* b) {
  static_assert(kColumns == 128 || kColumns == 256);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // In units of 16 bytes: where it begins; from eight rows to the next eight (1024 bytes); that
  // rows are 128 bytes, rotated.
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(b));
  const uint64_t where = uint64_t{(address & 0x3FFFFu) >> 4} | uint64_t{1} << 16 |
                         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  if constexpr (kColumns == 256)
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.u8 {" ADALAYER_NAMES60
        ADALAYER_NAMES10(6) ADALAYER_NAMES10(7) ADALAYER_NAMES10(8) ADALAYER_NAMES10(9)
        ADALAYER_NAMES10(10) ADALAYER_NAMES10(11)
        "%120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132, add;\n}"
        : ADALAYER_SUMS64(0), ADALAYER_SUMS64(64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(where), "r"(1));
  else
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.u8 {" ADALAYER_NAMES60
        "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, add;\n}"
        : ADALAYER_SUMS64(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(where), "r"(1));
#endif
}
#undef ADALAYER_NAMES10
#undef ADALAYER_NAMES60
#undef ADALAYER_SUMS4
#undef ADALAYER_SUMS16
#undef ADALAYER_SUMS64

/// c[16 x 8] += a[16 x 16] * b[16 x 8] of half or bfloat16 pairs, sums in float. a[0] holds row g,
/// columns 2t and 2t + 1; a[1] row g + 8; a[2], a[3] columns 8 later; b[0] rows 2t, 2t + 1 of
/// column g, b[1] 8 later; c as above.
template <bool kBfloat>
ADALAYER_DEVICE void multiply_half(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  if constexpr (kBfloat)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- arithmetic with a stated rounding --------------------------------------------------------

ADALAYER_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ADALAYER_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
ADALAYER_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
ADALAYER_DEVICE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
ADALAYER_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
ADALAYER_DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
ADALAYER_DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
ADALAYER_DEVICE double sub_rn(double a, double b) { return __dsub_rn(a, b); }
ADALAYER_DEVICE double div_rn(double a, double b) { return __ddiv_rn(a, b); }
ADALAYER_DEVICE double sqrt_rn(double a) { return __dsqrt_rn(a); }
ADALAYER_DEVICE float to_float_rn(double a) { return __double2float_rn(a); }
ADALAYER_DEVICE double to_double_rn(int64_t a) { return __ll2double_rn(a); }
ADALAYER_DEVICE float to_float_rn(int32_t a) { return __int2float_rn(a); }
/// Nearest even; the caller has clamped.
ADALAYER_DEVICE int32_t round_even(float a) { return __float2int_rn(a); }
/// Nearest whole number, ties to even, as a float.
ADALAYER_DEVICE float round_even_float(float a) { return rintf(a); }
/// A NaN in one operand yields the other.
ADALAYER_DEVICE float max_number(float a, float b) { return fmaxf(a, b); }
ADALAYER_DEVICE float min_number(float a, float b) { return fminf(a, b); }
ADALAYER_DEVICE float bits_to_float(uint32_t v) { return __uint_as_float(v); }
ADALAYER_DEVICE uint32_t float_bits(float v) { return __float_as_uint(v); }
/// a - b of two numbers at once.
ADALAYER_DEVICE uint32_t sub_half_pairs(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
ADALAYER_DEVICE uint32_t sub_bfloat_pairs(uint32_t a, uint32_t b) {
  // (sub.bf16x2 is of sm_90; a fused multiply-add with 1 is everywhere.)
  uint32_t c;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(0x3F803F80u), "r"(b ^ 0x80008000u));
  return c;
}
ADALAYER_DEVICE uint16_t to_half_rn(float v) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
ADALAYER_DEVICE uint16_t to_bfloat_rn(float v) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
ADALAYER_DEVICE uint32_t max_bytes(uint32_t a, uint32_t b) { return __vmaxu4(a, b); }
ADALAYER_DEVICE int count_bits(uint32_t v) { return __popc(v); }

}  // namespace adalayer::cuda

#endif

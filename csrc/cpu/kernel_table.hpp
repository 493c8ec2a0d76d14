// One row per instruction set: the primitive kernels that the convolution driver is made of.
//
// A new instruction set is one file that fills a row, plus one line in kernel_table.cpp. A row has
// everything that drivers may ask of it, down to the last image kernel, or it is no row; what it
// may leave out says so. Tests run every row that the machine supports against csrc/reference,
// because the row exists.
#pragma once

#include <cstdint>
#include <span>

#include "core/cpu_features.hpp"
#include "cpu/conv_epilogue.hpp"
#include "cpu/grouped_kernels.hpp"
#include "cpu/image_kernels.hpp"
#include "cpu/winograd_kernels.hpp"
#include "formats/panels.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

// Register block of every matmul kernel: 32 output positions by 32 output channels (AMX: 2 x 2
// tiles of 16 x 16 int32, which leaves 2 + 2 of the 8 tiles for the operands).
constexpr int kBlockRows = 32;
constexpr int kBlockCols = 32;

/// What the output positions of a product are.
enum class Positions {
  Listed,     // the outputs; each has its own place in memory: gemm
  Flattened,  // a constant stride apart, as the tile unit loads them: those between two output rows
              // are computed and dropped: block
};

/// Most rows of one gemm call.
constexpr int kGemmRows = 224;

/// sums[r][c] = sum over steps of a * b, for rows of packed activations and two column tiles. A row
/// lies anywhere, so that only positions that are wanted are multiplied; kernels read the live
/// quads of the rows that there are and nothing else.
struct GemmArgs {
  const uint8_t* activations;   // step offset 0
  const int32_t* row_offsets;   // [rows] bytes from `activations`
  const int64_t* step_offsets;  // [steps] byte offset of each step from the row's start
  const uint8_t* live_quads;    // [steps] groups of 4 bytes worth multiplying
  int64_t steps;
  const int8_t* tile0;   // [steps][1024] unpacked weight tiles of column tile 0
  const int8_t* tile1;   // the same for column tile 1, or null
  int weight_bits;       // product_bits(): without VNNI, the fewer the more pairs int16 holds
  bool arranged;         // the tiles are as the row's TileArrangement made them, for these levels
  int rows;              // 1..kGemmRows
  const uint8_t* fetch;  // weights to fetch into the second-level cache meanwhile:
  int64_t fetch_row;     // bytes from one row's share to the next one's
  int fetch_lines;       // of 64 bytes with every step of a pass
  int32_t* sums;         // [rows][32]
};

/// Most activation rows that `gemv` takes.
constexpr int kGemvRows = 4;

/// sums[r][c] = sum over steps of a * b for few rows and many columns: weights that are used once
/// are read packed, and each goes from memory through registers into its sum. All 64 bytes of each
/// step must be readable.
struct GemvArgs {
  const uint8_t* activations[kGemvRows];  // each row's step offset 0
  const int64_t* step_offsets;            // [steps]
  int64_t steps;
  const uint8_t* packed;  // [column_tiles][steps] packed tiles of 128 * bits bytes
  int bits;               // of the packed tiles
  int rows;               // 1..kGemvRows
  int64_t column_tiles;
  int32_t* sums;        // [rows][sums_stride]
  int64_t sums_stride;  // elements between rows, at least column_tiles * 16
};

/// Writes rows of sums to the output tensor. Row r is output position `position[r]` of the image
/// (y * out_w + x), or padding to drop where it is negative.
struct StoreArgs {
  const int32_t* sums;  // [rows][sums_stride]
  int64_t sums_stride;
  const int32_t* position;  // [rows]; where not negative, ascending by 1 (padding lies between)
  int rows;
  int cols;                   // valid output channels in the block
  const int32_t* correction;  // [cols] zero-point correction to add
  int64_t channel;            // first output channel of the block
  const OutputSpec* out;
  int64_t first;            // element of (position 0, first channel) in the output
  int64_t position_stride;  // elements: channels for NHWC, 1 for NCHW
  int64_t channel_stride;   // elements: 1 for NHWC, out_h * out_w for NCHW
};

/// The tile unit's matmul block: up to 64 positions x one column tile, or 32 x two, straight from
/// packed weights. Reads activations of all positions up to a multiple of 16, whatever `rows` says.
struct BlockArgs {
  const uint8_t* activations;
  int64_t row_stride;
  const int64_t* step_offsets;
  int64_t steps;
  const uint8_t* packed[2];  // tiles of each column: [steps][128 * bits]; the second may be null
  int bits;
  int8_t* unpacked[2];      // [steps][1024] of each column; not used at 8 bits
  bool unpack;              // `unpacked` is still to be filled (by this call), else it is ready
  int rows;                 // 1..64 with one column tile, 1..32 with two
  int32_t* sums;            // [rows][16] or [rows][32]
  const uint8_t* prefetch;  // weights to fetch into the second-level cache meanwhile
  int64_t prefetch_bytes;
};

/// Sums to u8 levels in the output image. Rows whose out_offset is negative are dropped.
struct RequantizeArgs {
  const int32_t* sums;  // [rows][16 * tiles]
  int tiles;            // 1 or 2
  int rows;
  int cols;  // channels to write; whole tiles if `whole`, whose surplus lies within the pixel
  bool whole;
  const int32_t* out_offset;  // [rows]
  uint8_t* out;               // image, at the block's first channel
  const int32_t* residual_offset;
  const uint8_t* residual;  // as out, or null
  const ConvEpilogue* epilogue;
  int64_t channel;  // of the epilogue's arrays
};

/// The row's own requantize, or the one with a table lookup in registers (AVX512-VBMI).
using Requantize = void (*)(const RequantizeArgs&);
using Gemv = void (*)(const GemvArgs&);
/// The input step of a network for flattened positions (conv/stem.hpp).
struct StemKernels {
  /// One row of 1..4 planes to a dword per pixel, channel 0 in the lowest byte.
  void (*quantize_quads)(const float* x, int64_t channel_stride, int64_t channels, int64_t w,
                         const ActivationGrid& grid, uint32_t* quads);
  /// n pixels of two, or four, lines of dwords side by side.
  void (*interleave_pairs)(const uint32_t* first, const uint32_t* second, int64_t n, uint8_t* out);
  void (*interleave_fours)(const uint32_t* const* lines, int64_t n, uint8_t* out);
};

/// Another order of the weights of a column tile, for a gemm that reads 8-bit weights in no other.
struct TileArrangement {
  /// Bytes behind the [steps][1024] of a tile.
  int64_t (*extra_bytes)(int64_t steps);
  int64_t (*scratch_bytes)(int64_t steps);
  /// In place, for products with levels of 0 .. qmax, 1 <= qmax <= 255; the extra bytes are
  /// written, too.
  void (*arrange)(int8_t* tile, int64_t steps, const uint8_t* live_quads, int qmax,
                  uint8_t* scratch);
};

using UnpackTiles = void (*)(const uint8_t* packed, int bits, int64_t count, int8_t* out);

void do_nothing();

/// A row says what it has; what it says nothing about, it does not have or need.
struct KernelRow {
  const char* name;
  Isa isa;
  void (*quantize_row)(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q);
  /// One image row of a planar tensor to [w][channels].
  void (*quantize_planar)(const float* x, int64_t channel_stride, int64_t channels, int64_t w,
                          const ActivationGrid& grid, uint8_t* q);
  void (*fake_quantize)(const float* x, int64_t n, const ActivationGrid& grid, float scale,
                        float* y);
  UnpackTiles unpack_tiles;
  void (*begin)() = do_nothing;  // per thread and pass: AMX tile configuration
  void (*end)() = do_nothing;
  Positions positions = Positions::Listed;  // which of gemm and block convolutions use
  void (*gemm)(const GemmArgs&);
  /// Any number of rows, whose sums go on to `requantize` (its sums, tiles and rows are the
  /// kernel's business; g.sums is not used). All rows are kept: listed positions are outputs.
  /// May be null where gemm, then requantize, is as fast.
  void (*gemm_requantize)(const GemmArgs& g, const RequantizeArgs& q,
                          Requantize requantize) = nullptr;
  int gemm_rows = 56;  // that a call should have at most: several passes of the most
  Gemv gemv;           // needs no begin() and end(); not for arranged tiles
  const TileArrangement* arrangement = nullptr;  // of 8-bit weights, or null
  void (*store)(const StoreArgs&);
  void (*requantize)(const RequantizeArgs&);
  // Of flattened positions; other rows have none.
  void (*block)(const BlockArgs&) = nullptr;
  StemKernels stem = {};
  const GroupedKernels* grouped;
  const WinogradKernels* winograd;
  const WinogradByteKernels* winograd_bytes = nullptr;  // or null
  // Products that the direct convolution makes, at best, in the time of one of winograd->multiply.
  double direct_products = 2.0;
  const ImageKernels* image;
};

/// The rows that this build has, fastest first. Which of them the machine can run: isa_supported.
std::span<const KernelRow* const> kernel_rows();

/// The row of the active instruction set, or null when it is the scalar reference.
const KernelRow* active_kernels();

/// A row's begin() and end() around a thread's pass; nothing for the scalar reference.
class KernelScope {
 public:
  explicit KernelScope(const KernelRow* row = active_kernels()) : row_(row) {
    if (row_ != nullptr) row_->begin();
  }
  ~KernelScope() {
    if (row_ != nullptr) row_->end();
  }
  KernelScope(const KernelScope&) = delete;
  KernelScope& operator=(const KernelScope&) = delete;

 private:
  const KernelRow* row_;
};

/// The row's own unpacking and matrix-vector product, or the GFNI ones where the machine has it (a
/// sub-feature of its own: Cascade Lake has AVX-512-VNNI without GFNI).
UnpackTiles unpacker(const KernelRow& row);
Gemv gemv(const KernelRow& row);

/// Readers of bitmask tiles (formats/panels.hpp), which are 64-bit masks and what vpexpandb wants
/// (AVX512-VBMI2 and GFNI); null where the machine or the row has none, and panels are dense.
struct BitmaskKernels {
  UnpackTiles expand = nullptr;
  Gemv gemv = nullptr;  // `packed` of its arguments are bitmask tiles
};
BitmaskKernels bitmask_kernels(const KernelRow& row);

Requantize requantizer(const KernelRow& row);

/// Bits that weights may have whose sums of products with all u8 levels are no smaller than those
/// of b-bit weights with levels of 0 .. qmax: b less one for every bit that the levels lack. (With
/// a bits in the levels, (2^a - 1) * 2^b <= 255 * 2^(b - (8 - a)).) It is b where the row's kernels
/// multiply u8 by s8 exactly.
int product_bits(const KernelRow& row, int bits, int qmax);

#ifdef ADALAYER_HAVE_AVX2
extern const KernelRow kAvx2Row;
extern const TileArrangement kAvx2Arrangement, kAvx512Arrangement;
void gemm_avx2(const GemmArgs& g);
void gemm_requantize_avx2(const GemmArgs& g, const RequantizeArgs& q, Requantize requantize);
void requantize_avx2(const RequantizeArgs& args);
/// The table of a finish, for the levels that stand in the output.
void look_up_avx2(const RequantizeArgs& args);
#endif
#ifdef ADALAYER_HAVE_AVXVNNI
extern const KernelRow kAvxVnniRow;
#endif
#ifdef ADALAYER_HAVE_AVX512
extern const KernelRow kAvx512Row;
#endif
#ifdef ADALAYER_HAVE_AVX512VNNI
extern const KernelRow kAvx512VnniRow;
#endif
#ifdef ADALAYER_HAVE_AMX
extern const KernelRow kAmxRow;
#endif
#ifdef ADALAYER_HAVE_NEON
extern const KernelRow kNeonRow;
#endif
#ifdef ADALAYER_HAVE_DOTPROD
extern const KernelRow kDotprodRow;
#endif
#ifdef ADALAYER_HAVE_I8MM
extern const KernelRow kI8mmRow;
#endif
#ifdef ADALAYER_HAVE_GFNI
void unpack_tiles_gfni(const uint8_t* packed, int bits, int64_t count, int8_t* out);
void gemv_gfni(const GemvArgs& g);
#endif
#ifdef ADALAYER_HAVE_AVX512VBMI2
void expand_tiles_vbmi2(const uint8_t* packed, int bits, int64_t count, int8_t* out);
void gemv_vbmi2(const GemvArgs& g);
#endif
#ifdef ADALAYER_HAVE_AVX512VBMI
void requantize_vbmi(const RequantizeArgs& args);
#endif

}  // namespace adalayer::cpu

// The inner loops of image/ops.hpp: one table per instruction set over plain runs of bytes. The
// operations themselves (image/ops.cpp, pool.cpp, move.cpp, float.cpp) cut images into such runs
// and know nothing of instruction sets.
//
// Every kernel reads at most 3 bytes beyond those that it is given (by dwords, and a pitch is a
// multiple of 4) and writes exactly those that it is asked for. Formulas: reference/image_spec.hpp.
// A kernel leaves U8Finish::table alone; the caller looks it up afterwards.
#pragma once

#include <cstdint>

#include "reference/attention.hpp"
#include "reference/image_spec.hpp"
#include "reference/linear.hpp"
#include "reference/recurrence.hpp"

namespace adalayer::cpu {

/// `count` runs of `bytes` bytes each, read and written at fixed distances. With an index, run i
/// is read at in + index[i] * in_step.
struct Pixels {
  const uint8_t* in;
  int64_t in_step;
  uint8_t* out;
  int64_t out_step;
  int64_t bytes;
  int64_t count;
  const int32_t* index = nullptr;  // copy only
};

/// A permutation of a pixel's bytes, prepared for 64-byte table look-ups: output block b collects
/// the lanes `lanes` of each source block at position low[64 * b + lane] of it.
struct GatherSource {
  int64_t offset;     // bytes from the pixel's start
  uint64_t readable;  // bytes of the block that belong to the pixel
  uint64_t lanes;
};
struct GatherPlan {
  const int32_t* index;  // [channels of the output]
  bool interleaved;      // out[2i] = in[even + i], out[2i + 1] = in[odd + i]
  int64_t even, odd;
  const uint8_t* low;           // index % 64, padded to whole blocks
  const GatherSource* sources;  // of all blocks, one after another
  const int32_t* ends;          // end of each block's sources
};

/// y = fma(q, slope[i % period], offset[i % period])
struct LineArgs {
  const float* slope;   // [period], readable to the next multiple of 64
  const float* offset;  // likewise
  int64_t period;
  bool bounded;
  U8Finish finish;
};

/// `count` outputs whose windows lie `step` bytes apart and have the same shape: rows at byte
/// offsets rows[0 .. height), columns `column` bytes apart.
struct Window {
  const int64_t* rows;
  int64_t height, width;
  int64_t column;
  int64_t step;
  int64_t out_step;
  int64_t count;
  int64_t bytes;  // of each pixel
};

/// y = (float)(sum - centre) * factor
struct Average {
  int32_t centre;
  float factor;
  U8Finish finish;
};

/// One output row of a bilinear resize.
struct BilinearRow {
  const uint8_t* top;  // input rows low_h[y] and high_h[y]
  const uint8_t* bottom;
  int64_t in_step;
  const ResizeSpec* spec;
  float part_h;
  bool bounded;
  uint8_t* out;
  int64_t out_step;
  int64_t count;
  int64_t bytes;
};

/// Float pixels to levels: `channels` planes `plane` elements apart, or side by side.
struct QuantizeRow {
  const float* x;
  int64_t channels;
  int64_t plane;
  int64_t count;
  uint8_t* out;
  int64_t pitch;
};

/// `count` pixels to planes of floats, `plane` elements apart.
struct DequantizeRow {
  const uint8_t* in;
  int64_t pitch;
  int64_t channels;
  int64_t count;
  float scale;
  int32_t zero_point;
  float* out;
  int64_t plane;
};

/// Sums of products in blocks of 16 or 32 columns: sum i is sums[i / columns * block + i % columns]
/// + term, and whole blocks may be read.
struct BlockedSums {
  const int32_t* sums;
  int64_t block;  // elements
  int log_columns;
  int64_t count;
  int32_t term;

  const int32_t* at(int64_t i) const {
    return sums + (i >> log_columns) * block + (i & ((int64_t{1} << log_columns) - 1));
  }
};

/// One row of attention's weights.
struct SoftmaxLevels {
  BlockedSums sums;      // of the keys
  const int32_t* terms;  // [count], up to whole blocks of 16: each key's, that its sum lacks
  float scale;           // of a score
  const float* mask;     // [count], or null
  float* scores;         // scratch: as many as terms
  uint8_t* levels;       // the same; zeros behind the count
};

/// c[r][j] += a chain of fused multiply-adds, from 0, of a[r][k] * b[k][j] over `terms` values of
/// k. Columns are in blocks of kFloatColumns; the last one may be a part of that.
constexpr int64_t kFloatColumns = 32;
constexpr int kFloatRows = 6;
struct FloatProduct {
  const float* a;  // elements from row to row, and from term to term:
  int64_t a_row, a_term;
  const float* b;  // from block to block of columns, and from term to term:
  int64_t b_block, b_term;
  int64_t terms;
  int rows;  // 1..kFloatRows
  int64_t columns;
  float* c;
  int64_t c_row;
};

/// One step of a recurrent layer: all its units. Arrays over outputs are [gates * hidden]; whole
/// registers of `sums` and `correction` may be read behind them.
struct RecurrentCell {
  RecurrentKind kind;
  int64_t hidden;
  const int32_t* sums;        // of products with levels
  const int32_t* correction;  // zero point correction to add
  const float* scale;
  const float* bias;
  const float* products;  // what the inputs contribute
  float* state;           // [hidden]
  float* cell;            // [hidden], of an LSTM
  U8Finish finish;        // of the state, without a table
  uint8_t* levels;        // [hidden] of the new state
};

/// Rows of y[j] = fma((float)(sums[j] - zero * totals[j]), scale[j] * step, y[j]): what a group of
/// a linear layer's input channels adds to its outputs. Columns are a multiple of 16.
struct GroupSums {
  const int32_t* sums;  // of products with levels, from row to row:
  int64_t sum_row;
  const int32_t* totals;  // of the group's weights
  const float* scale;
  int32_t zero;
  float step;
  int rows;
  int64_t columns;
  float* reals;
  int64_t real_row;
};

/// `bounded` promises |y * inv_scale| < 2^30 for all possible inputs: the kernel may then convert
/// first and clamp integers. lo and hi are whole numbers and rounding is monotone, so that the
/// level is the same.
struct ImageKernels {
  void (*copy)(const Pixels& p);
  void (*lookup)(const uint8_t* table, const Pixels& p);
  void (*gather)(const GatherPlan& plan, const Pixels& p);

  /// n bytes; b repeats after `period` bytes. Outputs may be inputs.
  void (*add)(const PairSpec& spec, bool bounded, const uint8_t* a, const uint8_t* b,
              int64_t period, uint8_t* out, int64_t n);
  void (*mul)(const PairSpec& spec, bool bounded, const uint8_t* a, const uint8_t* b,
              int64_t period, uint8_t* out, int64_t n);
  void (*line)(const LineArgs& args, const uint8_t* in, uint8_t* out, int64_t n);

  void (*max_window)(const Window& w, const uint8_t* in, uint8_t* out);
  void (*average_window)(const Window& w, const Average& average, const uint8_t* in, uint8_t* out);
  void (*bilinear)(const BilinearRow& row);

  /// Sums of the levels of each of `count` pixels, and of their squares.
  void (*moments)(const uint8_t* in, int64_t in_step, int64_t channels, int64_t count,
                  int64_t* sums, int64_t* squares);
  /// y = fma((float)(q - mean) * factor, gamma[c], beta[c]); each pixel has a mean and a factor.
  void (*normalize)(const LayerNormSpec& spec, const double* means, const float* factors,
                    const Pixels& p);

  void (*quantize_planar)(const QuantizeRow& row, const ActivationGrid& grid);
  void (*quantize_pixels)(const QuantizeRow& row, const ActivationGrid& grid);
  void (*dequantize_planar)(const DequantizeRow& row);
  void (*dequantize_row)(const uint8_t* q, int64_t n, float scale, int32_t zero_point, float* out);

  /// out[x] = fma(part[x], row[high[x]] - row[low[x]], row[low[x]])
  void (*blend_columns)(const float* row, const int32_t* low, const int32_t* high,
                        const float* part, int64_t n, float* out);
  /// out[x] = fma(part, bottom[x] - top[x], top[x])
  void (*blend_rows)(const float* top, const float* bottom, float part, int64_t n, float* out);
  /// out[i] = fma(a[i], b[i], c[i])
  void (*fma_values)(const float* a, const float* b, const float* c, int64_t n, float* out);
  /// Softmax over `channels` values `stride` apart, at `count` neighbouring positions.
  void (*softmax)(const float* in, int64_t channels, int64_t stride, int64_t count, float* out);
  /// attention_score(), then attention_level() of every key; returns the sum of the levels.
  int32_t (*softmax_levels)(const SoftmaxLevels& row);
  /// y = (float)sum * factor
  void (*scale_sums)(const BlockedSums& sums, float factor, bool bounded, const U8Finish& finish,
                     uint8_t* out);
  /// float_function() and float_pair() of n floats.
  void (*function)(const FloatFunctionSpec& spec, const float* in, int64_t n, float* out);
  void (*combine)(FloatPair pair, const float* a, const float* b, int64_t n, float* out);
  /// out[i] = fma(in[i], slope, offset)
  void (*line_floats)(const float* in, float slope, float offset, int64_t n, float* out);
  /// normalize() of one pixel, without the finish: n floats side by side.
  void (*normalize_floats)(const LayerNormSpec& spec, double mean, float factor, const uint8_t* in,
                           int64_t n, float* out);
  void (*multiply_floats)(const FloatProduct& product);
  void (*recurrent_cell)(const RecurrentCell& cell);
  void (*add_group)(const GroupSums& group);
  /// The finish of n floats.
  void (*finish_floats)(const float* y, int64_t n, const U8Finish& finish, uint8_t* out);
};

/// The kernels of the active row of the kernel table, or the scalar ones where there is none.
const ImageKernels& image_kernels();

extern const ImageKernels kScalarImage;
#ifdef ADALAYER_HAVE_AVX2
extern const ImageKernels kAvx2Image;
#endif
#ifdef ADALAYER_HAVE_AVX512
extern const ImageKernels kAvx512Image;
#endif
#ifdef ADALAYER_HAVE_NEON
extern const ImageKernels kNeonImage;
#endif
#ifdef ADALAYER_HAVE_AVX512VBMI
// A sub-feature of its own: Cascade Lake has AVX-512-VNNI without VBMI, Cannon Lake VBMI without
// VNNI.
void lookup_vbmi(const uint8_t* table, const Pixels& p);
void gather_vbmi(const GatherPlan& plan, const Pixels& p);
#endif

}  // namespace adalayer::cpu

// Parameters of the kernels: plain data, the same for host and device. Images are NHWC u8 with
// `pitch` bytes per pixel (device_pitch()), floats are NCHW. Pointers are device memory.
#pragma once

#include <cstdint>

#include "reference/float_kinds.hpp"

namespace adalayer::cuda {

/// U8Finish of reference/image_spec.hpp.
struct Finish {
  float lo = 0.0f, hi = 255.0f;
  float inv_scale = 1.0f;
  int32_t zero_point = 0;
  const uint8_t* table = nullptr;
};

/// ActivationGrid of reference/spec.hpp.
struct Grid {
  float inv_scale = 1.0f;
  int32_t zero_point = 0;
  int32_t qmax = 255;
};

struct ImageSize {
  int32_t c = 0, h = 0, w = 0, pitch = 0;
};

// ---- convolution ----------------------------------------------------------------------------

/// One output channel. acc = (sum >> shift) + correction, y = fma(acc, scale, bias).
struct alignas(16) ChannelConstants {
  float scale = 0.0f, bias = 0.0f;
  int32_t correction = 0;  // -zero_point of the input * sum of the channel's weights
  int32_t unused = 0;
};

/// What becomes of the sums.
struct ConvOutput {
  const ChannelConstants* channels;  // and kBlockChannels zeros behind them
  uint8_t* levels;                   // u8 result, or null
  float* numbers;                    // float result, where levels is null
  // Residual: levels of the output's size and pitch, or (float results only) numbers.
  const uint8_t* residual;
  const float* residual_numbers;
  float residual_scale;
  int32_t residual_zero;
  Finish finish;  // u8 results
  float lo, hi;   // float results: clamp
  // Float results: the nearest value on a grid, where asked for.
  int32_t on_grid;
  Grid grid;
  float grid_scale;
  int32_t nhwc;            // float results: NHWC without padding instead of NCHW
  int32_t channels_count;  // of the whole output
  int32_t pitch;
  int32_t out_h, out_w;  // of the whole output
  // Position (j, i) of the product is pixel (j * step_y + phase_y, i * step_x + phase_x).
  int32_t step_y, step_x, phase_y, phase_x;
  int32_t linear;  // steps of 1: position numbers are pixel numbers
};

constexpr int kMaxTaps = 15;  // along one axis

/// Implicit product: output channels x positions, over pieces of the reduction.
struct ConvParams {
  const uint8_t* in;
  const uint8_t* weights;    // of group 0; Form::Blocks: of all
  const int32_t* pieces;     // [steps][kStepDepth / piece][2]: byte offset; y tap | x tap << 8
  const uint8_t* zero_page;  // 16 bytes of the input's zero point
  int32_t* partial;          // [tiles][tile size], zero between launches; splits > 1 only
  int32_t* arrived;          // [tiles], likewise
  // Form::Blocks. Steps are counted through all blocks of 64 channels, pieces are of these steps.
  const int32_t* block_steps;  // [groups][blocks of 64 channels] + 1: number of the first step
  const uint32_t*
      step_cells;  // [steps][2]: the first stored cell; bit 2 * cell + half: it is stored
  int64_t group_weight_bytes;
  int32_t group_in_bytes;           // from one group's channels to the next one's
  int32_t group_out;                // output channels of a group
  int32_t cells;                    // of 16 output channels, in a group
  int32_t positions, plane, width;  // all; of one image; of one row of it
  int32_t in_h, in_w, in_row_bytes, in_pixel_bytes, in_image_bytes;
  int32_t stride_y, stride_x;
  int32_t taps_y, taps_x;
  int16_t tap_y[kMaxTaps + 1], tap_x[kMaxTaps + 1];  // position * stride + tap = input coordinate
  int32_t steps;         // of the reduction, kStepDepth each; not of Form::Blocks
  int32_t depth;         // of the reduction, a multiple of 32
  int32_t splits;        // of the reduction, grid y
  int32_t tiles_m;       // tiles of output channels in a group
  int32_t shift;         // 8 - bits
  int32_t vector_store;  // eight neighbouring channels of a group are aligned to eight bytes
  ConvOutput out;
};

/// Depthwise: four channels and kDepthwiseColumns positions per thread.
struct DepthwiseParams {
  const uint8_t* in;
  const uint32_t* weights;  // [taps][pitch / 4] four channels' bytes
  int32_t batch;
  ImageSize size;  // of the input
  int32_t positions_h, positions_w;
  int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t zero_point;
  ConvOutput out;
};
constexpr int kDepthwiseColumns = 4;

/// Any convolution, one thread per output: what the others cannot do.
struct DirectParams {
  const uint8_t* in;
  const int8_t* weights;  // [O][KH][KW][I / groups]
  int32_t batch;
  ImageSize size;
  int32_t group_in, group_out;
  int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t transposed;
  int32_t zero_point;
  ConvOutput out;
};

// ---- between convolutions ---------------------------------------------------------------------

struct QuantizeParams {
  const float* in;
  uint8_t* out;
  int32_t nhwc;
  int32_t batch;
  ImageSize size;
  Grid grid;
};

struct DequantizeParams {
  const uint8_t* in;
  float* out;
  int32_t batch;
  ImageSize size;
  float scale;
  int32_t zero_point;
};

struct LookupParams {
  const uint8_t* in;
  uint8_t* out;
  const uint8_t* table;
  int64_t words;  // of four levels
};

/// Add, Mul.
struct PairParams {
  const uint8_t* a;
  const uint8_t* b;
  uint8_t* out;
  int64_t words;
  int32_t image_words;  // of a
  int32_t pitch_words;
  int32_t per_channel;  // b is one value per channel
  int32_t product;
  int32_t zero_a, zero_b;
  float scale_a, scale_b;
  Finish finish;
};

struct AffineParams {
  const uint8_t* in;
  uint8_t* out;
  int64_t words;
  int32_t pitch_words;
  const float* scale;  // [pitch]
  const float* bias;   // [pitch]
  Finish finish;
};

/// Constants without gaps: an entry per channel, or per element in the order rows, columns,
/// channels.
struct AffineImageParams {
  const uint8_t* in;
  uint8_t* out;
  int32_t batch;
  ImageSize size;
  const float* scale;
  const float* bias;
  int32_t scale_of_image, bias_of_image;
  Finish finish;
};

/// Operations that move levels: one thread per four bytes of the output.
struct MoveParams {
  enum Kind : int32_t {
    kConcat,  // along any axis
    kSlice,
    kGather,
    kPad,
    kResize,
    kRearrange,
    kFlatten,
    kUnflatten,
    kConstant,  // `in` has the levels of one image, without gaps
  };
  const uint8_t* in;
  uint8_t* out;
  const uint8_t* table;  // concat: of this input, or null
  int32_t kind;
  int32_t batch;
  ImageSize from, to;
  int32_t first_channel;      // concat: of this input in the output
  int32_t axis, begin, step;  // slice
  const int32_t* index;       // gather, rearrange: [C]; resize: low_h
  const int32_t* index_h;     // rearrange: [H]
  const int32_t* index_w;     // rearrange: [W]; resize: low_w
  int32_t top, left, level;   // pad; concat: of this input in the output
};

struct PoolParams {
  enum Kind : int32_t { kMax, kAverage, kAdaptive };
  const uint8_t* in;
  uint8_t* out;
  int32_t kind;
  int32_t batch;
  ImageSize from, to;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int32_t pad_bottom, pad_right, count_padding;
  int32_t zero_in;
  float ratio;
  Finish finish;
};

struct BilinearParams {
  const uint8_t* in;
  uint8_t* out;
  int32_t batch;
  ImageSize from, to;
  const int32_t *low_h, *high_h, *low_w, *high_w;
  const float *part_h, *part_w;
  float scale, offset;
  Finish finish;
};

struct LayerNormParams {
  const uint8_t* in;
  uint8_t* out;
  int32_t pixels;
  int32_t channels, pitch;
  int32_t about_zero, zero_point;  // an RMS norm
  double step, eps;
  const float* gamma;
  const float* beta;
  Finish finish;
};

struct GroupNormParams {
  const uint8_t* in;
  uint8_t* out;
  ImageSize size;
  int32_t groups;  // one block per image and group
  double step, eps;
  const float* gamma;
  const float* beta;
  Finish finish;
};

struct AttentionParams {
  const uint8_t *q, *k, *v;
  uint8_t* out;
  int32_t sequences;  // of one image
  int32_t queries, keys, heads, key_heads, depth, width;
  int32_t q_pitch, k_pitch, v_pitch, out_pitch;
  int32_t zero_q, zero_k, zero_v;
  float scale, value_scale;
  int32_t causal;
  const float* mask;  // or null
  int64_t mask_sequence, mask_head;
  Finish finish;
};
constexpr int kAttentionThreads = 128;

// ---- floats -----------------------------------------------------------------------------------

struct FloatAverageParams {
  const float* in;
  float* out;
  int32_t adaptive;
  int32_t planes;  // batch * channels
  int32_t in_h, in_w, out_h, out_w;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right;
  int32_t count_padding;
};

struct FloatResizeParams {
  const float* in;
  float* out;
  int32_t bilinear;
  int32_t planes;
  int32_t in_h, in_w, out_h, out_w;
  const int32_t *low_h, *high_h, *low_w, *high_w;
  const float *part_h, *part_w;
};

/// Element by element; a program's images follow each other without gaps.
struct FloatFunctionParams {
  const float* in;
  float* out;
  int64_t count;
  FloatFunction function;
  float a, b;
};

struct FloatPairParams {
  const float *a, *b;
  float* out;
  int64_t count;
  FloatPair pair;
};

struct SoftmaxParams {
  const float* in;
  float* out;
  int32_t channels, plane;  // one block per position
};

/// Element-wise over contiguous floats, for the drop-in operators: onto the grid and back, or only
/// onto it.
struct GridParams {
  const float* in;
  float* numbers;   // or null
  uint8_t* levels;  // or null
  int64_t count;
  Grid grid;
  float scale;
};

}  // namespace adalayer::cuda

// Convolution of u8 images as a matmul over the image in place.
//
// plan_conv() turns a shape and the layouts around it into tables: which bytes of the input each
// step of the reduction reads, and where each output position goes. run_conv() is the loop over
// blocks. Nothing is copied: see image/layout.hpp.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/conv/sparse_panels.hpp"
#include "cpu/conv_epilogue.hpp"
#include "cpu/image/layout.hpp"
#include "cpu/kernel_table.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

/// Output positions with the same step offsets.
struct ConvRun {
  int64_t base = 0;  // input byte of tap (0, 0) at position 0, from the image's start
  int64_t positions = 0;
  std::vector<int32_t> in_offset;        // [positions] bytes from `base`
  std::vector<int64_t> step_offsets;     // [steps] from a position to the step's 64 bytes
  std::vector<int32_t> out_offset;       // [positions] byte in the output image, or -1: dropped
  std::vector<int32_t> residual_offset;  // [positions], empty without a residual
  std::vector<int32_t> position;         // [positions] in the output image, or -1; float output
  bool dropped = false;                  // whether any position is
};

struct ConvPlan {
  ConvShape shape;              // of one image
  int64_t position_stride = 0;  // of flattened positions
  int64_t steps = 0;            // of 64 bytes each
  int64_t column_tiles = 0;     // of 16 output channels, per group
  int64_t in_image_bytes = 0, out_image_bytes = 0, residual_image_bytes = 0;
  int64_t out_pitch = 0;
  int64_t out_area = 0;             // positions of the output image
  std::vector<uint8_t> live_quads;  // [steps] groups of 4 bytes that hold weights
  std::vector<int32_t> source;      // [steps * 64] index in [I/groups][KH][KW], or -1: no weight
  std::vector<ConvRun> runs;
  const TileArrangement* arrangement = nullptr;  // of 8-bit panels
  int qmax = 255;                                // of the levels for which those are arranged

  int64_t pairs() const { return shape.groups * ((column_tiles + 1) / 2); }
  int64_t all_tiles() const { return shape.groups * column_tiles; }
  bool arranged(int bits) const { return bits == 8 && arrangement != nullptr; }
  /// Of a column tile with tiles for so many steps.
  int64_t panel_bytes(int64_t step_count, int bits) const {
    return step_count * 128 * bits + (arranged(bits) ? arrangement->extra_bytes(step_count) : 0);
  }
  int64_t packed_tile_bytes(int bits) const { return panel_bytes(steps, bits); }
  int64_t packed_bytes(int bits) const { return all_tiles() * packed_tile_bytes(bits); }
};

/// Where output (y, x) of the convolution goes: to (first_y + y * step_y, first_x + x * step_x) of
/// the output image. A transposed convolution is several convolutions whose outputs interleave.
struct OutputMap {
  int64_t first_y = 0, step_y = 1, first_x = 0, step_x = 1;
  int64_t image_h = 0, image_w = 0;  // of the output image; 0: the convolution's own output size
};

/// What a convolution needs around its input. Windows may end before the padding does.
Padding padding_of(const ConvShape& shape);

/// `in` has room for the padding that the shape asks for (image/layout.hpp; padding may be negative
/// here). `out` is null for a float output, `residual` where there is none. `by_pixel` keeps a step
/// within one kernel position even where that takes more of them: blocks of zeros do so as well.
ConvPlan plan_conv(const ConvShape& shape, const ImageLayout& in, const ImageLayout* out,
                   const ImageLayout* residual, const KernelRow& kernels, const OutputMap& map = {},
                   bool by_pixel = false);

/// Tile `step` of column tile `tile` (of all groups) of weights [O][I/groups][KH][KW], unpacked.
void fill_tile(const ConvPlan& plan, std::span<const int8_t> weights, int64_t tile, int64_t step,
               int8_t* out);

/// Writes one column tile's panel of the given steps (panel_bytes of it) after another.
class PanelWriter {
 public:
  PanelWriter(const ConvPlan& plan, std::span<const int8_t> weights, int bits, uint8_t* out);
  void write(int64_t tile, std::span<const int32_t> steps);
  uint8_t* end() const { return out_; }

 private:
  const ConvPlan& plan_;
  std::span<const int8_t> weights_;
  int bits_;
  uint8_t* out_;
  AlignedBuffer scratch_;
  std::vector<uint8_t> live_quads_;
};

/// Writes the panels of `weights` [O][I/groups][KH][KW]: [group][column tile][step] tiles, each
/// packed to 128 * bits bytes (formats/FORMATS.md, "Panels"); 8-bit tiles are then arranged, where
/// the kernels want that.
void pack_panels(const ConvPlan& plan, std::span<const int8_t> weights, int bits, uint8_t* out);

/// The weights that one thread will read in one pass, in order; a little of what comes next is
/// fetched into the second-level cache with every block.
class WeightStream {
 public:
  struct Segment {
    const uint8_t* begin;
    int64_t bytes;
    int64_t before;  // bytes of all segments in front
  };
  WeightStream(std::span<const Segment> segments, int64_t window)
      : segments_(segments), window_(window) {}

  struct Piece {
    const uint8_t* begin;
    int64_t bytes;
  };
  /// Up to `want` bytes to fetch while byte `at` of segment `segment` is in use.
  Piece take(int64_t segment, int64_t at, int64_t want);

 private:
  std::span<const Segment> segments_;
  int64_t window_;
  size_t current_ = 0;  // segment of asked_
  int64_t asked_ = 0;   // bytes fetched so far
};

struct ConvCall {
  const ConvPlan& plan;
  const uint8_t* weights;  // panels
  int bits;                // of the panels
  int weight_bits;         // GemmArgs
  const ConvEpilogue* epilogue;
  const uint8_t* in;  // first image
  int64_t images;
  uint8_t* out;
  const uint8_t* residual;               // or null
  bool by_columns;                       // parts are column pairs, else blocks of positions
  bool other_order;                      // of the loops, than what the sizes suggest
  WeightStream* stream;                  // of this thread, or null
  int64_t segment;                       // this convolution's in the stream
  const SparsePanels* sparse = nullptr;  // of the panels, unless they are dense
};

/// The same with a plain tensor as output, of whole images: floats or levels, NCHW or NHWC.
struct TensorConvCall {
  ConvCall conv;  // its out, residual and epilogue are not used
  const OutputSpec& out;
  const int32_t* correction;  // [out channels], zeros where the zero point is 0
  int64_t first_image = 0;    // of the tensor, where conv.in's first one goes
};

/// One part of a convolution. The caller has called kernels.begin() on this thread.
void run_conv(const ConvCall& call, const KernelRow& kernels, Part part);
void run_conv(const TensorConvCall& call, const KernelRow& kernels, Part part);

/// Bytes [first, second) of the panels that a part by columns reads.
std::pair<int64_t, int64_t> weight_range(const ConvPlan& plan, const SparsePanels* sparse, int bits,
                                         Part part);

/// How to cut a convolution for `threads` threads: by columns where weights are the larger side.
bool prefers_columns(const ConvPlan& plan, int64_t panel_bytes, int threads);

}  // namespace adalayer::cpu

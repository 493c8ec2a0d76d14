// A convolution node made ready for this machine.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/conv/grouped.hpp"
#include "cpu/conv/matmul.hpp"
#include "cpu/conv/sparse_choice.hpp"
#include "cpu/conv/stem.hpp"
#include "engine/program.hpp"

namespace adalayer::engine {

/// Where a convolution's tensors are during one run.
struct ConvBuffers {
  const uint8_t* in = nullptr;
  const uint8_t* residual = nullptr;
  uint8_t* out = nullptr;
  float* out_f32 = nullptr;  // instead of out
  int64_t images = 0;
};

/// Shape of a transposed convolution's inverse: the geometry that reads the input. out_channels and
/// the output's size are the node's output.
struct TransposedPhase {
  ConvShape shape;     // an ordinary convolution of stride 1
  cpu::OutputMap map;  // where its outputs go
  // Its taps are first + j * step of the kernel's, in falling order.
  int64_t first_ky = 0, step_ky = 1, first_kx = 0, step_kx = 1;
};
std::vector<TransposedPhase> transposed_phases(const Program& program, const Node& node);

/// How a convolution runs; every choice gives the same bits.
struct ConvChoice {
  bool resident = false;     // weights are unpacked to bytes once, at load
  bool other_order = false;  // of the loops over positions and columns
  bool sparse = false;       // zeros are left out (cpu/conv/sparse_choice.hpp)
  bool operator==(const ConvChoice&) const = default;
};

/// Conv and ConvTranspose. A transposed convolution is up to stride_h * stride_w ordinary ones
/// whose outputs interleave; every other node is one.
class ConvStep {
 public:
  /// Layouts are null for float values; `stem` is null unless the input is in row groups.
  ConvStep(const Program& program, const Node& node, const cpu::ImageLayout& in,
           const cpu::ImageLayout* out, const cpu::ImageLayout* residual, const cpu::Stem* stem);

  /// Bytes of the panels that pack() writes; 0 for grouped kernels, which keep their own.
  int64_t panel_bytes(const ConvChoice& choice) const;
  /// Derives the weights of this machine in the form of a choice: panels into `panels` (64-byte
  /// aligned), which must live as long as this object uses that form.
  void pack(uint8_t* panels, const ConvChoice& choice);
  /// No pack() after this one.
  void drop_weights();

  /// Whether choices of `resident` differ: not for 8-bit weights, nor for grouped kernels.
  bool can_be_resident() const { return bits_ < 8 && !grouped_; }
  /// Whether there are zeros that may be worth leaving out.
  bool can_be_sparse() const { return !pieces_.empty() && pieces_.front().sparse.has_value(); }
  /// Without a clock: whether leaving them out surely wins, or is forced.
  bool should_be_sparse() const;
  void choose(const ConvChoice& choice) { choice_ = possible(choice); }
  const ConvChoice& choice() const { return choice_; }
  /// The same choice without what this convolution cannot do.
  ConvChoice possible(ConvChoice choice) const;
  /// What zeros left out were measured to take, and dense panels, for why().
  void measured(double sparse_seconds, double dense_seconds) {
    sparse_seconds_ = sparse_seconds;
    dense_seconds_ = dense_seconds;
  }
  /// What the zeros look like to the kernels: choices made for others may be bad ones here.
  uint64_t sparse_key() const;

  /// Weights that part `part` reads, for the prefetch stream.
  cpu::WeightStream::Segment segment(cpu::Part part) const;
  int64_t max_parts() const;
  /// Decides how parts are cut when `threads` work on it.
  bool by_columns(int threads) const;
  void run(const cpu::KernelRow& kernels, const ConvBuffers& buffers, cpu::Part part,
           bool by_columns, cpu::WeightStream* stream, int64_t segment) const;

  int bits() const { return bits_; }
  const ConvShape& shape() const { return shape_; }
  int64_t macs() const { return shape_.macs(); }
  size_t packed_bytes() const { return packed_bytes_; }
  size_t derived_bytes() const;
  std::string kernel() const;
  /// How zeros are used, and what that was measured to save; empty without zeros to speak of.
  std::string why() const;

 private:
  struct Piece {
    cpu::ConvPlan plan;
    std::optional<cpu::SparseForm> sparse;  // all pieces have one, or none
    AlignedBuffer correction;               // of this piece's taps
    cpu::ConvEpilogue epilogue;
    std::vector<int8_t> weights;       // until drop_weights()
    const uint8_t* panels[2][2] = {};  // dense or sparse, packed or resident
  };
  const cpu::ConvPlan& plan_in_use(const Piece& piece) const {
    return choice_.sparse ? piece.sparse->plan : piece.plan;
  }
  const cpu::SparsePanels* panels_in_use(const Piece& piece) const {
    return choice_.sparse ? &piece.sparse->panels : nullptr;
  }
  int64_t piece_bytes(const Piece& piece, const ConvChoice& possible) const {
    const int bits = panel_bits(possible.resident);
    return possible.sparse ? piece.sparse->panels.bytes(bits) : piece.plan.packed_bytes(bits);
  }

  void plan_transposed(const std::vector<TransposedPhase>& phases, const cpu::ImageLayout& in,
                       const cpu::ImageLayout* out, const cpu::ImageLayout* residual,
                       std::span<const int8_t> weights);
  AlignedBuffer correction(std::span<const int8_t> weights) const;
  cpu::ConvPlan plan(const ConvShape& shape, const cpu::OutputMap& map, const cpu::ImageLayout& in,
                     const cpu::ImageLayout* out, const cpu::ImageLayout* residual,
                     bool by_pixel) const;
  Piece& new_piece(std::vector<int8_t> weights);
  void add_piece(const ConvShape& shape, const cpu::OutputMap& map, const cpu::ImageLayout& in,
                 const cpu::ImageLayout* out, const cpu::ImageLayout* residual,
                 std::vector<int8_t> weights);
  void prepare_epilogue(const Program& program, std::span<const int8_t> weights);
  void add_float_residual(const ConvBuffers& buffers) const;

  const Node* node_;
  ConvAttributes attributes_;
  ConvShape shape_;
  Value out_value_, residual_value_;
  int32_t zero_point_ = 0;  // of the input
  cpu::ImageLayout in_, out_, residual_;
  bool float_out_ = false, has_residual_ = false, stem_ = false;
  int panel_bits(bool resident) const { return resident ? 8 : bits_; }

  int bits_ = 8;
  ConvChoice choice_;
  double sparse_seconds_ = 0.0, dense_seconds_ = 0.0;  // 0: not measured by this process
  size_t packed_bytes_ = 0;
  std::vector<Piece> pieces_;
  std::optional<cpu::GroupedWeights> grouped_;
  AlignedBuffer scale_, bias_;  // padded to 64 channels
  AlignedBuffer correction_;    // likewise; grouped kernels only
  cpu::ConvEpilogue epilogue_;
};

/// Whether the node runs on the grouped kernels (which want no stride phases in their input).
bool runs_grouped(const Program& program, const Node& node);

}  // namespace adalayer::engine

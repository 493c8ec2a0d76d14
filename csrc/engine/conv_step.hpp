// A convolution node made ready for this machine.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/aligned_buffer.hpp"
#include "cpu/conv/algorithm.hpp"
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

/// The convolutions that a node is made of, for the active row of the kernel table: one, or those
/// of transposed_phases(). `own_input`: nobody else reads the input. `room`: ConvTask.
std::vector<cpu::ConvTask> conv_tasks(const Program& program, const Node& node, bool own_input,
                                      cpu::Room room);

/// How a convolution runs; every choice gives the same bits.
struct ConvChoice {
  bool resident = false;     // weights are unpacked to bytes once, at load
  bool other_order = false;  // of the loops over positions and columns
  int form = 0;              // ConvStep::forms(): 0 is what runs unless another one is faster
  bool operator==(const ConvChoice&) const = default;
};

/// Conv and ConvTranspose. A transposed convolution is up to stride_h * stride_w ordinary ones
/// whose outputs interleave; every other node is one.
class ConvStep {
 public:
  /// Layouts are null for float values.
  ConvStep(const Program& program, const Node& node, const cpu::ImageLayout& in,
           const cpu::ImageLayout* out, const cpu::ImageLayout* residual, bool own_input,
           cpu::Room room);

  /// The layer of `like`, which is settled, for another image size: with its choice and its weights
  /// in memory. Null where its weights lie otherwise for that size.
  static std::unique_ptr<ConvStep> at_size(const ConvStep& like, const Program& program,
                                           const Node& node, const cpu::ImageLayout& in,
                                           const cpu::ImageLayout* out,
                                           const cpu::ImageLayout* residual, bool own_input);

  /// Algorithms that these weights can have (of several in one, they may differ in bytes). Where
  /// weights may not expand, it is one: what surely wins without a clock, or is forced.
  int forms() const { return static_cast<int>(pieces_.front().forms.size()); }
  /// Bytes of what pack() writes; 0 where algorithms keep their weights themselves.
  int64_t panel_bytes(const ConvChoice& choice) const;
  /// Derives the weights of this machine in the form of a choice: panels into `panels` (64-byte
  /// aligned), which must live as long as this object uses that form.
  void pack(uint8_t* panels, const ConvChoice& choice);
  /// The choice stands: no choose() or pack() after this. Drops what only they need. `panels` holds
  /// what was packed for it.
  void settle(std::shared_ptr<const AlignedBuffer> panels);
  /// Of a layer that is settled, too: takes its weights where they are the same ones, so that they
  /// are in memory once. Whether it did.
  bool share(const ConvStep& like);
  /// Copies its weights out of a buffer that holds those of other layers, too.
  void unshare();

  void choose(const ConvChoice& choice) { choice_ = possible(choice); }
  const ConvChoice& choice() const { return choice_; }
  /// The same choice without what this convolution cannot do.
  ConvChoice possible(ConvChoice choice) const;
  /// What each form was measured to take, for why().
  void measured(std::vector<double> seconds) { seconds_ = std::move(seconds); }
  /// What the forms are: choices made between others may be bad ones here.
  uint64_t forms_key() const;

  /// Weights that part `part` reads, for the prefetch stream.
  cpu::WeightStream::Segment segment(cpu::Part part) const;
  int64_t max_parts() const;
  /// Decides how parts are cut when `threads` work on it.
  bool by_columns(int threads) const;
  void run(const ConvBuffers& buffers, cpu::Part part, bool by_columns, cpu::WeightStream* stream,
           int64_t segment) const;

  int bits() const { return bits_; }
  const ConvShape& shape() const { return shape_; }
  int64_t macs() const { return shape_.macs(); }
  size_t packed_bytes() const { return packed_bytes_; }
  size_t derived_bytes() const;
  /// Of the tables of this image size.
  size_t table_bytes() const;
  /// "avx2 panels, resident": the row of the kernel table, the algorithm and the form.
  std::string kernel() const;
  /// How zeros are used, and what that was measured to save; empty without zeros to speak of.
  std::string why() const;

 private:
  struct Form {
    cpu::ConvForm conv;
    const uint8_t* panels[2] = {};  // packed, resident
  };
  struct Piece {
    std::shared_ptr<const AlignedBuffer> correction;  // of this piece's taps
    cpu::ConvEpilogue epilogue;
    std::vector<int8_t> weights;  // until settle()
    std::vector<Form> forms;      // all pieces have the same algorithms
  };

  ConvStep(const ConvStep& like, const Program& program, const Node& node,
           const cpu::ImageLayout* residual);

  void add_piece(const cpu::ConvTask& task, const cpu::ConvLayouts& at,
                 std::vector<int8_t> weights);
  void add_phases(const Program& program, const std::vector<cpu::ConvTask>& tasks,
                  const cpu::ConvLayouts& at, std::span<const int8_t> weights);
  int sure_form() const;
  void keep_form(int form);
  std::shared_ptr<const AlignedBuffer> correction(std::span<const int8_t> weights) const;
  void prepare_epilogue(const Program& program, std::span<const int8_t> weights);
  void add_float_residual(const ConvBuffers& buffers) const;
  const Form& in_use(const Piece& piece) const { return piece.forms[choice_.form]; }
  int panel_bits(bool resident) const { return resident ? 8 : bits_; }

  const Node* node_;
  ConvAttributes attributes_;
  ConvShape shape_;
  Value out_value_, residual_value_;
  int32_t zero_point_ = 0;  // of the input
  cpu::ImageLayout residual_;
  bool float_out_ = false, has_residual_ = false;

  int bits_ = 8;
  ConvChoice choice_;
  std::vector<double> seconds_;  // [forms], or none: not measured by this process
  size_t packed_bytes_ = 0;
  std::vector<Piece> pieces_;
  std::shared_ptr<const AlignedBuffer> scale_, bias_;  // padded to 64 channels
  std::shared_ptr<const AlignedBuffer> panels_;        // what the form in use points into
  cpu::ConvEpilogue epilogue_;
};

}  // namespace adalayer::engine

// The ways to compute a convolution, behind one interface: single layers and the engine both ask
// the list below which of them suit, what those need of their input, and how much they will hold;
// then they plan, derive weights and run.
//
// A new algorithm is one file in conv/algorithms/, and its name in algorithm.cpp. Every algorithm
// gives the same bits.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cpu/conv/matmul.hpp"
#include "cpu/conv_epilogue.hpp"
#include "cpu/image/layout.hpp"
#include "cpu/kernel_table.hpp"
#include "reference/spec.hpp"

namespace adalayer::cpu {

/// What memory there is for a convolution beyond its weights as panels.
enum class Room : uint8_t {
  Least,    // none
  Scratch,  // of a thread, to make what it multiplies with in every call
  Several,  // weights may take several times those bytes, and be held in forms beside each other
            // until a clock has decided
};

/// A convolution to be computed somewhere: what algorithms are chosen by.
struct ConvTask {
  const KernelRow& kernels;
  ConvShape shape;         // of one image
  OutputMap map = {};      // where its outputs go
  int bits = 8;            // of the weights
  bool own_input = false;  // nobody else reads the input, which may be written in any form
  Room room = Room::Several;
  int qmax = 255;  // no level of the input is larger

  /// As wide as the weights of a product with all u8 levels that is no larger (kernel_table.hpp).
  int product_bits() const { return cpu::product_bits(kernels, bits, qmax); }
};

/// What an algorithm asks of the layout of an input that others may read, too.
struct LayoutNeeds {
  Padding padding;
  int64_t phases = 1, columns_multiple = 1, stride = 1;  // image_layout()
};

/// An input in a form that one algorithm alone understands.
class OwnInput {
 public:
  virtual ~OwnInput() = default;
  /// Part of the rows of one image (its tensor's first element at in.data), padding included.
  virtual void pack(const ActivationIn& in, uint8_t* image, Part part) const = 0;

  ImageLayout layout;
};

/// Where a convolution's tensors lie. `out` is null for a tensor, `residual` where there is none.
struct ConvLayouts {
  const ImageLayout& in;
  const ImageLayout* out = nullptr;
  const ImageLayout* residual = nullptr;
};

/// What is known without a clock about weights in a form that has to win against another one.
enum class Merit : uint8_t { Unknown, SurelyFaster, Forced };

/// What an algorithm knows of one layer's weights, apart from the bytes that PlannedConv::pack()
/// writes. It does not depend on the image's size. Algorithms derive from it.
struct ConvWeights {
  virtual ~ConvWeights() = default;
  /// Bytes that are kept here.
  virtual int64_t own_bytes() const { return 0; }
  /// What is particular about their form, behind the algorithm's name; may be empty.
  virtual std::string form() const { return {}; }
  /// "blocks: 25 % of the tiles": what the form saves, for people; empty if nothing is to be said.
  virtual std::string saving() const { return {}; }
  /// What measured times depend on apart from the task.
  virtual uint64_t key() const { return 0; }

  int variant = 0;  // of plans that fit these weights
  Merit merit = Merit::Unknown;
  bool widens = false;             // pack() may also write bytes instead of narrower weights
  bool for_few_positions = false;  // a batch may be slower, where one image is faster
  bool has_orders = true;          // ConvJob::other_order makes a difference
};

/// Where a planned convolution's data is during one call.
struct ConvJob {
  const ConvWeights& weights;
  const uint8_t* packed;  // PlannedConv::pack()
  int bits;               // with which they were packed
  const uint8_t* in;      // first image
  int64_t images;
  const int32_t* correction;  // [out channels] -zero_point * sum of the weights
  // Either an image (the epilogue has padded arrays and its own correction),
  const ConvEpilogue* epilogue = nullptr;
  uint8_t* out = nullptr;
  const uint8_t* residual = nullptr;
  // or a plain tensor of whole images, from `first_image` of it on.
  const OutputSpec* tensor = nullptr;
  int64_t first_image = 0;
  bool by_columns = false;   // parts are columns: prefers_columns()
  bool other_order = false;  // of the loops, than what the sizes suggest
  WeightStream* stream = nullptr;
  int64_t segment = 0;  // this convolution's in the stream
};

/// The tables of one task between certain layouts, for weights of one variant; immutable.
class PlannedConv {
 public:
  explicit PlannedConv(const ImageLayout& in) : in_(in) {}
  virtual ~PlannedConv() = default;
  const ImageLayout& in() const { return in_; }
  /// Bytes of the tables.
  virtual size_t bytes() const = 0;

  /// Bytes that pack() writes: weights [O][I/groups][KH][KW] with `bits` of memory each, which are
  /// the task's, or 8 if they widen. `packed` is 64-byte aligned.
  virtual int64_t packed_bytes(const ConvWeights& weights, int bits) const = 0;
  virtual void pack(const ConvWeights& weights, std::span<const int8_t> values, int bits,
                    uint8_t* packed) const = 0;
  /// Bytes [first, second) of them that a part by columns reads.
  virtual std::pair<int64_t, int64_t> weight_range(const ConvWeights& weights, int bits,
                                                   Part part) const = 0;

  /// Whether pack() of the other plan, of the same algorithm and layer but another image size,
  /// writes the same bytes.
  virtual bool packs_like(const PlannedConv&) const { return true; }

  /// Whether `threads` threads share columns rather than positions.
  virtual bool prefers_columns(const ConvWeights& weights, int bits, int threads) const = 0;
  /// Parts beyond which there is nothing to share.
  virtual int64_t most_parts(bool by_columns) const = 0;
  /// One part. The caller has called kernels.begin() on this thread.
  virtual void run(const ConvJob& job, Part part) const = 0;

 private:
  ImageLayout in_;
};

enum class Fit : uint8_t {
  No,
  ByTrial,  // where it is the fastest of its like, as a clock says; the first of them if none does
  Always,   // no other one is asked
};

class ConvAlgorithm {
 public:
  /// For coverage() and reports.
  virtual std::string name(const ConvShape& shape) const = 0;
  /// Not by the image's size or padding: weights are derived once for all sizes of a layer.
  virtual Fit fit(const ConvTask& task) const = 0;

  virtual LayoutNeeds needs(const ConvTask& task) const;
  /// The form of its input, where the task has its own and the algorithm always fits; or null.
  virtual std::shared_ptr<const OwnInput> own_input(const ConvTask& task) const;
  /// Whether images that are lists of pixels may be cut and joined at will (1x1 convolutions).
  virtual bool joins_images() const { return false; }

  /// No more than this is held for weights and tables, packed and widened, until a form is chosen.
  virtual double bytes(const ConvTask& task, const ImageLayout& in) const = 0;
  /// What a thread works in, whichever convolution it runs: one for all that ask for it.
  virtual double scratch_bytes(const ConvTask& task) const;

  /// Null where the algorithm is nothing for these weights [O][I/groups][KH][KW].
  virtual std::unique_ptr<ConvWeights> derive(const ConvTask& task, const ConvLayouts& at,
                                              std::span<const int8_t> values) const = 0;
  virtual std::unique_ptr<PlannedConv> plan(const ConvTask& task, const ConvLayouts& at,
                                            int variant) const = 0;

 protected:
  // Not virtual: those of the list are never destroyed, because threads may outlive main().
  ~ConvAlgorithm() = default;
};

/// The list.
std::span<const ConvAlgorithm* const> conv_algorithms();

/// Those of the list that may run a task, at least one.
std::vector<const ConvAlgorithm*> algorithms_for(const ConvTask& task);

/// One layer's weights with one algorithm.
struct ConvForm {
  const ConvAlgorithm* algorithm = nullptr;
  std::shared_ptr<ConvWeights> weights;  // sizes of one layer share them
  std::unique_ptr<PlannedConv> plan;
};

/// Without weights where the algorithm is nothing for them.
ConvForm make_form(const ConvAlgorithm& algorithm, const ConvTask& task, const ConvLayouts& at,
                   std::span<const int8_t> values);

}  // namespace adalayer::cpu

// From a program to launches. No CUDA call is made here: addresses come from the caller, and the
// tests run the launches on a machine in software.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/kernels.hpp"
#include "cuda/params.hpp"
#include "engine/program.hpp"

namespace adalayer::cuda {

/// What a plan needs to know of a device. The defaults are an H100's.
struct Machine {
  int multiprocessors = 132;
  int shared_bytes = 227 * 1024;  // that one block can have
  bool group_products = true;     // it has products of four warps, and the library kernels for them
};

/// Bytes of a pixel of `channels` levels.
constexpr int64_t device_pitch(int64_t channels) {
  return channels <= 4 ? 4 : channels <= 8 ? 8 : (channels + 15) / 16 * 16;
}

/// One kernel launch.
struct Launch {
  KernelInfo kernel;
  uint32_t grid[3] = {1, 1, 1};
  int32_t node = -1;    // of the program
  int32_t choice = -1;  // number of the convolution product whose Choice it follows
  std::string name;
  static constexpr size_t kMostParams = 512;
  size_t params_bytes = 0;
  alignas(16) uint8_t params[kMostParams] = {};

  /// A pointer in `params` to the memory of a program input or output, which every call brings.
  struct Port {
    size_t offset;
    bool is_output;
    int32_t number;
  };
  std::vector<Port> ports;
  // Of the Quantize kernel: whether the input lies as NHWC is known at the call, too.
  int32_t nhwc_input = -1;
  // Where ConvOutput lies in the parameters of a convolution whose result is a program output.
  int64_t output_at = -1;

  template <class P>
  void set_params(const P& p) {
    static_assert(std::is_trivially_copyable_v<P> && sizeof(P) <= kMostParams);
    params_bytes = sizeof(P);
    std::memcpy(params, &p, sizeof(P));
  }
};

/// How one product on tensor cores is cut up.
struct Choice {
  Tile tile = Tile::Mma128x128;
  int splits = 1;
  Form form = Form::Dense;
  bool operator==(const Choice&) const = default;
};

/// A product, for whoever wants to measure choices: what its speed depends on.
struct Product {
  int32_t node = -1;
  int bits = 8, piece = 16;
  int64_t channels = 0, positions = 0, groups = 1;
  int64_t steps = 0, depth = 0;
  // Form::Blocks: steps of the longest block of 64 channels and of all, and cells in them; 0: there
  // is no such form.
  int64_t longest_block = 0, block_steps = 0, stored_cells = 0;
  bool structured = false;  // there is a Form::Structured
};

/// Choices that this machine can run, the one that is expected to be fastest first.
std::vector<Choice> choices(const Product& product, const Machine& machine);

/// A program's constants as the kernels read them, in one block of memory that is copied to the
/// device as it is. Batch sizes do not matter here.
class Model {
 public:
  /// Validates the program. Throws InvalidArgument or CorruptData naming the node.
  Model(engine::Program program, const Machine& machine);
  ~Model();

  const engine::Program& program() const { return program_; }
  const Machine& machine() const { return machine_; }
  const std::vector<uint8_t>& image() const { return image_; }
  /// Bytes of the packed weights in the image.
  int64_t weight_bytes() const { return weight_bytes_; }

  struct Prepared;
  const Prepared& prepared() const { return *prepared_; }

  /// Batches beyond this are run in parts: offsets within a tensor are 32-bit.
  int64_t most_images() const { return most_images_; }

 private:
  engine::Program program_;
  Machine machine_;
  std::vector<uint8_t> image_;
  std::unique_ptr<Prepared> prepared_;
  int64_t weight_bytes_ = 0;
  int64_t most_images_ = 1;
};

/// Where things are. Null for a plan that is only asked for its sizes.
struct Bases {
  uint8_t* image = nullptr;
  uint8_t* arena = nullptr;
  uint8_t* scratch = nullptr;  // zeros
};

struct LaunchPlan {
  std::vector<Launch> launches;
  int64_t arena_bytes = 0, scratch_bytes = 0;
  std::vector<Product> products;
};

/// All launches for `batch` images (1 to most_images()). `chosen`: one per product, or empty for
/// the expected ones. Bytes of scratch stay below a limit; splits that need more are reduced.
LaunchPlan make_plan(const Model& model, int64_t batch, const Bases& bases,
                     const std::vector<Choice>& chosen = {});

}  // namespace adalayer::cuda

// A convolution as a product with panels of 16 x 64 tiles (matmul.hpp): what the algorithms whose
// weights are panels share.
#pragma once

#include <optional>

#include "cpu/conv/algorithm.hpp"
#include "cpu/conv/sparse_panels.hpp"

namespace adalayer::cpu {

struct PanelWeights final : ConvWeights {
  explicit PanelWeights(const ConvTask& task)
      : bits(task.bits), product_bits(task.product_bits()) {}

  std::optional<SparsePanels> sparse;  // of panels that leave zeros out

  const SparsePanels* sparse_or_null() const { return sparse ? &*sparse : nullptr; }
  int64_t own_bytes() const override { return sparse ? sparse->table_bytes() : 0; }
  std::string form() const override;
  std::string saving() const override { return text; }
  uint64_t key() const override;

  std::string text;
  int bits;          // of the weights
  int product_bits;  // ConvTask
};

class PanelConv : public PlannedConv {
 public:
  PanelConv(const ConvTask& task, const ImageLayout& in, ConvPlan plan);

  size_t bytes() const override;
  int64_t packed_bytes(const ConvWeights& weights, int bits) const override;
  void pack(const ConvWeights& weights, std::span<const int8_t> values, int bits,
            uint8_t* packed) const override;
  std::pair<int64_t, int64_t> weight_range(const ConvWeights& weights, int bits,
                                           Part part) const override;
  bool packs_like(const PlannedConv& other) const override;
  bool prefers_columns(const ConvWeights& weights, int bits, int threads) const override;
  int64_t most_parts(bool by_columns) const override;
  void run(const ConvJob& job, Part part) const override;

 private:
  const KernelRow& kernels_;
  int weight_bits_;
  ConvPlan plan_;
};

// Found by name because sparse panels read their input as dense ones do.
extern const ConvAlgorithm& kPanelsAlgorithm;

/// The tables of `shape`, which is the task's or stands for it.
ConvPlan plan_panels(const ConvTask& task, const ConvShape& shape, const ConvLayouts& at,
                     bool by_pixel = false);

/// Upper bounds of what dense panels of `shape` take.
struct PanelsBound {
  double weights;  // int8, until all panels are packed
  double packed;   // panels of the weights' width, and of bytes
  double tables;
  double column_tiles, tiles;

  double all() const { return weights + packed + tables; }
};
PanelsBound panels_bound(const ConvShape& shape, int bits, const ImageLayout& in);

}  // namespace adalayer::cpu

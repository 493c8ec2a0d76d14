// Depthwise and narrow grouped convolutions on kernels of their own.
#include "cpu/conv/grouped.hpp"

#include <algorithm>
#include <numeric>

#include "cpu/conv/algorithm.hpp"

namespace adalayer::cpu {
namespace {

// Sums of some rows on their way to a tensor.
constexpr int64_t kSumsBudget = 256 << 10;
constexpr int64_t kRowsAtOnce = 8;

struct GroupedConvWeights final : ConvWeights {
  explicit GroupedConvWeights(GroupedWeights w) : weights(std::move(w)) { has_orders = false; }
  int64_t own_bytes() const override { return static_cast<int64_t>(weights.data.size()); }

  GroupedWeights weights;
};

class GroupedConv final : public PlannedConv {
 public:
  GroupedConv(const ConvTask& task, const ConvLayouts& at)
      : PlannedConv(at.in),
        kernels_(task.kernels),
        shape_(task.shape),
        out_(at.out != nullptr ? *at.out : ImageLayout{}),
        residual_(at.residual != nullptr ? *at.residual : ImageLayout{}) {}

  size_t bytes() const override { return sizeof *this; }
  // Weights are small, and kept where they are derived.
  int64_t packed_bytes(const ConvWeights&, int) const override { return 0; }
  void pack(const ConvWeights&, std::span<const int8_t>, int, uint8_t*) const override {}
  std::pair<int64_t, int64_t> weight_range(const ConvWeights&, int, Part) const override {
    return {0, 0};
  }
  bool prefers_columns(const ConvWeights&, int, int) const override { return false; }
  int64_t most_parts(bool) const override { return shape_.out_h(); }

  void run(const ConvJob& job, Part part) const override {
    const GroupedWeights& weights = static_cast<const GroupedConvWeights&>(job.weights).weights;
    for (int64_t n = 0; n < job.images; ++n) {
      const ConstImageView image(&in(), job.in + n * in().image_bytes);
      if (job.tensor != nullptr) {
        store_rows(job, weights, image, n, part);
        continue;
      }
      const ConstImageView residual(
          &residual_, job.residual == nullptr ? nullptr : job.residual + n * residual_.image_bytes);
      run_grouped(shape_, weights, *job.epilogue, image, residual,
                  {&out_, job.out + n * out_.image_bytes}, part);
    }
  }

 private:
  /// Rows of image `n` of the job to its tensor.
  void store_rows(const ConvJob& job, const GroupedWeights& weights, ConstImageView image,
                  int64_t n, Part part) const {
    const ConvShape& s = shape_;
    const int64_t y_first = part.first(s.out_h()), y_last = part.last(s.out_h());
    const int64_t out_w = s.out_w(), area = s.out_h() * out_w, pitch = grouped_sums_pitch(s);
    if (y_first == y_last || out_w == 0) return;
    // Kernels take a few rows at a time, up to eight where channels are few.
    const int64_t fit = kSumsBudget / (out_w * pitch * 4) / kRowsAtOnce * kRowsAtOnce;
    const int64_t rows = std::min(std::max(fit, kRowsAtOnce), y_last - y_first);
    // They grow to the largest layer, so that a warm call allocates nothing.
    thread_local AlignedBuffer sums_of_rows, positions;
    auto* sums = grown<int32_t>(sums_of_rows, rows * out_w * pitch);
    auto* position = grown<int32_t>(positions, rows * out_w);
    std::iota(position, position + rows * out_w, 0);
    const bool interleaved = job.tensor->layout == Layout::NHWC;
    StoreArgs store{};
    store.sums = sums;
    store.sums_stride = pitch;
    store.position = position;
    store.cols = static_cast<int>(s.out_channels);
    store.correction = job.correction;
    store.out = job.tensor;
    store.position_stride = interleaved ? s.out_channels : 1;
    store.channel_stride = interleaved ? 1 : area;
    for (int64_t y = y_first; y < y_last; y += rows) {
      const int64_t end = std::min(y + rows, y_last);
      grouped_sums(s, weights, image, y, end, sums);
      store.rows = static_cast<int>((end - y) * out_w);
      store.first =
          (job.first_image + n) * area * s.out_channels + y * out_w * store.position_stride;
      kernels_.store(store);
    }
  }

  const KernelRow& kernels_;
  ConvShape shape_;
  ImageLayout out_, residual_;
};

class GroupedAlgorithm final : public ConvAlgorithm {
 public:
  std::string name(const ConvShape& shape) const override {
    return shape.depthwise() ? "depthwise" : "grouped";
  }
  Fit fit(const ConvTask& task) const override {
    const bool whole = task.map.image_h == 0;  // its outputs are all of the image
    return whole && grouped_suits(task.shape) ? Fit::Always : Fit::No;
  }

  double bytes(const ConvTask& task, const ImageLayout&) const override {
    return grouped_bytes(task.shape);
  }

  std::unique_ptr<ConvWeights> derive(const ConvTask& task, const ConvLayouts&,
                                      std::span<const int8_t> values) const override {
    return std::make_unique<GroupedConvWeights>(build_grouped(task.shape, values));
  }

  std::unique_ptr<PlannedConv> plan(const ConvTask& task, const ConvLayouts& at,
                                    int) const override {
    return std::make_unique<GroupedConv>(task, at);
  }
};

constinit const GroupedAlgorithm g_algorithm;

}  // namespace

constinit const ConvAlgorithm& kGroupedAlgorithm = g_algorithm;

}  // namespace adalayer::cpu

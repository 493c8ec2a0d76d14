// 3x3 convolutions of stride 1 with fewer products, by Winograd's method in whole numbers.
#include "cpu/conv/winograd.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/conv/algorithm.hpp"
#include "cpu/conv/policy.hpp"

namespace adalayer::cpu {
namespace {

// Share of the direct product's products that is worth a trial: the transforms take time as well.
constexpr double kWorthATrial = 0.75;
// With so few channels they take most of it.
constexpr int64_t kLeastChannels = 8;
// Up to so many outputs F(2x2) is tried beside F(4x4): its tiles fit small maps better, and its
// taps are less than half the bytes.
constexpr int64_t kSmallMap = 14 * 14;

struct WinogradConvWeights final : ConvWeights {
  std::string form() const override { return taps.describe(); }
  uint64_t key() const override { return 1 + static_cast<uint64_t>(taps.narrow); }

  WinogradTaps taps;
};

const WinogradTaps& taps_of(const ConvWeights& weights) {
  return static_cast<const WinogradConvWeights&>(weights).taps;
}

class WinogradConv final : public PlannedConv {
 public:
  WinogradConv(const ConvTask& task, const ImageLayout& in, WinogradPlan plan)
      : PlannedConv(in), row_(task.kernels), plan_(std::move(plan)) {}

  size_t bytes() const override {
    return sizeof *this +
           (plan_.in_row.size() + plan_.out_offset.size() + plan_.residual_offset.size()) * 4;
  }

  int64_t packed_bytes(const ConvWeights& weights, int) const override {
    return taps_of(weights).bytes();
  }
  void pack(const ConvWeights& weights, std::span<const int8_t> values, int,
            uint8_t* packed) const override {
    pack_winograd_taps(taps_of(weights), values, packed);
  }
  std::pair<int64_t, int64_t> weight_range(const ConvWeights& weights, int,
                                           Part part) const override {
    return winograd_weight_range(taps_of(weights), *row_.winograd, part);
  }

  bool prefers_columns(const ConvWeights& weights, int, int threads) const override {
    return winograd_prefers_columns(plan_, taps_of(weights), 1, threads);
  }
  int64_t most_parts(bool by_columns) const override {
    const WinogradKernels& kernels = *row_.winograd;
    const int64_t width = int64_t{kernels.groups} * kWinogradGroup;
    return by_columns ? (plan_.shape.out_channels + width - 1) / width
                      : (plan_.tiles() + kernels.rows - 1) / kernels.rows;
  }

  void run(const ConvJob& job, Part part) const override {
    // Grows to the largest layer, so that a warm call allocates nothing.
    thread_local AlignedBuffer scratch;
    uint8_t* space = grown<uint8_t>(scratch, winograd_scratch_bytes(plan_, *row_.winograd));
    const WinogradCall call{.plan = plan_,
                            .taps = taps_of(job.weights),
                            .data = job.packed,
                            .epilogue = job.epilogue,
                            .in = job.in,
                            .images = job.images,
                            .out = job.out,
                            .residual = job.residual,
                            .by_columns = job.by_columns};
    if (job.tensor == nullptr)
      run_winograd(call, *row_.winograd, row_, space, part);
    else
      run_winograd({call, *job.tensor, job.correction, job.first_image}, *row_.winograd, row_,
                   space, part);
  }

 private:
  const KernelRow& row_;
  WinogradPlan plan_;
};

/// Products per pair of channels, of one image.
double products(WinogradForm form, const ConvShape& s) {
  const reference::WinogradAxis& axis = reference::winograd_axis(form);
  const auto tiles = [&](int64_t n) {
    return static_cast<double>((std::max<int64_t>(n, 0) + axis.tile - 1) / axis.tile);
  };
  return tiles(s.out_h()) * tiles(s.out_w()) * axis.taps * axis.taps;
}

bool saves_products(WinogradForm form, const ConvShape& s) {
  return products(form, s) <=
         kWorthATrial * 9.0 * static_cast<double>(s.out_h()) * static_cast<double>(s.out_w());
}

/// Whether the form, which is exact, may be the fastest one.
bool worth_a_trial(WinogradForm form, const ConvTask& task, std::span<const int8_t> values) {
  const ConvShape& s = task.shape;
  if (std::min(s.in_channels, s.out_channels) < kLeastChannels || !saves_products(form, s))
    return false;
  if (form == WinogradForm::F4x4) return true;
  return s.out_h() * s.out_w() <= kSmallMap || !saves_products(WinogradForm::F4x4, s) ||
         !reference::winograd_exact(WinogradForm::F4x4, values, s.out_channels, task.qmax);
}

class WinogradAlgorithm final : public ConvAlgorithm {
 public:
  constexpr WinogradAlgorithm(WinogradForm form, WinogradPolicy forced)
      : form_(form), forced_(forced) {}

  std::string name(const ConvShape&) const override {
    return form_ == WinogradForm::F4x4 ? "winograd 4x4" : "winograd 2x2";
  }
  Fit fit(const ConvTask& task) const override {
    const bool whole = task.map.image_h == 0;  // its outputs are all of the image
    return whole && task.may_expand && winograd_policy() != WinogradPolicy::Off &&
                   reference::winograd_suits(task.shape)
               ? Fit::ByTrial
               : Fit::No;
  }

  double bytes(const ConvTask& task, const ImageLayout&) const override {
    const ConvShape& s = task.shape;
    const double tile = reference::winograd_axis(form_).tile;
    const auto padded = [&](int64_t n) { return std::max(static_cast<double>(n), 0.0) + tile; };
    // Offsets of an output and a residual for every output of the tiles, and of the rows; what a
    // thread works in.
    const WinogradPlan blocks = plan_winograd_blocks(form_, s, *task.kernels.winograd);
    return static_cast<double>(winograd_most_bytes(form_, s, task.bits)) +
           8.0 * padded(s.out_h()) * padded(s.out_w()) + 4.0 * (padded(s.out_h()) + 2.0) +
           static_cast<double>(winograd_scratch_bytes(blocks, *task.kernels.winograd));
  }

  std::unique_ptr<ConvWeights> derive(const ConvTask& task, const ConvLayouts&,
                                      std::span<const int8_t> values) const override {
    const WinogradPolicy policy = winograd_policy();
    const bool forced = policy == forced_;
    if (policy != WinogradPolicy::Auto && !forced) return nullptr;
    if (!reference::winograd_exact(form_, values, task.shape.out_channels, task.qmax))
      return nullptr;
    if (!forced && !worth_a_trial(form_, task, values)) return nullptr;
    auto weights = std::make_unique<WinogradConvWeights>();
    weights->taps = plan_winograd_taps(form_, task.shape, values, task.qmax);
    weights->has_orders = false;
    if (forced) weights->merit = Merit::Forced;
    return weights;
  }

  std::unique_ptr<PlannedConv> plan(const ConvTask& task, const ConvLayouts& at,
                                    int) const override {
    return std::make_unique<WinogradConv>(
        task, at.in,
        plan_winograd(form_, task.shape, at.in, at.out, at.residual, *task.kernels.winograd));
  }

 private:
  WinogradForm form_;
  WinogradPolicy forced_;
};

constinit const WinogradAlgorithm g_4x4(WinogradForm::F4x4, WinogradPolicy::F4x4);
constinit const WinogradAlgorithm g_2x2(WinogradForm::F2x2, WinogradPolicy::F2x2);

}  // namespace

constinit const ConvAlgorithm& kWinograd4x4Algorithm = g_4x4;
constinit const ConvAlgorithm& kWinograd2x2Algorithm = g_2x2;

}  // namespace adalayer::cpu

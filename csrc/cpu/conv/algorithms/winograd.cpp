// 3x3 convolutions of stride 1 with fewer products, by Winograd's method in whole numbers: with
// taps that are kept, or that every call makes from packed weights.
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
// Taps are worth making in the call where up to so many tiles use them, and they are so many bytes
// that reading them is what takes the time.
constexpr int64_t kFewTiles = 64, kManyBytes = 512 << 10;
// Making a tap takes as long as about so many products.
constexpr double kMaking = 4.0;
// Estimated share of the direct product's time that needs no clock.
constexpr double kSurely = 0.65;

struct WinogradConvWeights final : ConvWeights {
  std::string form() const override { return taps.describe(); }
  uint64_t key() const override {
    return 1 + static_cast<uint64_t>(taps.narrow) + (taps.in_bytes() ? 64 : 0);
  }

  WinogradTaps taps;
};

/// Where taps come from.
enum class Taps { Kept, Made };

const WinogradTaps& taps_of(const ConvWeights& weights) {
  return static_cast<const WinogradConvWeights&>(weights).taps;
}

class WinogradConv final : public PlannedConv {
 public:
  WinogradConv(const ConvTask& task, const ImageLayout& in, WinogradPlan plan, Taps from)
      : PlannedConv(in), row_(task.kernels), plan_(std::move(plan)), from_(from) {}

  size_t bytes() const override {
    return sizeof *this +
           (plan_.in_row.size() + plan_.out_offset.size() + plan_.residual_offset.size()) * 4;
  }

  int64_t packed_bytes(const ConvWeights& weights, int bits) const override {
    return taps_of(weights).groups() * group_bytes(weights, bits);
  }
  void pack(const ConvWeights& weights, std::span<const int8_t> values, int bits,
            uint8_t* packed) const override {
    if (from_ == Taps::Kept)
      pack_winograd_taps(taps_of(weights), values, packed);
    else
      pack_winograd_weights(taps_of(weights), values, bits, packed);
  }
  std::pair<int64_t, int64_t> weight_range(const ConvWeights& weights, int bits,
                                           Part part) const override {
    return winograd_weight_range(taps_of(weights), group_bytes(weights, bits), *row_.winograd,
                                 part);
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
    const int64_t made = from_ == Taps::Made ? taps_of(job.weights).group_bytes : 0;
    uint8_t* space = grown<uint8_t>(scratch, winograd_scratch_bytes(plan_, *row_.winograd, made));
    const WinogradCall call{.plan = plan_,
                            .taps = taps_of(job.weights),
                            .data = job.packed,
                            .packed_bits = from_ == Taps::Made ? job.bits : 0,
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
  int64_t group_bytes(const ConvWeights& weights, int bits) const {
    const WinogradTaps& taps = taps_of(weights);
    return from_ == Taps::Kept ? taps.group_bytes : winograd_packed_group_bytes(taps, bits);
  }

  const KernelRow& row_;
  WinogradPlan plan_;
  Taps from_;
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

bool worth_a_trial(WinogradForm form, const ConvShape& s) {
  return std::min(s.in_channels, s.out_channels) >= kLeastChannels && saves_products(form, s);
}

/// Whether the form, which is exact, may be faster than F(4x4) with the same kind of products.
bool worth_beside_4x4(WinogradForm form, const ConvTask& task, std::span<const int8_t> values) {
  const ConvShape& s = task.shape;
  if (form == WinogradForm::F4x4) return true;
  return s.out_h() * s.out_w() <= kSmallMap || !saves_products(WinogradForm::F4x4, s) ||
         !reference::winograd_exact(WinogradForm::F4x4, values, s.out_channels, task.qmax);
}

/// The row's kernels for products of bytes, where the form and the levels allow them, or null.
const WinogradByteKernels* byte_kernels(WinogradForm form, const ConvTask& task) {
  const bool fits = form == WinogradForm::F2x2 && task.qmax <= reference::kMostWinogradByteLevel;
  return fits ? task.kernels.winograd_bytes : nullptr;
}

/// Whether making the taps in every call is surely faster than the direct product, which has at
/// best several times the products per instruction, unless they are of bytes here, too (`bytes`).
bool surely_faster(const ConvTask& task, WinogradForm form, const WinogradByteKernels* bytes) {
  if (task.kernels.positions == Positions::Flattened) return false;
  const ConvShape& s = task.shape;
  const WinogradPlan plan = plan_winograd_blocks(form, s, *task.kernels.winograd, bytes);
  const auto tiles = static_cast<double>(plan.tiles());
  const double blocks = std::ceil(tiles / plan.block);
  const bool by_pairs = task.product_bits() >= 7 && task.kernels.arrangement != nullptr;
  const double direct = 9.0 * static_cast<double>(s.out_h()) * static_cast<double>(s.out_w()) /
                        (bytes != nullptr ? 1.0
                         : by_pairs       ? 1.5
                                          : task.kernels.direct_products);
  return plan.area * (tiles + kMaking * blocks) <= kSurely * direct;
}

class WinogradAlgorithm final : public ConvAlgorithm {
 public:
  constexpr WinogradAlgorithm(WinogradForm form, WinogradPolicy forced, Taps from)
      : form_(form),
        forced_(forced),
        from_(from),
        least_(from == Taps::Kept ? Room::Several : Room::Scratch) {}

  std::string name(const ConvShape&) const override {
    const std::string name = form_ == WinogradForm::F4x4 ? "winograd 4x4" : "winograd 2x2";
    return from_ == Taps::Kept ? name : name + " from packed weights";
  }
  Fit fit(const ConvTask& task) const override {
    const bool whole = task.map.image_h == 0;  // its outputs are all of the image
    return whole && task.room >= least_ && winograd_policy() != WinogradPolicy::Off &&
                   reference::winograd_suits(task.shape)
               ? Fit::ByTrial
               : Fit::No;
  }

  double bytes(const ConvTask& task, const ImageLayout&) const override {
    const ConvShape& s = task.shape;
    const double tile = reference::winograd_axis(form_).tile;
    const auto padded = [&](int64_t n) { return std::max(static_cast<double>(n), 0.0) + tile; };
    const WinogradByteKernels* by = byte_kernels(form_, task);
    const auto taps = static_cast<double>(winograd_most_bytes(form_, s, task.bits, by));
    const int64_t channels = s.in_channels + (by == nullptr ? 2 : by->cell) - 1;
    const double groups = std::ceil(static_cast<double>(s.out_channels) / kWinogradGroup);
    // Packed weights take the place of panels where forms may not stand beside each other.
    const double tiles = (9.0 * static_cast<double>(channels) * kWinogradGroup) / 1024 + 1;
    const double packed = task.room == Room::Several ? groups * tiles * 128.0 * task.bits : 0.0;
    // Offsets of an output and a residual for every output of the tiles, and of the rows.
    return (from_ == Taps::Made ? packed : taps) + 8.0 * padded(s.out_h()) * padded(s.out_w()) +
           4.0 * (padded(s.out_h()) + 2.0);
  }

  double scratch_bytes(const ConvTask& task) const override {
    const ConvShape& s = task.shape;
    const WinogradKernels& kernels = *task.kernels.winograd;
    const WinogradByteKernels* bytes = byte_kernels(form_, task);
    const int64_t groups = (s.out_channels + kWinogradGroup - 1) / kWinogradGroup;
    const int64_t made = from_ == Taps::Kept || groups == 0
                             ? 0
                             : winograd_most_bytes(form_, s, task.bits, bytes) / groups;
    const auto needed = [&](const WinogradByteKernels* by) {
      return winograd_scratch_bytes(plan_winograd_blocks(form_, s, kernels, by), kernels, made);
    };
    return static_cast<double>(std::max(needed(nullptr), needed(bytes)));
  }

  std::unique_ptr<ConvWeights> derive(const ConvTask& task, const ConvLayouts&,
                                      std::span<const int8_t> values) const override {
    const WinogradPolicy policy = winograd_policy();
    // What is forced has its taps kept, if there may be.
    const bool forced = policy == forced_ && (task.room == Room::Several) == (from_ == Taps::Kept);
    if (policy != WinogradPolicy::Auto && !forced) return nullptr;
    if (!reference::winograd_exact(form_, values, task.shape.out_channels, task.qmax))
      return nullptr;
    if (!forced && !worth_a_trial(form_, task.shape)) return nullptr;
    const WinogradByteKernels* bytes = byte_kernels(form_, task);
    const bool worth = forced || worth_beside_4x4(form_, task, values);
    if (!worth && bytes == nullptr) return nullptr;
    const bool has_to_be_sure = from_ == Taps::Made && !forced && task.room == Room::Scratch;
    if (has_to_be_sure && !surely_faster(task, form_, bytes)) return nullptr;
    auto weights = std::make_unique<WinogradConvWeights>();
    weights->taps = plan_winograd_taps(form_, task.shape, values, task.qmax, bytes);
    weights->variant = weights->taps.in_bytes() ? 1 : 0;
    // What has been asked of products of bytes is asked again of others.
    if (bytes != nullptr && !weights->taps.in_bytes() &&
        (!worth || (has_to_be_sure && !surely_faster(task, form_, nullptr))))
      return nullptr;
    if (has_to_be_sure) weights->merit = Merit::SurelyFaster;
    if (from_ == Taps::Made && !forced && task.room == Room::Several &&
        !worth_making(task, weights->taps))
      return nullptr;
    weights->has_orders = false;
    if (forced) weights->merit = Merit::Forced;
    return weights;
  }

  std::unique_ptr<PlannedConv> plan(const ConvTask& task, const ConvLayouts& at,
                                    int variant) const override {
    return std::make_unique<WinogradConv>(
        task, at.in,
        plan_winograd(form_, task.shape, at.in, at.out, at.residual, *task.kernels.winograd,
                      variant == 1 ? task.kernels.winograd_bytes : nullptr),
        from_);
  }

 private:
  /// Beside taps that are kept.
  static bool worth_making(const ConvTask& task, const WinogradTaps& taps) {
    return taps.bytes() >= kManyBytes &&
           plan_winograd_blocks(taps.form, task.shape, *task.kernels.winograd).tiles() <= kFewTiles;
  }

  WinogradForm form_;
  WinogradPolicy forced_;
  Taps from_;
  Room least_;
};

constinit const WinogradAlgorithm g_4x4(WinogradForm::F4x4, WinogradPolicy::F4x4, Taps::Kept);
constinit const WinogradAlgorithm g_2x2(WinogradForm::F2x2, WinogradPolicy::F2x2, Taps::Kept);
constinit const WinogradAlgorithm g_made_4x4(WinogradForm::F4x4, WinogradPolicy::F4x4, Taps::Made);
constinit const WinogradAlgorithm g_made_2x2(WinogradForm::F2x2, WinogradPolicy::F2x2, Taps::Made);

}  // namespace

constinit const ConvAlgorithm& kWinograd4x4Algorithm = g_4x4;
constinit const ConvAlgorithm& kWinograd2x2Algorithm = g_2x2;
constinit const ConvAlgorithm& kMadeWinograd4x4Algorithm = g_made_4x4;
constinit const ConvAlgorithm& kMadeWinograd2x2Algorithm = g_made_2x2;

}  // namespace adalayer::cpu

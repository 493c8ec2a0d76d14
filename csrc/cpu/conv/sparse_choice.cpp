#include "cpu/conv/sparse_choice.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/status.hpp"

namespace adalayer::cpu {
namespace {

// Zeros must leave this much at most of the work, or of the bytes, before the clock is asked,
constexpr double kWorthATrial = 0.95;
// and win by this much: measurements of microseconds scatter, and dense panels have no tables.
constexpr double kClearly = 0.97;
// Weights beyond this size come from memory when their layer's turn comes again.
constexpr int64_t kStaysCached = 4 << 20;
constexpr double kSurely = 0.7;  // of the products: no clock is needed
constexpr int kTurns = 9;
constexpr double kShortest = 20e-6;  // seconds of one measurement
constexpr int64_t kManyImages = 8;   // a batch that no longer is a matrix times a few vectors

constexpr std::array<std::string_view, 4> kPolicies = {"auto", "dense", "blocks", "bitmask"};
std::atomic<int> g_policy{-1};

int policy_named(std::string_view name) {
  for (size_t i = 0; i < kPolicies.size(); ++i)
    if (kPolicies[i] == name) return static_cast<int>(i);
  throw InvalidArgument("sparse policy: expected auto, dense, blocks or bitmask, got '" +
                        std::string(name) + "'");
}

void evict([[maybe_unused]] const uint8_t* bytes, [[maybe_unused]] int64_t count) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < count; i += 64)
    _mm_clflush(bytes + i);
  _mm_mfence();
#endif
}

/// One form of the panels, ready to run.
struct Candidate {
  const ConvPlan* plan;
  const SparsePanels* sparse;  // or null
  AlignedBuffer panels;
  double seconds = INFINITY;
};

/// A layer with a batch of levels, of which the values do not matter.
class Trial {
 public:
  Trial(const ConvPlan& plan, int bits, const KernelRow& kernels, const ImageLayout& in,
        int64_t images)
      : bits_(bits),
        kernels_(kernels),
        images_(images),
        in_(zeros(images * in.image_bytes + in.slack)),
        out_(zeros(images * plan.shape.out_channels * plan.out_area * 4)),
        constants_(zeros(epilogue_size(plan.shape.out_channels) * 4)) {
    tensor_.data = out_.data();
    tensor_.dtype = DType::F32;
    tensor_.layout = Layout::NHWC;
    tensor_.scale = tensor_.bias = constants_.as<float>();
  }

  void run(const Candidate& candidate) {
    const ConvCall call{.plan = *candidate.plan,
                        .weights = candidate.panels.data(),
                        .bits = bits_,
                        .weight_bits = bits_,
                        .epilogue = nullptr,
                        .in = in_.data(),
                        .images = images_,
                        .out = nullptr,
                        .residual = nullptr,
                        .by_columns = false,
                        .other_order = false,
                        .stream = nullptr,
                        .segment = 0,
                        .sparse = candidate.sparse};
    kernels_.begin();
    run_conv({call, tensor_, constants_.as<int32_t>()}, kernels_, {});
    kernels_.end();
  }

 private:
  static AlignedBuffer zeros(int64_t bytes) {
    AlignedBuffer buffer(static_cast<size_t>(bytes));
    buffer.clear();
    return buffer;
  }

  int bits_;
  const KernelRow& kernels_;
  int64_t images_;
  AlignedBuffer in_, out_, constants_;
  OutputSpec tensor_;
};

/// Least seconds of each candidate over some turns.
void race(Trial& trial, std::span<Candidate> candidates) {
  using Clock = std::chrono::steady_clock;
  const auto timed = [&](const Candidate& candidate, int calls) {
    const auto start = Clock::now();
    for (int i = 0; i < calls; ++i)
      trial.run(candidate);
    return std::chrono::duration<double>(Clock::now() - start).count() / calls;
  };
  int64_t largest = 0;
  for (const Candidate& c : candidates)
    largest = std::max(largest, static_cast<int64_t>(c.panels.size()));
  const bool cold = largest > kStaysCached;
  trial.run(candidates[0]);
  const double once = std::max(timed(candidates[0], 1), 1e-7);
  const int calls = cold ? 1 : static_cast<int>(std::clamp(kShortest / once, 1.0, 100.0));
  for (Candidate& c : candidates)
    c.seconds = INFINITY;
  for (int turn = 0; turn < kTurns; ++turn)
    for (Candidate& c : candidates) {
      if (cold)
        evict(c.panels.data(), static_cast<int64_t>(c.panels.size()));
      else
        trial.run(c);
      c.seconds = std::min(c.seconds, timed(c, calls));
    }
}

std::string percent(double share) { return std::to_string(std::lround(100.0 * share)) + " %"; }

/// Blocks, by whole kernel rows or by pixels: fewer products win.
SparseForm with_blocks(const std::function<ConvPlan(bool)>& plan_of, const ConvPlan& dense,
                       std::span<const int8_t> weights) {
  SparseForm best{dense, false, plan_blocks(dense, weights)};
  if (dense.shape.kernel_w == 1) return best;  // a kernel row is a pixel
  SparseForm other{plan_of(true), true, {}};
  other.panels = plan_blocks(other.plan, weights);
  return other.panels.products < best.panels.products ? std::move(other) : std::move(best);
}

double share_of_products(const SparseForm& form, const ConvPlan& dense) {
  return static_cast<double>(form.panels.products) /
         static_cast<double>(std::max<int64_t>(1, dense_products(dense)));
}

}  // namespace

SparsePolicy sparse_policy() {
  int policy = g_policy.load(std::memory_order_relaxed);
  if (policy < 0) {
    const char* name = std::getenv("ADALAYER_SPARSE");
    policy = name == nullptr || *name == '\0' ? 0 : policy_named(name);
    g_policy.store(policy, std::memory_order_relaxed);
  }
  return static_cast<SparsePolicy>(policy);
}

void set_sparse_policy(std::string_view name) {
  g_policy.store(policy_named(name), std::memory_order_relaxed);
}

std::optional<SparseForm> plan_sparse(const std::function<ConvPlan(bool by_pixel)>& plan_of,
                                      const ConvPlan& dense, std::span<const int8_t> weights,
                                      int bits, const KernelRow& kernels) {
  const SparsePolicy policy = sparse_policy();
  if (policy == SparsePolicy::Dense || weights.empty() || dense.runs.empty()) return std::nullopt;
  const auto with_bitmask = [&]() -> SparseForm {
    return {dense, false, plan_bitmask(dense, weights, bits)};
  };
  const bool has_bitmask = bitmask_kernels(kernels).expand != nullptr;
  if (policy == SparsePolicy::Blocks) return with_blocks(plan_of, dense, weights);
  if (policy == SparsePolicy::Bitmask)
    return has_bitmask ? std::optional(with_bitmask()) : std::nullopt;
  const auto zeros = static_cast<double>(std::count(weights.begin(), weights.end(), int8_t{0}));
  if (zeros < (1.0 - kWorthATrial) * static_cast<double>(weights.size())) return std::nullopt;
  SparseForm form = with_blocks(plan_of, dense, weights);
  if (share_of_products(form, dense) <= kWorthATrial) return form;
  // Expanding pays where each weight is used once, and the bytes are what takes the time.
  const bool few = dense.runs.size() == 1 && dense.runs.front().positions <= kGemvRows;
  if (!few || !has_bitmask) return std::nullopt;
  form = with_bitmask();
  if (static_cast<double>(form.panels.bytes(bits)) >
      kWorthATrial * static_cast<double>(dense.packed_bytes(bits)))
    return std::nullopt;
  return form;
}

bool surely_faster(const SparseForm& form, const ConvPlan& dense) {
  return sparse_is_forced() ||
         (form.panels.kind == Panels::Blocks && share_of_products(form, dense) <= kSurely);
}

std::string describe(const SparseForm& form, const ConvPlan& dense, int bits) {
  const SparsePanels& p = form.panels;
  if (p.kind == Panels::Bitmask)
    return "bitmask: " +
           percent(static_cast<double>(p.bytes(bits)) /
                   static_cast<double>(std::max<int64_t>(1, dense.packed_bytes(bits)))) +
           " of the dense bytes";
  return "blocks: " +
         percent(static_cast<double>(p.stored_tiles) /
                 static_cast<double>(std::max<int64_t>(1, p.tiles))) +
         " of the tiles";
}

bool sparse_wins(const SparseForm& form, const ConvPlan& dense, std::span<const int8_t> weights,
                 int bits, const KernelRow& kernels, const ImageLayout& in) {
  if (sparse_is_forced()) return true;
  // At least some bytes: the address of none may be null.
  const auto buffer = [](int64_t bytes) {
    return AlignedBuffer(static_cast<size_t>(std::max<int64_t>(64, bytes)));
  };
  Candidate candidates[2] = {{&dense, nullptr, buffer(dense.packed_bytes(bits))},
                             {&form.plan, &form.panels, buffer(form.panels.bytes(bits))}};
  pack_panels(dense, weights, bits, candidates[0].panels.data());
  pack_sparse(form.plan, form.panels, weights, bits, candidates[1].panels.data());
  const auto ratio = [&](int64_t images) {
    Trial trial(dense, bits, kernels, in, images);
    race(trial, candidates);
    return candidates[1].seconds / candidates[0].seconds;
  };
  if (ratio(1) > kClearly) return false;
  // A bitmask is slower to read where it is not memory that one waits for.
  return form.panels.kind == Panels::Blocks || ratio(kManyImages) < 1.0 / kClearly;
}

}  // namespace adalayer::cpu

#include "cpu/conv/trial.hpp"

#include <algorithm>
#include <chrono>
#include <vector>

#include "core/median.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace adalayer::cpu {
namespace {

// A form must win by this much: measurements of microseconds scatter, and the first one is the
// simplest.
constexpr double kClearly = 0.97;
// Weights beyond this size come from memory when their layer's turn comes again.
constexpr int64_t kStaysCached = 4 << 20;
constexpr int kMostTurns = 9, kLeastTurns = 2;
// Seconds: of all turns, if the least ones take no longer; of one measurement; of a call that is
// long enough to need none before it.
constexpr double kMostSeconds = 0.1, kShortest = 20e-6, kWarmsItself = 5e-3;
constexpr int64_t kManyImages = 8;  // a batch that no longer is a matrix times a few vectors

void evict([[maybe_unused]] const uint8_t* bytes, [[maybe_unused]] int64_t count) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < count; i += 64)
    _mm_clflush(bytes + i);
  _mm_mfence();
#elif defined(__aarch64__) && defined(__linux__)
  // Linux lets programs do this. The register says the shortest line of all caches, in words of 4
  // bytes.
  uint64_t type = 0;
  __asm__("mrs %0, ctr_el0" : "=r"(type));
  const int64_t line = int64_t{4} << (type >> 16 & 15);
  for (int64_t i = 0; i < count; i += line)
    __asm__ volatile("dc civac, %0" ::"r"(bytes + i) : "memory");
  __asm__ volatile("dsb ish" ::: "memory");
#endif
}

/// A layer with a batch of levels, of which the values do not matter.
class Trial {
 public:
  Trial(const ConvTask& task, std::span<const PackedForm> forms, int64_t images)
      : task_(task), images_(images) {
    int64_t in = 0;
    for (const PackedForm& f : forms)
      in = std::max(in, images * f.form.plan->in().image_bytes + f.form.plan->in().slack);
    const ConvShape& s = task.shape;
    in_ = zeros(in);
    out_ = zeros(images * s.out_channels * s.out_h() * s.out_w() * 4);
    constants_ = zeros(epilogue_size(s.out_channels) * 4);
    tensor_.data = out_.data();
    tensor_.dtype = DType::F32;
    tensor_.layout = Layout::NHWC;
    tensor_.scale = tensor_.bias = constants_.as<float>();
  }

  void run(const PackedForm& f) {
    const KernelScope scope(&task_.kernels);
    f.form.plan->run({.weights = *f.form.weights,
                      .packed = f.packed.data(),
                      .bits = task_.bits,
                      .in = in_.data(),
                      .images = images_,
                      .correction = constants_.as<int32_t>(),
                      .tensor = &tensor_},
                     {});
  }

 private:
  static AlignedBuffer zeros(int64_t bytes) {
    AlignedBuffer buffer(static_cast<size_t>(bytes));
    buffer.clear();
    return buffer;
  }

  const ConvTask& task_;
  int64_t images_;
  AlignedBuffer in_, out_, constants_;
  OutputSpec tensor_;
};

/// Times of each form beside those of the first one in the same turn, because a core changes its
/// speed meanwhile; the median of some turns, with a batch.
void race(const ConvTask& task, std::span<PackedForm> forms, int64_t images) {
  using Clock = std::chrono::steady_clock;
  Trial trial(task, forms, images);
  const auto timed = [&](const PackedForm& f, int calls) {
    const auto start = Clock::now();
    for (int i = 0; i < calls; ++i)
      trial.run(f);
    return std::chrono::duration<double>(Clock::now() - start).count() / calls;
  };
  int64_t largest = 0;
  for (const PackedForm& f : forms)
    largest = std::max(largest, static_cast<int64_t>(f.packed.size()));
  const bool cold = largest > kStaysCached;
  trial.run(forms[0]);
  const double once = std::max(timed(forms[0], 1), 1e-7);
  const bool warm = !cold && once < kWarmsItself;
  const int calls = cold ? 1 : static_cast<int>(std::clamp(kShortest / once, 1.0, 100.0));
  std::vector<std::vector<double>> times(forms.size());
  const auto start = Clock::now();
  int turns = 0;
  do {
    double first = 0.0;
    for (size_t k = 0; k < forms.size(); ++k) {
      const PackedForm& f = forms[k];
      if (cold) evict(f.packed.data(), static_cast<int64_t>(f.packed.size()));
      if (warm) trial.run(f);
      const double seconds = std::max(timed(f, calls), 1e-9);
      if (k == 0) first = seconds;
      times[k].push_back(seconds / first);
    }
  } while (another_turn(++turns, std::chrono::duration<double>(Clock::now() - start).count()));
  for (size_t k = 0; k < forms.size(); ++k)
    forms[k].time = median(times[k]);
}

}  // namespace

bool another_turn(int turns, double seconds) {
  return turns < kLeastTurns || (turns < kMostTurns && seconds < kMostSeconds);
}

PackedForm fastest_form(const ConvTask& task, std::vector<ConvForm> forms,
                        std::span<const int8_t> values) {
  const auto forced = std::find_if(forms.begin(), forms.end(), [](const ConvForm& f) {
    return f.weights->merit == Merit::Forced;
  });
  std::vector<PackedForm> packed;
  for (ConvForm& form : forms) {
    if (forced != forms.end() && &form != &*forced) continue;
    AlignedBuffer buffer(static_cast<size_t>(form.plan->packed_bytes(*form.weights, task.bits)));
    form.plan->pack(*form.weights, values, task.bits, buffer.data());
    packed.push_back({std::move(form), std::move(buffer)});
  }
  size_t best = 0;
  if (packed.size() > 1) {
    race(task, packed, 1);
    std::vector<double> alone;
    for (const PackedForm& f : packed)
      alone.push_back(f.time);
    bool batched = false;
    for (size_t k = 1; k < packed.size(); ++k) {
      if (alone[k] > kClearly * alone[best]) continue;
      if (packed[k].form.weights->for_few_positions) {
        if (!batched) race(task, packed, kManyImages);
        batched = true;
        if (packed[k].time * kClearly >= packed[best].time) continue;
      }
      best = k;
    }
  }
  return std::move(packed[best]);
}

}  // namespace adalayer::cpu

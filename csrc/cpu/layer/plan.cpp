#include "cpu/layer/plan.hpp"

#include <pthread.h>

#include <cstring>

#include "core/lru_cache.hpp"
#include "cpu/conv/grouped.hpp"
#include "cpu/image/ops.hpp"

namespace adalayer::cpu {
namespace {

// Tables of positions take 8 bytes for each: this is room for hundreds of layers.
constexpr size_t kPlanBytes = size_t{64} << 20;

using PlanCache = LruCache<LayerKey, LayerPlan, LayerKeyHash>;

// Never destroyed: worker threads and atexit handlers may still run layers.
PlanCache& cache() {
  static auto* instance = new PlanCache(kPlanBytes);
  return *instance;
}

[[maybe_unused]] const int g_at_fork =
    pthread_atfork([] { cache().lock(); }, [] { cache().unlock(); }, [] { cache().unlock(); });

/// Levels as they are: [h][w][c] or [c][h][w] to the rows of the layout.
void copy_levels(const LayerPlan& plan, const uint8_t* x, Layout order, uint8_t* image, Part part) {
  const ImageLayout& l = plan.in;
  const int64_t plane = l.h * l.w;
  for (int64_t y = part.first(l.h); y < part.last(l.h); ++y) {
    uint8_t* row = image + l.offset(y, 0);
    if (order == Layout::NHWC) {
      const uint8_t* from = x + y * l.w * l.channels;
      if (l.pitch == l.channels) {
        std::memcpy(row, from, static_cast<size_t>(l.w * l.channels));
        continue;
      }
      for (int64_t i = 0; i < l.w; ++i)
        std::memcpy(row + i * l.pitch, from + i * l.channels, static_cast<size_t>(l.channels));
    } else {
      for (int64_t c = 0; c < l.channels; ++c)
        for (int64_t i = 0; i < l.w; ++i)
          row[i * l.pitch + c] = x[c * plane + y * l.w + i];
    }
  }
}

}  // namespace

size_t LayerKeyHash::operator()(const LayerKey& key) const {
  const ConvShape& s = key.shape;
  uint64_t hash = key.content ^ static_cast<uint64_t>(key.isa);
  for (const int64_t v : {s.batch, s.in_channels, s.in_h, s.in_w, s.out_channels, s.kernel_h,
                          s.kernel_w, s.stride_h, s.stride_w, s.pad_top, s.pad_left, s.pad_bottom,
                          s.pad_right, s.dilation_h, s.dilation_w, s.groups})
    hash = (hash ^ static_cast<uint64_t>(v)) * 0x9E3779B97F4A7C15ull;
  return hash ^ hash >> 32;
}

size_t LayerPlan::bytes() const {
  size_t bytes = sizeof *this + conv.source.size() * 4 + conv.live_quads.size();
  for (const ConvRun& run : conv.runs)
    bytes += (run.in_offset.size() + run.position.size()) * 4 + run.step_offsets.size() * 8;
  return bytes;
}

LayerPlan plan_layer(const ConvShape& shape, bool by_pixel) {
  LayerPlan plan;
  plan.shape = shape;
  plan.shape.batch = 1;
  plan.grouped = grouped_suits(shape);
  const KernelRow& kernels = *active_kernels();
  const Positions positions = kernels.positions;
  if (!plan.grouped && stem_suits(shape)) {
    plan.stem = plan_stem(plan.shape, positions);
    plan.in = plan.stem->layout;
    plan.conv = plan_conv(plan.stem->shape, plan.in, nullptr, nullptr, kernels);
    return plan;
  }
  // Only flattened positions want the rows that one kernel row visits side by side.
  const bool strided = positions == Positions::Flattened && !plan.grouped;
  plan.in = image_layout(shape.in_channels, shape.in_h, shape.in_w, padding_of(shape),
                         strided ? shape.stride_h : 1, strided ? shape.stride_w : 1);
  if (!plan.grouped)
    plan.conv = plan_conv(plan.shape, plan.in, nullptr, nullptr, kernels, {}, by_pixel);
  return plan;
}

std::shared_ptr<const LayerPlan> cached_plan(const ConvShape& shape, bool by_pixel) {
  LayerKey key{by_pixel, shape, active_isa()};
  key.shape.batch = 1;
  if (auto plan = cache().find(key)) return plan;
  // Planned outside the lock: two threads may do it twice, none waits for the other.
  return cache().insert(key, std::make_shared<const LayerPlan>(plan_layer(shape, by_pixel)));
}

void pack_image(const LayerPlan& plan, const ActivationIn& in, int64_t n, uint8_t* image,
                Part part) {
  const ConvShape& s = plan.shape;
  const int64_t first = n * s.in_channels * s.in_h * s.in_w;
  ActivationIn from = in;
  if (in.dtype == DType::F32)
    from.data = static_cast<const float*>(in.data) + first;
  else
    from.data = static_cast<const uint8_t*>(in.data) + first;
  if (plan.stem) return pack_stem(*plan.stem, from, image, part);
  fill_padding(plan.in, image, 1, static_cast<uint8_t>(in.grid.zero_point), part);
  const auto pack_rows = [&](Part rows) {
    if (in.dtype == DType::F32)
      quantize_image(static_cast<const float*>(from.data), in.layout, in.grid, {&plan.in, image},
                     rows);
    else
      copy_levels(plan, static_cast<const uint8_t*>(from.data), in.layout, image, rows);
  };
  if (s.kernel_h > 1 || s.stride_h == 1) return pack_rows(part);
  // Nobody reads the rows between those that the stride visits.
  for (int64_t y = part.first(s.in_h); y < part.last(s.in_h); ++y)
    if ((y + s.pad_top) % s.stride_h == 0) pack_rows({y, s.in_h});
}

}  // namespace adalayer::cpu

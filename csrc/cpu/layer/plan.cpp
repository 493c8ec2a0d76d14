#include "cpu/layer/plan.hpp"

#include <algorithm>
#include <cstring>

#include "core/lru_cache.hpp"
#include "cpu/image/ops.hpp"

namespace adalayer::cpu {
namespace {

// Tables of positions take 8 bytes for each: this is room for hundreds of layers.
constexpr size_t kPlanBytes = size_t{64} << 20;

auto& cache() { return process_cache<LruCache<LayerKey, LayerPlan, LayerKeyHash>, kPlanBytes>(); }

/// Levels as they are: [h][w][c] or [c][h][w] to the rows of the layout.
void copy_levels(const LayerPlan& plan, const uint8_t* x, Layout order, uint8_t* image, Part part) {
  const ImageLayout& l = plan.conv->in();
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
  uint64_t hash =
      key.content ^ static_cast<uint64_t>(key.isa) ^ static_cast<uint64_t>(key.qmax) << 8;
  for (const int64_t v : {s.batch, s.in_channels, s.in_h, s.in_w, s.out_channels, s.kernel_h,
                          s.kernel_w, s.stride_h, s.stride_w, s.pad_top, s.pad_left, s.pad_bottom,
                          s.pad_right, s.dilation_h, s.dilation_w, s.groups})
    hash = (hash ^ static_cast<uint64_t>(v)) * 0x9E3779B97F4A7C15ull;
  return hash ^ hash >> 32;
}

ConvTask layer_task(const ConvShape& shape, int bits, int qmax) {
  ConvTask task{
      .kernels = *active_kernels(), .shape = shape, .bits = bits, .own_input = true, .qmax = qmax};
  task.shape.batch = 1;
  return task;
}

LayerInput layer_input(const ConvTask& task, const ConvAlgorithm& algorithm) {
  if (auto own = algorithm.own_input(task)) return {own, own->layout};
  const ConvShape& s = task.shape;
  const LayoutNeeds needs = algorithm.needs(task);
  return {nullptr, image_layout(s.in_channels, s.in_h, s.in_w, needs.padding, needs.phases,
                                needs.columns_multiple, needs.stride)};
}

std::shared_ptr<const LayerPlan> cached_plan(const ConvTask& task, const ConvAlgorithm& algorithm,
                                             int variant) {
  const auto list = conv_algorithms();
  const auto index = std::find(list.begin(), list.end(), &algorithm) - list.begin();
  LayerKey key{static_cast<uint64_t>(index << 16 | variant << 8 | task.bits), task.shape, task.qmax,
               active_isa()};
  if (auto plan = cache().find(key)) return plan;
  // Planned outside the lock: two threads may do it twice, none waits for the other.
  LayerInput input = layer_input(task, algorithm);
  auto conv = algorithm.plan(task, {input.layout}, variant);
  return cache().insert(key, std::make_shared<const LayerPlan>(
                                 LayerPlan{task.shape, std::move(input.own), std::move(conv)}));
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
  if (plan.own_input) return plan.own_input->pack(from, image, part);
  const ImageLayout& layout = plan.conv->in();
  fill_padding(layout, image, 1, static_cast<uint8_t>(in.grid.zero_point), part);
  const auto pack_rows = [&](Part rows) {
    if (in.dtype == DType::F32)
      quantize_image(static_cast<const float*>(from.data), in.layout, in.grid, {&layout, image},
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

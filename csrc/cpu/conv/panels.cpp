#include "cpu/conv/panels.hpp"

#include <algorithm>

namespace adalayer::cpu {
namespace {

const SparsePanels* sparse_of(const ConvWeights& weights) {
  return static_cast<const PanelWeights&>(weights).sparse_or_null();
}

double ceil_divided(double n, double by) { return (n + by - 1.0) / by; }

}  // namespace

std::string PanelWeights::form() const {
  std::string text;
  if (sparse) text = sparse->kind == Panels::Bitmask ? "bitmask" : "blocks";
  // Levels of few bits leave room for more products in a sum.
  if (product_bits < bits)
    text += (text.empty() ? "" : ", ") + std::string("products of ") +
            std::to_string(product_bits) + " bits";
  return text;
}

uint64_t PanelWeights::key() const {
  const auto width = static_cast<uint64_t>(product_bits) << 48;
  if (!sparse) return width;
  return width + 1 + static_cast<uint64_t>(sparse->kind) +
         static_cast<uint64_t>(sparse->bytes(bits));
}

PanelConv::PanelConv(const ConvTask& task, const ImageLayout& in, ConvPlan plan)
    : PlannedConv(in),
      kernels_(task.kernels),
      weight_bits_(task.product_bits()),
      plan_(std::move(plan)) {}

size_t PanelConv::bytes() const {
  size_t bytes = sizeof *this + plan_.source.size() * 4 + plan_.live_quads.size();
  for (const ConvRun& run : plan_.runs)
    bytes += (run.in_offset.size() + run.position.size()) * 4 + run.step_offsets.size() * 8;
  return bytes;
}

int64_t PanelConv::packed_bytes(const ConvWeights& weights, int bits) const {
  const SparsePanels* sparse = sparse_of(weights);
  return sparse != nullptr ? sparse->bytes(bits) : plan_.packed_bytes(bits);
}

void PanelConv::pack(const ConvWeights& weights, std::span<const int8_t> values, int bits,
                     uint8_t* packed) const {
  if (const SparsePanels* sparse = sparse_of(weights))
    pack_sparse(plan_, *sparse, values, bits, packed);
  else
    pack_panels(plan_, values, bits, packed);
}

std::pair<int64_t, int64_t> PanelConv::weight_range(const ConvWeights& weights, int bits,
                                                    Part part) const {
  return cpu::weight_range(plan_, sparse_of(weights), bits, part);
}

bool PanelConv::packs_like(const PlannedConv& other) const {
  const ConvPlan& plan = static_cast<const PanelConv&>(other).plan_;
  return plan.source == plan_.source && plan.live_quads == plan_.live_quads &&
         plan.column_tiles == plan_.column_tiles && plan.arrangement == plan_.arrangement &&
         plan.qmax == plan_.qmax;
}

bool PanelConv::prefers_columns(const ConvWeights& weights, int bits, int threads) const {
  return cpu::prefers_columns(plan_, packed_bytes(weights, bits), threads);
}

int64_t PanelConv::most_parts(bool by_columns) const {
  if (by_columns) return plan_.pairs();
  return (plan_.shape.out_h() * plan_.shape.out_w() + kBlockRows - 1) / kBlockRows;
}

void PanelConv::run(const ConvJob& job, Part part) const {
  const ConvCall call{.plan = plan_,
                      .weights = job.packed,
                      .bits = job.bits,
                      .weight_bits = weight_bits_,
                      .epilogue = job.epilogue,
                      .in = job.in,
                      .images = job.images,
                      .out = job.out,
                      .residual = job.residual,
                      .by_columns = job.by_columns,
                      .other_order = job.other_order,
                      .stream = job.stream,
                      .segment = job.segment,
                      .sparse = sparse_of(job.weights)};
  if (job.tensor == nullptr)
    run_conv(call, kernels_, part);
  else
    run_conv({call, *job.tensor, job.correction, job.first_image}, kernels_, part);
}

ConvPlan plan_panels(const ConvTask& task, const ConvShape& shape, const ConvLayouts& at,
                     bool by_pixel) {
  ConvPlan plan = plan_conv(shape, at.in, at.out, at.residual, task.kernels, task.map, by_pixel);
  // Narrower products need no order, unpacked or not.
  if (task.product_bits() < 7) plan.arrangement = nullptr;
  plan.qmax = task.qmax;
  return plan;
}

// Bytes of a column tile beyond those that every step may have.
constexpr double kMostArranged = 5120.0;

PanelsBound panels_bound(const ConvShape& s, int bits, const ImageLayout& in) {
  const auto kernel_h = static_cast<double>(s.kernel_h), kernel_w = static_cast<double>(s.kernel_w);
  const auto group_in = static_cast<double>(s.group_in()), groups = static_cast<double>(s.groups);
  PanelsBound bound;
  bound.weights = static_cast<double>(s.out_channels) * group_in * kernel_h * kernel_w;
  // A kernel row in one stretch is taken only where it needs no more than pixel by pixel.
  const double steps = kernel_h * (kernel_w * ceil_divided(group_in, 64) + 1.0);
  bound.column_tiles = groups * ceil_divided(static_cast<double>(s.group_out()), 16);
  bound.tiles = steps * bound.column_tiles;
  bound.packed = bound.tiles * 128.0 * (bits + 8);
  // An order of their own (TileArrangement), and short reductions in 16 bits beside it.
  if (bits >= 7) bound.packed += bound.column_tiles * kMostArranged;
  const auto out_h = static_cast<double>(s.out_h()), out_w = static_cast<double>(s.out_w());
  const double in_positions = static_cast<double>(in.image_bytes) / static_cast<double>(in.pitch);
  // 64 table entries and a quad count per step; an offset per step of every run, of which there may
  // be one per output row; three offsets for every position, those that are dropped included.
  bound.tables = steps * 257.0 + steps * std::max(out_h, 0.0) * 8.0 +
                 12.0 * (in_positions + std::max(out_h, 0.0) * std::max(out_w, 0.0));
  return bound;
}

}  // namespace adalayer::cpu

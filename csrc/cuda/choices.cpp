// How a product on tensor cores may be cut up, by a rough model of its time.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/plan.hpp"
#include "cuda/prepared.hpp"

namespace adalayer::cuda {
namespace {

struct Rated {
  Choice choice;
  double cost;
};

/// What a block of threads goes through.
struct Reduction {
  int64_t steps;
  double share;  // of a dense step's products in one of them
};

/// Nothing where the product has no such form.
std::optional<Reduction> reduction_of(const Product& p, Form form) {
  switch (form) {
    case Form::Dense:
      return Reduction{p.steps, 1.0};
    case Form::Blocks:
      if (p.block_steps == 0) return std::nullopt;
      return Reduction{
          std::max<int64_t>(1, p.longest_block),
          static_cast<double>(p.stored_cells) / static_cast<double>(8 * p.block_steps)};
    case Form::Structured:
      if (!p.structured) return std::nullopt;
      return Reduction{p.steps, 0.55};
  }
  return std::nullopt;
}

/// Rough clocks of `launched` blocks, of which a multiprocessor holds `blocks`: a step's products
/// share its tensor cores with the blocks beside it; alone, a step cannot be faster than its data
/// arrive.
double clocks(const TileShape& t, const Reduction& reduction, int64_t launched, int splits,
              int blocks, int multiprocessors) {
  const auto beside =
      static_cast<double>(std::min<int64_t>(blocks, ceil_div(launched, multiprocessors)));
  const double products = reduction.share * static_cast<double>(t.channels()) * t.positions() *
                          kStepDepth / (t.group ? 4096.0 : 2048.0);
  const double step = std::max(250.0, beside * products);
  const auto waves = static_cast<double>(ceil_div(launched, int64_t{multiprocessors} * blocks));
  const auto steps = static_cast<double>(ceil_div(reduction.steps, splits));
  const double shared = splits > 1 ? 1500.0 + 0.02 * t.channels() * t.positions() : 0.0;
  return waves * (2500.0 + steps * step + shared);
}

/// One tile in one form, with as many splits as may help.
void rate(const Product& p, const Machine& m, Tile tile, Form form, std::vector<Rated>& rated) {
  const std::optional<Reduction> reduction = reduction_of(p, form);
  if (!reduction) return;
  const KernelInfo info = conv_kernel(p.bits, tile, p.piece, form);
  if (info.function == nullptr || info.shared_bytes > m.shared_bytes) return;
  const TileShape& t = shape_of(tile);
  if (t.group && !m.group_products) return;
  const int64_t tiles =
      ceil_div(p.channels, t.channels()) * ceil_div(p.positions, t.positions()) * p.groups;
  const int blocks = std::max(1, std::min(t.blocks, m.shared_bytes / info.shared_bytes));
  for (const int splits : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}) {
    const int64_t launched = tiles * splits;
    if (splits > 1 && (splits > reduction->steps || launched > 4 * int64_t{m.multiprocessors} ||
                       tiles * 4 > kCounterBytes))
      break;
    rated.push_back(
        {{tile, splits, form}, clocks(t, *reduction, launched, splits, blocks, m.multiprocessors)});
  }
}

}  // namespace

std::vector<Choice> choices(const Product& product, const Machine& machine) {
  std::vector<Rated> rated;
  for (int tile = 0; tile < kTiles; ++tile)
    for (int form = 0; form < kForms; ++form)
      rate(product, machine, Tile{tile}, Form{form}, rated);
  std::stable_sort(rated.begin(), rated.end(),
                   [](const Rated& a, const Rated& b) { return a.cost < b.cost; });
  std::vector<Choice> found;
  for (const Rated& r : rated)
    found.push_back(r.choice);
  return found;
}

}  // namespace adalayer::cuda

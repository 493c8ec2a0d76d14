#include <algorithm>
#include <cstdlib>

#include "core/status.hpp"
#include "cpu/conv/winograd.hpp"
#include "formats/panels.hpp"

namespace adalayer::cpu {
namespace {

// Factors of a block should stay in the second-level cache beside the taps that stream past them;
// a little more than the smallest machines have (512 KiB) is better than taps that are read twice.
constexpr int64_t kFactorBytes = 640 << 10;
// Products of a block and one output channel, of all taps: few enough to be near when they are
// added up.
constexpr int64_t kProducts = 648;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Input channels whose taps are made together: plain loops over so many are vector instructions.
constexpr int kLanes = 16;

/// reference::winograd_taps() of `count` neighbouring kernels; zeros behind them.
void taps_of(const reference::WinogradAxis& axis, const int8_t* kernels, int64_t count,
             int16_t (*taps)[kLanes]) {
  int16_t values[9][kLanes] = {};
  for (int64_t c = 0; c < count; ++c)
    for (int k = 0; k < 9; ++k)
      values[k][c] = kernels[c * 9 + k];
  const auto row = [](const int8_t* by, const int16_t* a, const int16_t* b, const int16_t* c,
                      int16_t* __restrict sum) {
    for (int l = 0; l < kLanes; ++l)
      sum[l] = static_cast<int16_t>(by[0] * a[l] + by[1] * b[l] + by[2] * c[l]);
  };
  for (int i = 0; i < axis.taps; ++i) {
    int16_t half[3][kLanes];
    for (int x = 0; x < 3; ++x)
      row(axis.weight[i], values[x], values[3 + x], values[6 + x], half[x]);
    for (int j = 0; j < axis.taps; ++j)
      row(axis.weight[j], half[0], half[1], half[2], taps[i * axis.taps + j]);
  }
}

void require_suits(const ConvShape& shape) {
  if (!reference::winograd_suits(shape))
    throw InvalidArgument("winograd: the convolution is not 3x3 with stride 1 in one group");
}

int area_of(WinogradForm form) {
  const int taps = reference::winograd_axis(form).taps;
  return taps * taps;
}

/// Bytes of a group's taps, of which each begins on a cache line.
template <class Narrow>
int64_t lay_out(int area, const ConvShape& shape, int cell, const Narrow& narrow,
                int64_t* offsets) {
  const int64_t elements = round_up(shape.in_channels, cell) * kWinogradGroup;
  int64_t at = 0;
  for (int k = 0; k < area; ++k) {
    if (offsets != nullptr) offsets[k] = at;
    at += round_up(elements * (narrow(k) ? 1 : 2), 64);
  }
  return at;
}

constexpr int64_t kBaseBytes = kWinogradGroup * sizeof(int32_t);

}  // namespace

std::string WinogradTaps::describe() const {
  if (in_bytes()) return "taps and factors s8";
  if (narrow == area) return "taps s8";
  if (narrow == 0) return "taps s16";
  return std::to_string(narrow) + " of " + std::to_string(area) + " taps s8";
}

int64_t winograd_most_bytes(WinogradForm form, const ConvShape& shape, int bits,
                            const WinogradByteKernels* bytes) {
  const reference::WinogradAxis& axis = reference::winograd_axis(form);
  const auto reach = [&](int i) {
    int sum = 0;
    for (const int8_t w : axis.weight[i])
      sum += std::abs(w);
    return sum;
  };
  const auto narrow = [&](int k) {
    return reach(k / axis.taps) * reach(k % axis.taps) << (bits - 1) <= 127;
  };
  const int64_t groups = (shape.out_channels + kWinogradGroup - 1) / kWinogradGroup;
  int64_t most = lay_out(area_of(form), shape, 2, narrow, nullptr);
  if (bytes != nullptr) {
    const auto all = [](int) { return true; };
    most = std::max(most, lay_out(area_of(form), shape, bytes->cell, all, nullptr) + kBaseBytes);
  }
  return groups * most;
}

WinogradTaps plan_winograd_taps(WinogradForm form, const ConvShape& shape,
                                std::span<const int8_t> weights, int qmax,
                                const WinogradByteKernels* bytes) {
  require_suits(shape);
  if (static_cast<int64_t>(weights.size()) != shape.out_channels * shape.reduction())
    fail<InvalidArgument>("winograd: expected ", shape.out_channels * shape.reduction(),
                          " weights, got ", weights.size());
  if (!reference::winograd_exact(form, weights, shape.out_channels, qmax))
    throw InvalidArgument("winograd: sums of these weights are too large for this form");
  WinogradTaps taps;
  taps.form = form;
  taps.out_channels = shape.out_channels;
  taps.in_channels = shape.in_channels;
  taps.area = area_of(form);
  constexpr int kMost = reference::kMostWinogradTaps * reference::kMostWinogradTaps;
  int16_t values[kMost][kLanes], least[kMost][kLanes] = {}, most[kMost][kLanes] = {};
  const reference::WinogradAxis& axis = reference::winograd_axis(form);
  const int64_t kernels = shape.out_channels * shape.in_channels;
  for (int64_t k = 0; k < kernels; k += kLanes) {
    taps_of(axis, weights.data() + k * 9, std::min<int64_t>(kLanes, kernels - k), values);
    for (int i = 0; i < taps.area; ++i)
      for (int l = 0; l < kLanes; ++l) {
        least[i][l] = std::min(least[i][l], values[i][l]);
        most[i][l] = std::max(most[i][l], values[i][l]);
      }
  }
  for (int i = 0; i < taps.area; ++i) {
    taps.is_narrow[i] = *std::min_element(least[i], least[i] + kLanes) >= -128 &&
                        *std::max_element(most[i], most[i] + kLanes) <= 127;
    taps.narrow += taps.is_narrow[i];
  }
  if (bytes != nullptr && form == WinogradForm::F2x2 && taps.narrow == taps.area &&
      qmax <= reference::kMostWinogradByteLevel)
    taps.cell = bytes->cell;
  taps.base_offset = lay_out(
      taps.area, shape, taps.cell, [&](int k) { return taps.is_narrow[k]; }, taps.offset.data());
  taps.group_bytes = taps.base_offset + (taps.in_bytes() ? kBaseBytes : 0);
  return taps;
}

void pack_winograd_taps(const WinogradTaps& taps, std::span<const int8_t> weights, uint8_t* out) {
  std::fill_n(out, taps.bytes(), uint8_t{0});
  const reference::WinogradAxis& axis = reference::winograd_axis(taps.form);
  const int64_t outs = taps.out_channels, ins = taps.in_channels;
  int16_t values[reference::kMostWinogradTaps * reference::kMostWinogradTaps][kLanes];
  const int64_t cell = taps.cell;
  // A cache line has a cell of channels of outputs of a group: they are written together.
  for (int64_t first = 0; first < outs; first += kWinogradGroup, out += taps.group_bytes) {
    for (int64_t c = 0; c < ins; c += kLanes)
      for (int64_t o = 0; o < std::min<int64_t>(kWinogradGroup, outs - first); ++o) {
        const int64_t count = std::min<int64_t>(kLanes, ins - c);
        taps_of(axis, weights.data() + ((first + o) * ins + c) * 9, count, values);
        for (int k = 0; k < taps.area; ++k)
          for (int64_t l = 0; l < count; ++l) {
            const int64_t at = ((c + l) / cell * kWinogradGroup + o) * cell + (c + l) % cell;
            if (taps.is_narrow[k])
              reinterpret_cast<int8_t*>(out + taps.offset[k])[at] =
                  static_cast<int8_t>(values[k][l]);
            else
              reinterpret_cast<int16_t*>(out + taps.offset[k])[at] = values[k][l];
          }
      }
    if (taps.in_bytes()) write_winograd_base(taps, out);
  }
}

void write_winograd_base(const WinogradTaps& taps, uint8_t* group) {
  const auto* tap =
      reinterpret_cast<const int8_t*>(group + taps.offset[reference::kWinogradSumTap]);
  auto* base = reinterpret_cast<uint32_t*>(group + taps.base_offset);  // modulo 2^32, as all sums
  std::fill_n(base, kWinogradGroup, 0u);
  for (int64_t c = 0; c < taps.cells(); ++c)
    for (int o = 0; o < kWinogradGroup; ++o)
      for (int k = 0; k < taps.cell; ++k)
        base[o] += static_cast<uint32_t>(reference::kWinogradSumOffset * *tap++);
}

namespace {

int64_t tiles_of_group(const WinogradTaps& taps) {
  return (9 * taps.elements() + formats::kTileBytes - 1) / formats::kTileBytes;
}

}  // namespace

int64_t winograd_packed_group_bytes(const WinogradTaps& taps, int bits) {
  return tiles_of_group(taps) * (formats::kTileBytes / 8) * bits;
}

void pack_winograd_weights(const WinogradTaps& taps, std::span<const int8_t> weights, int bits,
                           uint8_t* out) {
  const int64_t outs = taps.out_channels, ins = taps.in_channels, cell = taps.cell;
  const int64_t tiles = tiles_of_group(taps);
  std::vector<int8_t> group(static_cast<size_t>(tiles * formats::kTileBytes));
  for (int64_t first = 0; first < outs; first += kWinogradGroup) {
    std::fill(group.begin(), group.end(), int8_t{0});
    for (int64_t o = 0; o < std::min<int64_t>(kWinogradGroup, outs - first); ++o)
      for (int64_t c = 0; c < ins; ++c)
        for (int64_t k = 0; k < 9; ++k)
          group[k * taps.elements() + (c / cell * kWinogradGroup + o) * cell + c % cell] =
              weights[((first + o) * ins + c) * 9 + k];
    for (int64_t t = 0; t < tiles; ++t, out += formats::kTileBytes / 8 * bits)
      formats::pack_tile(group.data() + t * formats::kTileBytes, bits, out);
  }
}

WinogradWeights derive_winograd(WinogradForm form, const ConvShape& shape,
                                std::span<const int8_t> weights, int qmax,
                                const WinogradByteKernels* bytes) {
  WinogradWeights w{plan_winograd_taps(form, shape, weights, qmax, bytes), {}};
  w.data = AlignedBuffer(static_cast<size_t>(w.taps.bytes()));
  pack_winograd_taps(w.taps, weights, w.data.data());
  return w;
}

WinogradPlan plan_winograd_blocks(WinogradForm form, const ConvShape& shape,
                                  const WinogradKernels& kernels,
                                  const WinogradByteKernels* bytes) {
  WinogradPlan plan;
  plan.shape = shape;
  plan.shape.batch = 1;
  plan.form = form;
  plan.tile = reference::winograd_axis(form).tile;
  plan.area = area_of(form);
  plan.tiles_h = (std::max<int64_t>(0, shape.out_h()) + plan.tile - 1) / plan.tile;
  plan.tiles_w = (std::max<int64_t>(0, shape.out_w()) + plan.tile - 1) / plan.tile;
  plan.bytes = bytes;
  plan.depth = round_up(shape.in_channels, 32);
  const int rows = bytes == nullptr ? kernels.rows : bytes->rows;
  const int64_t fit = kFactorBytes / (plan.area * plan.depth * plan.factor_bytes());
  const int64_t most = round_up(kProducts / plan.area, rows);
  plan.block = static_cast<int>(std::clamp<int64_t>(fit, rows, most));
  if (bytes != nullptr) plan.block -= plan.block % bytes->together;
  return plan;
}

WinogradPlan plan_winograd(WinogradForm form, const ConvShape& shape, const ImageLayout& in,
                           const ImageLayout* out, const ImageLayout* residual,
                           const WinogradKernels& kernels, const WinogradByteKernels* bytes) {
  require_suits(shape);
  int64_t largest = 0;
  for (const ImageLayout* l : {&in, out, residual})
    if (l != nullptr) largest = std::max(largest, l->image_bytes);
  if (largest > INT32_MAX)
    throw InvalidArgument("convolution: an image of 2^31 or more bytes is not supported");
  WinogradPlan plan = plan_winograd_blocks(form, shape, kernels, bytes);
  const int64_t out_h = std::max<int64_t>(0, shape.out_h());
  const int64_t out_w = std::max<int64_t>(0, shape.out_w());
  plan.in_base = (in.pad_left - shape.pad_left) * in.pitch;
  plan.in_pitch = in.pitch;
  plan.in_image_bytes = in.image_bytes;
  // Rows below the image's last one reach no output.
  const int64_t last_row = in.phases * in.phase_rows - 1;
  for (int64_t y = 0; y < plan.tiles_h * plan.tile + 2; ++y) {
    const int64_t row = std::min(y + in.pad_top - shape.pad_top, last_row);
    plan.in_row.push_back(static_cast<int32_t>(in.row_offset(row)));
  }
  // One entry per output of the tiles, those beyond the image's border included.
  const auto offsets = [&](const ImageLayout& layout) {
    const int64_t outputs = plan.tile * plan.tile;
    std::vector<int32_t> table(static_cast<size_t>(plan.tiles() * outputs), -1);
    for (int64_t y = 0; y < out_h; ++y)
      for (int64_t x = 0; x < out_w; ++x) {
        const int64_t tile = y / plan.tile * plan.tiles_w + x / plan.tile;
        table[tile * outputs + y % plan.tile * plan.tile + x % plan.tile] =
            static_cast<int32_t>(layout.offset(y, x));
      }
    return table;
  };
  if (out != nullptr) {
    plan.out_offset = offsets(*out);
    plan.out_pitch = out->pitch;
    plan.out_image_bytes = out->image_bytes;
  }
  if (residual != nullptr) {
    plan.residual_offset = offsets(*residual);
    plan.residual_image_bytes = residual->image_bytes;
  }
  return plan;
}

bool winograd_prefers_columns(const WinogradPlan& plan, const WinogradTaps& taps, int64_t images,
                              int threads) {
  if (taps.groups() < threads) return false;
  const int64_t tiles = plan.tiles() * images;
  return tiles < threads || taps.bytes() > 4 * tiles * plan.area * plan.depth * plan.factor_bytes();
}

}  // namespace adalayer::cpu

// Winograd convolutions of any shape with what they have to give, and the check of all kernels
// against it.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "core/status.hpp"
#include "core/thread_pool.hpp"
#include "cpu/conv/winograd.hpp"
#include "cpu/kernel_table.hpp"
#include "describe.hpp"
#include "exact.hpp"
#include "random_epilogue.hpp"
#include "reference/reference.hpp"
#include "reference/winograd.hpp"
#include "seed.hpp"

namespace adalayer::cpu {

inline std::mt19937 g_random(check::seed(1));

inline int pick(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(g_random); }

constexpr WinogradForm kForms[] = {WinogradForm::F2x2, WinogradForm::F4x4};

enum class Values { Random, Least, Most, Mixed };

struct Case {
  ConvShape shape;  // its batch is the number of images
  int bits = 8;
  int zero_point = 0;
  Values weights = Values::Random, levels = Values::Random;
  int qmax = 255;
  bool residual = false, table = false;
};

inline std::string describe(const Case& c) {
  const ConvShape& s = c.shape;
  std::string text;
  for (int64_t v : {s.batch, s.in_channels, s.in_h, s.in_w, s.out_channels, s.pad_top, s.pad_left,
                    s.pad_bottom, s.pad_right, int64_t{c.bits}, int64_t{c.zero_point},
                    int64_t{static_cast<int>(c.weights)}, int64_t{static_cast<int>(c.levels)}})
    text += std::to_string(v) + " ";
  return text;
}

inline int value(Values kind, int lo, int hi) {
  switch (kind) {
    case Values::Least:
      return lo;
    case Values::Most:
      return hi;
    case Values::Mixed:
      return pick(0, 1) ? lo : hi;
    default:
      return pick(lo, hi);
  }
}

inline Case square(int in, int size, int out, int pad, int bits) {
  Case c;
  c.shape = {.batch = 1,
             .in_channels = in,
             .in_h = size,
             .in_w = size,
             .out_channels = out,
             .kernel_h = 3,
             .kernel_w = 3,
             .pad_top = pad,
             .pad_left = pad,
             .pad_bottom = pad,
             .pad_right = pad};
  c.bits = bits;
  return c;
}

/// One convolution in all that a test compares.
struct Problem : RandomEpilogue {
  const Case c;
  const ConvShape& s;
  ImageLayout in, out, res;
  std::vector<int8_t> weights;
  Exact<uint8_t> image;        // laid out
  std::vector<uint8_t> plain;  // NCHW
  std::vector<uint8_t> residual;
  std::vector<int32_t> sums;  // [N][O][OH][OW], the specification's

  explicit Problem(const Case& from)
      : c(from),
        s(c.shape),
        in(image_layout(s.in_channels, s.in_h, s.in_w,
                        {s.pad_top + pick(0, 1), s.pad_left + pick(0, 1), s.pad_bottom,
                         s.pad_right + pick(0, 1)},
                        pick(1, 2))),
        out(image_layout(s.out_channels, s.out_h(), s.out_w(), {pick(0, 2), pick(0, 1), 1, 1})),
        res(image_layout(s.out_channels, s.out_h(), s.out_w(), {0, pick(0, 1), 0, 0})),
        image(static_cast<size_t>(s.batch * in.image_bytes + in.slack)) {
    const int lo = -(1 << (c.bits - 1)), hi = (1 << (c.bits - 1)) - 1;
    weights.resize(static_cast<size_t>(s.out_channels * s.reduction()));
    for (auto& w : weights)
      w = static_cast<int8_t>(value(c.weights, lo, hi));
    plain.resize(static_cast<size_t>(s.batch * s.in_channels * s.in_h * s.in_w));
    for (auto& v : plain)
      v = static_cast<uint8_t>(value(c.levels, 0, c.qmax));
    // What lies between channels and pitch is unspecified.
    for (size_t i = 0; i < image.size(); ++i)
      image[i] = static_cast<uint8_t>(pick(0, 255));
    fill_padding(in, image.data(), s.batch, static_cast<uint8_t>(c.zero_point));
    size_t i = 0;
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t k = 0; k < s.in_channels; ++k)
        for (int64_t y = 0; y < s.in_h; ++y)
          for (int64_t x = 0; x < s.in_w; ++x)
            image[n * in.image_bytes + in.offset(y, x) + k] = plain[i++];
    residual.resize(static_cast<size_t>(s.batch * res.image_bytes + res.slack));
    for (auto& v : residual)
      v = static_cast<uint8_t>(pick(0, 255));
    sums.resize(static_cast<size_t>(s.batch * s.out_channels * s.out_h() * s.out_w()));
    reference::conv2d_accumulate(s, levels(), weights.data(), sums.data(), 1);

    draw(s, weights, c.bits, c.zero_point, c.table, true, pick);
  }

  ActivationIn levels() const {
    ActivationIn a;
    a.data = plain.data();
    a.dtype = DType::U8;
    a.grid.zero_point = c.zero_point;
    return a;
  }
  int32_t sum(int64_t n, int64_t o, int64_t y, int64_t x) const {
    return sums[((n * s.out_channels + o) * s.out_h() + y) * s.out_w() + x];
  }
};

inline std::vector<const KernelRow*> all_rows() {
  std::vector<const KernelRow*> all;
  for (const KernelRow* r : kernel_rows())
    if (isa_supported(r->isa)) all.push_back(r);
  return all;
}

/// What products of bytes are to compute, for any cells.
template <int kCell, int kTogether>
void plain_byte_input(const WinogradByteInputArgs& a) {
  for (int64_t c = 0; c < a.channels; ++c) {
    uint8_t levels[16];
    int8_t factors[16];
    for (int k = 0; k < 16; ++k)
      levels[k] = a.rows[k / 4][k % 4 * a.pitch + c];
    reference::winograd_byte_input(levels, factors);
    for (int k = 0; k < 16; ++k)
      a.factors[k * a.tap_stride + c / kCell * kTogether * kCell + c % kCell] = factors[k];
  }
}

template <int kCell, int kTogether>
void plain_byte_products(const WinogradByteProductArgs& a) {
  for (int r = 0; r < a.rows; ++r)
    for (int o = 0; o < kWinogradGroup; ++o) {
      int32_t sum = a.base == nullptr ? 0 : a.base[o];
      const int8_t* row = a.factors + r / kTogether * kTogether * a.depth + r % kTogether * kCell;
      for (int64_t k = 0; k < a.cells * kCell; ++k)
        sum += row[k / kCell * kTogether * kCell + k % kCell] *
               a.taps[(k / kCell * kWinogradGroup + o) * kCell + k % kCell];
      a.products[r * a.product_stride + o] = sum;
    }
}

template <int kCell, int kTogether>
constexpr WinogradByteKernels kPlainBytes{.cell = kCell,
                                          .together = kTogether,
                                          .rows = 2 * kTogether,
                                          .input = plain_byte_input<kCell, kTogether>,
                                          .multiply = plain_byte_products<kCell, kTogether>};

/// A row's kernels of bytes, or those that every row can be tested with.
inline std::vector<const WinogradByteKernels*> byte_kernels_of(const KernelRow& row) {
  if (row.winograd_bytes != nullptr) return {row.winograd_bytes};
  return {&kPlainBytes<4, 1>, &kPlainBytes<8, 2>};
}

/// A part has a scratch of its own, as large as said.
template <class Call>
void run_parts(const Call& call, const WinogradPlan& plan, const KernelRow& row, int parts) {
  const auto bytes = static_cast<size_t>(winograd_scratch_bytes(plan, *row.winograd));
  const check::About about([&] { return text_of(row) + ", " + std::to_string(parts) + " parts"; });
  for (int p = 0; p < parts; ++p) {
    AlignedBuffer scratch(bytes + 64);
    std::memset(scratch.data(), 0x5A, bytes + 64);
    run_winograd(call, *row.winograd, row, scratch.data(), {p, parts});
    for (size_t i = 0; i < 64; ++i)
      CHECK_EQ(scratch.data()[bytes + i], 0x5A);
  }
}

inline int64_t wrong_levels(const Problem& p, const std::vector<uint8_t>& y) {
  const ConvShape& s = p.s;
  int64_t wrong = 0;
  std::vector<uint8_t> touched(y.size(), 0);
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t oy = 0; oy < s.out_h(); ++oy)
      for (int64_t ox = 0; ox < s.out_w(); ++ox) {
        const int64_t at = n * p.out.image_bytes + p.out.offset(oy, ox);
        std::memset(touched.data() + at, 1, static_cast<size_t>(p.out.pitch));
        for (int64_t o = 0; o < s.out_channels; ++o) {
          float v = conv_value(p.sum(n, o, oy, ox), p.scale[o], p.bias[o]);
          if (p.c.residual)
            v += dequantize_value(p.residual[n * p.res.image_bytes + p.res.offset(oy, ox) + o],
                                  p.epilogue.residual_scale, p.epilogue.residual_zero);
          wrong += finish_u8(v, p.epilogue.finish) != y[at + o];
        }
      }
  for (size_t i = 0; i < y.size(); ++i)
    wrong += !touched[i] && y[i] != 0xA5;
  return wrong;
}

inline void check_image(const Problem& p, const WinogradWeights& w, const KernelRow& row, int parts,
                        bool by_columns, const WinogradByteKernels* bytes = nullptr) {
  const check::Family family(row.name);
  const WinogradPlan plan = plan_winograd(w.taps.form, p.s, p.in, &p.out,
                                          p.c.residual ? &p.res : nullptr, *row.winograd, bytes);
  std::vector<uint8_t> y(static_cast<size_t>(p.s.batch * p.out.image_bytes + p.out.slack), 0xA5);
  const WinogradCall call{.plan = plan,
                          .taps = w.taps,
                          .data = w.data.data(),
                          .epilogue = &p.epilogue,
                          .in = p.image.data(),
                          .images = p.s.batch,
                          .out = y.data(),
                          .residual = p.c.residual ? p.residual.data() : nullptr,
                          .by_columns = by_columns};
  run_parts(call, plan, row, parts);
  CHECK_MSG(wrong_levels(p, y) == 0, std::string(row.name) + ", " + w.taps.describe() + ", parts " +
                                         std::to_string(parts) + ": " + describe(p.c));
}

inline void check_tensor(const Problem& p, const WinogradWeights& w, const KernelRow& row,
                         Layout layout, DType dtype, const WinogradByteKernels* bytes = nullptr) {
  const check::Family family(row.name);
  const ConvShape& s = p.s;
  const size_t count = p.sums.size();
  const WinogradPlan plan =
      plan_winograd(w.taps.form, s, p.in, nullptr, nullptr, *row.winograd, bytes);
  std::vector<float> residual(count), floats(count, -1.0f), wanted_floats(count);
  std::vector<uint8_t> levels(count, 0xA5), wanted_levels(count);
  for (auto& v : residual)
    v = static_cast<float>(pick(-1000, 1000)) / 7.0f;
  OutputSpec out;
  out.dtype = dtype;
  out.layout = layout;
  out.scale = p.scale.data();
  out.bias = p.bias.data();
  out.lo = -11.0f;
  out.hi = 200.0f;
  out.zero_point = 11;
  const bool is_float = dtype == DType::F32;
  if (is_float && p.c.residual) out.residual = residual.data();
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t o = 0; o < s.out_channels; ++o)
      for (int64_t y = 0; y < s.out_h(); ++y)
        for (int64_t x = 0; x < s.out_w(); ++x) {
          const int64_t i = layout == Layout::NCHW
                                ? ((n * s.out_channels + o) * s.out_h() + y) * s.out_w() + x
                                : ((n * s.out_h() + y) * s.out_w() + x) * s.out_channels + o;
          const int32_t sum = p.sum(n, o, y, x);
          if (is_float)
            wanted_floats[static_cast<size_t>(i)] = output_value(sum, o, i, out);
          else
            wanted_levels[static_cast<size_t>(i)] =
                requantize_u8(sum, out.scale[o], out.bias[o], out.lo, out.hi, out.zero_point);
        }
  out.data = is_float ? static_cast<void*>(floats.data()) : levels.data();
  const TensorWinogradCall call{{.plan = plan,
                                 .taps = w.taps,
                                 .data = w.data.data(),
                                 .epilogue = nullptr,
                                 .in = p.image.data(),
                                 .images = s.batch,
                                 .out = nullptr,
                                 .residual = nullptr,
                                 .by_columns = false},
                                out,
                                p.correction.data()};
  run_parts(call, plan, row, 2);
  const bool same =
      is_float ? std::memcmp(floats.data(), wanted_floats.data(), count * sizeof(float)) == 0
               : levels == wanted_levels;
  CHECK_MSG(same, std::string(row.name) + ", tensor, " + w.taps.describe() + ": " + describe(p.c));
}

/// Every form that is exact, on every instruction set, in every way.
inline void check_case(const Case& c) {
  const Problem p(c);
  for (const WinogradForm form : kForms) {
    if (!reference::winograd_exact(form, p.weights, p.s.out_channels)) continue;
    const WinogradWeights w = derive_winograd(form, p.s, p.weights);
    const check::About about([&] { return w.taps.describe() + ", " + text_of(p.s); });
    CHECK_EQ(static_cast<int64_t>(w.bytes()), w.taps.bytes());
    CHECK(w.taps.bytes() <= winograd_most_bytes(form, p.s, c.bits));
    for (const KernelRow* row : all_rows()) {
      check_image(p, w, *row, 1, false);
      check_image(p, w, *row, 3, pick(0, 1) == 1);
      check_tensor(p, w, *row, pick(0, 1) ? Layout::NHWC : Layout::NCHW, DType::F32);
      check_tensor(p, w, *row, pick(0, 1) ? Layout::NHWC : Layout::NCHW, DType::U8);
    }
  }
}

/// F(2x2) with products of bytes, on every instruction set, in every way.
inline void check_bytes(const Case& c) {
  const Problem p(c);
  for (const KernelRow* row : all_rows())
    for (const WinogradByteKernels* bytes : byte_kernels_of(*row)) {
      const WinogradWeights w = derive_winograd(WinogradForm::F2x2, p.s, p.weights, c.qmax, bytes);
      CHECK_MSG(w.taps.cell == bytes->cell, describe(c));
      CHECK(w.taps.bytes() <= winograd_most_bytes(w.taps.form, p.s, c.bits, bytes));
      check_image(p, w, *row, 1, false, bytes);
      check_image(p, w, *row, 3, pick(0, 1) == 1, bytes);
      check_tensor(p, w, *row, pick(0, 1) ? Layout::NHWC : Layout::NCHW, DType::F32, bytes);
      check_tensor(p, w, *row, pick(0, 1) ? Layout::NHWC : Layout::NCHW, DType::U8, bytes);
    }
}

/// Levels and weights whose factors and taps always fit bytes.
inline Case narrow_square(int in, int size, int out, int pad, int bits, int qmax) {
  Case c = square(in, size, out, pad, bits);
  c.qmax = qmax;
  c.zero_point = pick(0, qmax);
  return c;
}

inline int64_t wrong_sums(WinogradForm form, const Problem& p) {
  std::vector<int32_t> sums(p.sums.size());
  reference::winograd_accumulate(form, p.s, p.levels(), p.weights.data(), sums.data());
  int64_t wrong = 0;
  for (size_t i = 0; i < sums.size(); ++i)
    wrong += sums[i] != p.sums[i];
  return wrong;
}

}  // namespace adalayer::cpu

// Winograd convolutions: the scalar form against the direct sums, and every instruction set against
// them, finished in every way.
#include "reference/winograd.hpp"

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
#include "seed.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

namespace {

std::mt19937 g_random(check::seed(1));

int pick(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(g_random); }

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

std::string describe(const Case& c) {
  const ConvShape& s = c.shape;
  std::string text;
  for (int64_t v : {s.batch, s.in_channels, s.in_h, s.in_w, s.out_channels, s.pad_top, s.pad_left,
                    s.pad_bottom, s.pad_right, int64_t{c.bits}, int64_t{c.zero_point},
                    int64_t{static_cast<int>(c.weights)}, int64_t{static_cast<int>(c.levels)}})
    text += std::to_string(v) + " ";
  return text;
}

int value(Values kind, int lo, int hi) {
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

Case square(int in, int size, int out, int pad, int bits) {
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

std::vector<const KernelRow*> all_rows() {
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
std::vector<const WinogradByteKernels*> byte_kernels_of(const KernelRow& row) {
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

int64_t wrong_levels(const Problem& p, const std::vector<uint8_t>& y) {
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

void check_image(const Problem& p, const WinogradWeights& w, const KernelRow& row, int parts,
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

void check_tensor(const Problem& p, const WinogradWeights& w, const KernelRow& row, Layout layout,
                  DType dtype, const WinogradByteKernels* bytes = nullptr) {
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
void check_case(const Case& c) {
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
void check_bytes(const Case& c) {
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
Case narrow_square(int in, int size, int out, int pad, int bits, int qmax) {
  Case c = square(in, size, out, pad, bits);
  c.qmax = qmax;
  c.zero_point = pick(0, qmax);
  return c;
}

int64_t wrong_sums(WinogradForm form, const Problem& p) {
  std::vector<int32_t> sums(p.sums.size());
  reference::winograd_accumulate(form, p.s, p.levels(), p.weights.data(), sums.data());
  int64_t wrong = 0;
  for (size_t i = 0; i < sums.size(); ++i)
    wrong += sums[i] != p.sums[i];
  return wrong;
}

}  // namespace

TEST(the_matrices_divide_as_they_say) {
  for (const WinogradForm form : kForms) {
    const reference::WinogradAxis& axis = reference::winograd_axis(form);
    // The divisor of one axis squared is odd * 2^shift: a kernel that is 1 in its middle copies.
    const int8_t middle[9] = {0, 0, 0, 0, 1, 0, 0, 0, 0};
    int16_t taps[36], factors[36];
    reference::winograd_taps(form, middle, taps);
    uint8_t levels[36];
    for (int i = 0; i < axis.taps * axis.taps; ++i)
      levels[i] = static_cast<uint8_t>(pick(0, 255));
    reference::winograd_input(form, levels, factors);
    uint32_t products[36];
    for (int i = 0; i < axis.taps * axis.taps; ++i)
      products[i] = static_cast<uint32_t>(taps[i] * factors[i]);
    int32_t sums[16];
    reference::winograd_output(form, products, sums);
    for (int i = 0; i < axis.tile; ++i)
      for (int j = 0; j < axis.tile; ++j)
        CHECK_EQ(sums[i * axis.tile + j], int{levels[(i + 1) * axis.taps + j + 1]});
  }
}

TEST(everything_fits_sixteen_bits) {
  // The largest factor and tap of each kind: signs that agree with the matrix's rows.
  for (const WinogradForm form : kForms) {
    const reference::WinogradAxis& axis = reference::winograd_axis(form);
    for (int i = 0; i < axis.taps; ++i)
      for (int j = 0; j < axis.taps; ++j)
        for (const int sign : {1, -1}) {
          uint8_t levels[36];
          int factor = 0, tap = 0;
          for (int y = 0; y < axis.taps; ++y)
            for (int x = 0; x < axis.taps; ++x) {
              const int m = axis.input[i][y] * axis.input[j][x];
              levels[y * axis.taps + x] = m * sign > 0 ? 255 : 0;
              factor += m * levels[y * axis.taps + x];
            }
          int8_t kernel[9];
          for (int y = 0; y < 3; ++y)
            for (int x = 0; x < 3; ++x) {
              const int m = axis.weight[i][y] * axis.weight[j][x];
              kernel[y * 3 + x] = m * sign > 0 ? 127 : -128;
              tap += m * kernel[y * 3 + x];
            }
          int16_t factors[36], taps[36];
          reference::winograd_input(form, levels, factors);
          reference::winograd_taps(form, kernel, taps);
          CHECK_EQ(int{factors[i * axis.taps + j]}, factor);
          CHECK_EQ(int{taps[i * axis.taps + j]}, tap);
        }
  }
}

TEST(scalar_form_is_the_direct_sum) {
  for (const WinogradForm form : kForms)
    for (int size = 1; size <= 9; ++size)
      for (int bits : {2, 5, 8}) {
        Case c = square(pick(1, 20), size, pick(1, 5), pick(1, 2), bits);
        c.shape.batch = pick(1, 2);
        c.shape.in_w = pick(1, 9);
        c.zero_point = pick(0, 255);
        CHECK_MSG(wrong_sums(form, Problem(c)) == 0, describe(c));
      }
}

TEST(exact_up_to_the_bound_and_refused_behind_it) {
  struct Bound {
    WinogradForm form;
    int qmax, sign;
  };
  std::vector<Bound> bounds;
  for (const WinogradForm form : kForms)
    for (const int sign : {1, -1})
      bounds.push_back({form, 255, sign});
  for (const int qmax : {127, 63})  // F(2x2) would take 130,000 weights and more
    for (const int sign : {1, -1})
      bounds.push_back({WinogradForm::F4x4, qmax, sign});
  for (const auto& [form, qmax, sign] : bounds) {
    // Weights of one sign and the largest level, whose sum is the largest that the shift leaves
    // room for: one more is too much.
    const int64_t limit = int64_t{1} << (31 - reference::winograd_axis(form).shift);
    const int64_t most = (limit - 1) / qmax;
    const int largest = sign > 0 ? 127 : 128;
    Case c = square(static_cast<int>(most / (largest * 9) + 1), 4, 2, 0, 8);
    c.levels = Values::Most;
    c.qmax = qmax;
    Problem p(c);
    int64_t left = most;
    for (int64_t k = 0; k < p.s.reduction(); ++k) {
      const int64_t w = std::min<int64_t>(left, largest);
      p.weights[k] = 0;
      p.weights[p.s.reduction() + k] = static_cast<int8_t>(sign * w);
      left -= w;
    }
    reference::conv2d_accumulate(p.s, p.levels(), p.weights.data(), p.sums.data(), 1);
    CHECK_EQ(int64_t{p.sums.back()}, sign * most * qmax);
    CHECK(reference::winograd_exact(form, p.weights, 2, qmax));
    CHECK(!reference::winograd_exact(form, p.weights, 2, 2 * qmax + 1));
    CHECK_EQ(wrong_sums(form, p), int64_t{0});
    const WinogradWeights w = derive_winograd(form, p.s, p.weights, qmax);
    for (const KernelRow* row : all_rows())
      check_image(p, w, *row, 1, false);
    p.weights.back() = static_cast<int8_t>(p.weights.back() + sign);
    CHECK(!reference::winograd_exact(form, p.weights, 2, qmax));
    CHECK_THROWS(derive_winograd(form, p.s, p.weights, qmax), InvalidArgument, "too large");
  }
}

TEST(sizes_around_the_tile) {
  for (int h = 1; h <= 10; ++h)
    for (int w : {1, 2, 3, 4, 5, 7, 8, 9, 13}) {
      Case c = square(pick(1, 40), h, pick(1, 40), 1, pick(2, 8));
      c.shape.in_w = w;
      c.zero_point = pick(0, 255);
      c.residual = pick(0, 1) == 1;
      c.table = pick(0, 1) == 1;
      check_case(c);
    }
}

TEST(every_padding) {
  for (int top = 0; top <= 2; ++top)
    for (int left = 0; left <= 2; ++left)
      for (int bottom = 0; bottom <= 2; ++bottom)
        for (int right = 0; right <= 2; ++right) {
          Case c = square(pick(1, 20), pick(3, 7), pick(1, 20), 0, 8);
          c.shape.pad_top = top;
          c.shape.pad_left = left;
          c.shape.pad_bottom = bottom;
          c.shape.pad_right = right;
          c.shape.batch = pick(1, 2);
          c.zero_point = pick(0, 255);
          c.residual = pick(0, 1) == 1;
          check_case(c);
        }
}

TEST(channels_around_the_vector) {
  for (int in = 1; in <= 70; ++in)
    check_case(square(in, 5, pick(1, 70), 1, pick(2, 8)));
  for (int out = 1; out <= 70; ++out)
    check_case(square(pick(1, 70), 5, out, 1, pick(2, 8)));
}

TEST(extremes) {
  for (int bits : {2, 3, 4, 6, 8})
    for (const Values weights : {Values::Least, Values::Most, Values::Mixed})
      for (const Values levels : {Values::Least, Values::Most, Values::Mixed}) {
        Case c = square(100, 6, 20, 1, bits);
        c.weights = weights;
        c.levels = levels;
        c.zero_point = pick(0, 1) * 255;
        check_case(c);
      }
}

TEST(blocks_and_batches) {
  // More tiles than a block has, and blocks that reach into the next image.
  for (int size : {7, 30}) {
    Case c = square(70, size, 33, 1, 4);
    c.shape.batch = 5;
    c.residual = true;
    c.zero_point = 7;
    check_case(c);
  }
  Case deep = square(520, 9, 18, 1, 3);
  deep.shape.batch = 2;
  check_case(deep);
}

TEST(parts_run_at_the_same_time) {
  constexpr int kThreads = 3;
  for (const int size : {7, 30}) {
    Case c = square(48, size, 70, 1, 4);
    const Problem p(c);
    const WinogradWeights w = derive_winograd(WinogradForm::F4x4, p.s, p.weights);
    for (const KernelRow* row : all_rows()) {
      const WinogradPlan plan =
          plan_winograd(w.taps.form, p.s, p.in, &p.out, nullptr, *row->winograd);
      std::vector<uint8_t> y(static_cast<size_t>(p.out.image_bytes + p.out.slack), 0xA5);
      const bool by_columns = winograd_prefers_columns(plan, w.taps, 1, kThreads);
      const check::About about([&] { return text_of(*row) + ", " + text_of(p.s); });
      CHECK_EQ(by_columns, size == 7);
      const WinogradCall call{.plan = plan,
                              .taps = w.taps,
                              .data = w.data.data(),
                              .epilogue = &p.epilogue,
                              .in = p.image.data(),
                              .images = 1,
                              .out = y.data(),
                              .residual = nullptr,
                              .by_columns = by_columns};
      std::vector<AlignedBuffer> scratch(kThreads);
      for (AlignedBuffer& buffer : scratch)
        buffer.reset(static_cast<size_t>(winograd_scratch_bytes(plan, *row->winograd)));
      constexpr int64_t kParts = 5;
      parallel_for(kParts, kThreads, [&](int64_t part, int worker) {
        run_winograd(call, *row->winograd, *row, scratch[worker].data(), {part, kParts});
      });
      CHECK_MSG(wrong_levels(p, y) == 0, row->name);
    }
  }
}

TEST(taps_are_as_narrow_as_their_values) {
  Case c = square(33, 4, 17, 1, 2);
  Problem narrow(c);
  WinogradWeights w = derive_winograd(WinogradForm::F4x4, narrow.s, narrow.weights);
  CHECK_EQ(w.taps.narrow, 36);
  CHECK_EQ(w.taps.describe(), std::string("taps s8"));
  // Two groups of 17 pairs of channels, on whole cache lines.
  CHECK_EQ(w.taps.bytes(), int64_t{2 * 36 * (17 * 32 + 32)});
  c.bits = 8;
  c.weights = Values::Most;
  Problem wide(c);
  w = derive_winograd(WinogradForm::F4x4, wide.s, wide.weights);
  // Taps of which the rows' weights add up to 1 or -1 on both axes, and those that cancel out.
  CHECK(w.taps.narrow > 4 && w.taps.narrow < 36);
  CHECK_EQ(derive_winograd(WinogradForm::F2x2, narrow.s, narrow.weights).taps.describe(),
           std::string("taps s8"));
}

TEST(packed_taps_are_those_of_the_specification) {
  for (const WinogradForm form : kForms)
    for (const int bits : {3, 8}) {
      const Problem p(square(37, 4, 21, 1, bits));
      const WinogradWeights w = derive_winograd(form, p.s, p.weights);
      int64_t wrong = 0;
      for (int64_t o = 0; o < 21; ++o)
        for (int64_t c = 0; c < 37; ++c) {
          int16_t taps[36];
          reference::winograd_taps(form, p.weights.data() + (o * 37 + c) * 9, taps);
          const int64_t at = (c / 2 * 16 + o % 16) * 2 + c % 2;
          for (int k = 0; k < w.taps.area; ++k) {
            const uint8_t* tap = w.data.data() + o / 16 * w.taps.group_bytes + w.taps.offset[k];
            const int packed = w.taps.is_narrow[k] ? reinterpret_cast<const int8_t*>(tap)[at]
                                                   : reinterpret_cast<const int16_t*>(tap)[at];
            wrong += packed != taps[k];
          }
        }
      CHECK_EQ(wrong, int64_t{0});
    }
}

TEST(byte_factors_fit_up_to_the_bound) {
  const reference::WinogradAxis& axis = reference::winograd_axis(WinogradForm::F2x2);
  int beyond = 0;
  for (const int most : {reference::kMostWinogradByteLevel, reference::kMostWinogradByteLevel + 1})
    for (int k = 0; k < 16; ++k)
      for (const int sign : {1, -1}) {
        // The largest factor of each kind: levels where the matrix has that sign.
        uint8_t levels[16];
        int8_t factors[16];
        int factor = k == reference::kWinogradSumTap ? -reference::kWinogradSumOffset : 0;
        for (int i = 0; i < 16; ++i) {
          const int m = axis.input[k / 4][i / 4] * axis.input[k % 4][i % 4];
          levels[i] = static_cast<uint8_t>(m * sign > 0 ? most : 0);
          factor += m * levels[i];
        }
        reference::winograd_byte_input(levels, factors);
        const bool fits = int{factors[k]} == factor;
        beyond += !fits;
        CHECK(fits || most > reference::kMostWinogradByteLevel);
      }
  CHECK(beyond > 0);
}

TEST(products_of_bytes_up_to_the_bounds_of_levels_and_taps) {
  struct Bound {
    int qmax, sum;  // the largest level; of the weights of one kernel, which is a tap of it
    bool fits;
  };
  for (const auto& [qmax, sum, fits] : {Bound{63, 127, true},
                                        {63, 128, false},
                                        {63, -128, true},
                                        {63, -129, false},
                                        {64, 127, false},
                                        {64, -128, false},
                                        {1, 127, true}}) {
    Case c = narrow_square(21, 6, 18, 1, 8, qmax);
    c.weights = Values::Least;
    c.levels = Values::Mixed;
    Problem p(c);
    std::fill(p.weights.begin(), p.weights.end(), int8_t{0});
    // Of every output, a kernel of nearly equal weights whose sum is the tap in the middle.
    for (int64_t o = 0; o < 18; ++o)
      for (int k = 0, left = sum; k < 9; ++k) {
        const int w = left / (9 - k);
        p.weights[(o * 21 + (o * 5) % 21) * 9 + k] = static_cast<int8_t>(w);
        left -= w;
      }
    reference::conv2d_accumulate(p.s, p.levels(), p.weights.data(), p.sums.data(), 1);
    for (int64_t o = 0; o < 18; ++o)
      p.correction[o] = -c.zero_point * sum;
    for (const KernelRow* row : all_rows())
      for (const WinogradByteKernels* bytes : byte_kernels_of(*row)) {
        const check::About about([&] {
          return std::string(row->name) + ", largest level " + std::to_string(qmax) + ", tap " +
                 std::to_string(sum);
        });
        const WinogradWeights w = derive_winograd(WinogradForm::F2x2, p.s, p.weights, qmax, bytes);
        CHECK_EQ(w.taps.in_bytes(), fits);
        CHECK_EQ(w.taps.describe() == "taps and factors s8", fits);
        check_image(p, w, *row, 1, false, fits ? bytes : nullptr);
        // F(4x4) has larger factors, and a row without such kernels has no use for bytes.
        CHECK(!derive_winograd(WinogradForm::F4x4, p.s, p.weights, qmax, bytes).taps.in_bytes());
        CHECK(!derive_winograd(WinogradForm::F2x2, p.s, p.weights, qmax).taps.in_bytes());
      }
  }
}

TEST(products_of_bytes_of_every_size) {
  for (int h = 1; h <= 6; ++h)
    for (const int w : {1, 2, 3, 5, 8}) {
      Case c = narrow_square(pick(1, 40), h, pick(1, 40), 1, pick(2, 4), (1 << pick(1, 6)) - 1);
      c.shape.in_w = w;
      c.shape.batch = pick(1, 2);
      c.residual = pick(0, 1) == 1;
      c.table = pick(0, 1) == 1;
      check_bytes(c);
    }
  // Channels around the cells and registers, rows around the passes.
  for (int channels = 1; channels <= 70; channels += channels < 34 ? 1 : 5) {
    check_bytes(narrow_square(channels, 4, pick(1, 40), 1, 4, 63));
    check_bytes(narrow_square(pick(1, 40), 4, channels, 1, 4, 63));
  }
  for (int size = 1; size <= 16; ++size) {
    Case c = narrow_square(24, 2, 16, 1, 3, 63);
    c.shape.in_w = 2 * size;
    check_bytes(c);
  }
  // More tiles than a block has, and blocks that reach into the next image.
  Case large = narrow_square(70, 21, 33, 1, 4, 63);
  large.shape.batch = 3;
  large.residual = true;
  check_bytes(large);
  check_bytes(narrow_square(1300, 3, 17, 0, 4, 63));
}

TEST(products_of_bytes_of_extremes) {
  for (const int bits : {2, 3, 4})
    for (const Values weights : {Values::Least, Values::Most, Values::Mixed})
      for (const Values levels : {Values::Least, Values::Most, Values::Mixed}) {
        Case c = narrow_square(50, 5, 20, 1, bits, 63);
        c.weights = weights;
        c.levels = levels;
        c.zero_point = pick(0, 1) * 63;
        check_bytes(c);
      }
}

TEST(packed_byte_taps_are_those_of_the_specification) {
  for (const WinogradByteKernels* bytes : {&kPlainBytes<4, 1>, &kPlainBytes<8, 2>}) {
    const Problem p(narrow_square(37, 4, 21, 1, 4, 63));
    const WinogradWeights w = derive_winograd(WinogradForm::F2x2, p.s, p.weights, 63, bytes);
    int64_t wrong = 0;
    for (int64_t o = 0; o < 21; ++o) {
      const uint8_t* group = w.data.data() + o / 16 * w.taps.group_bytes;
      int32_t base = 0;
      for (int64_t c = 0; c < 37; ++c) {
        int16_t taps[36];
        reference::winograd_taps(WinogradForm::F2x2, p.weights.data() + (o * 37 + c) * 9, taps);
        base += 128 * taps[5];
        const int64_t at = (c / bytes->cell * 16 + o % 16) * bytes->cell + c % bytes->cell;
        for (int k = 0; k < 16; ++k)
          wrong += reinterpret_cast<const int8_t*>(group + w.taps.offset[k])[at] != taps[k];
      }
      wrong += reinterpret_cast<const int32_t*>(group + w.taps.base_offset)[o % 16] != base;
    }
    CHECK_EQ(wrong, int64_t{0});
  }
}

TEST(what_does_not_suit_is_refused) {
  const Problem p(square(8, 5, 8, 1, 8));
  ConvShape s = p.s;
  s.stride_w = 2;
  CHECK_THROWS(derive_winograd(WinogradForm::F2x2, s, p.weights), InvalidArgument, "3x3");
  s = p.s;
  s.groups = 2;
  CHECK_THROWS(plan_winograd_taps(WinogradForm::F2x2, s, p.weights), InvalidArgument, "3x3");
  s = p.s;
  s.in_channels = 9;
  CHECK_THROWS(plan_winograd_taps(WinogradForm::F2x2, s, p.weights), InvalidArgument, "expected");
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

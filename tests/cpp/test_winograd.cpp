// Winograd convolutions: the scalar form against the direct sums, and every instruction set against
// them, finished in every way.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/thread_pool.hpp"
#include "winograd_cases.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

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

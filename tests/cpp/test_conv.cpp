// Convolutions of u8 images in place, on every instruction set, against a plain loop.
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "cpu/conv/matmul.hpp"
#include "cpu/kernel_table.hpp"
#include "formats/canonical.hpp"
#include "random_epilogue.hpp"
#include "seed.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

namespace {

std::mt19937 g_random(check::seed(1));

int pick(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(g_random); }

struct Case {
  ConvShape shape;
  int bits = 8;
  int64_t phases = 1;
  int64_t images = 1;
  int zero_point = 0;
  bool residual = false, table = false, bounded = true, extreme = false;
  int dead_blocks = 0, zeros = 0;  // percent
};

/// The forms of the panels.
enum class Form { Dense, Blocks, BlocksByPixel, Bitmask };
constexpr Form kForms[] = {Form::Dense, Form::Blocks, Form::BlocksByPixel, Form::Bitmask};
constexpr const char* kFormNames[] = {"dense", "blocks", "blocks by pixel", "bitmask"};

/// Sets blocks of 16 output x 64 input channels at one kernel position, and single weights, to 0.
void set_zeros(const Case& c, std::vector<int8_t>& weights) {
  const ConvShape& s = c.shape;
  const int64_t area = s.kernel_h * s.kernel_w, ins = s.group_in(), across = (ins + 63) / 64;
  std::vector<bool> dead(static_cast<size_t>((s.out_channels + 15) / 16 * across * area));
  for (size_t i = 0; i < dead.size(); ++i)
    dead[i] = pick(1, 100) <= c.dead_blocks;
  for (int64_t o = 0; o < s.out_channels; ++o)
    for (int64_t i = 0; i < ins; ++i)
      for (int64_t k = 0; k < area; ++k)
        if (dead[(o / 16 * across + i / 64) * area + k] || pick(1, 100) <= c.zeros)
          weights[(o * ins + i) * area + k] = 0;
}

std::string describe(const Case& c) {
  const ConvShape& s = c.shape;
  std::string text;
  for (int64_t v :
       {s.in_channels,     s.in_h,      s.in_w,       s.out_channels,      s.kernel_h,
        s.kernel_w,        s.stride_h,  s.stride_w,   s.pad_top,           s.pad_left,
        s.pad_bottom,      s.pad_right, s.dilation_h, s.dilation_w,        s.groups,
        int64_t{c.bits},   c.phases,    c.images,     int64_t{c.residual}, int64_t{c.table},
        int64_t{c.bounded}})
    text += std::to_string(v) + " ";
  return text;
}

/// One convolution and what it has to give, for every way to run it.
struct Problem : RandomEpilogue {
  const Case c;
  std::vector<int8_t> weights;
  std::vector<uint8_t> levels;  // [N][C][H][W]
  std::vector<int32_t> sums;    // [N][O][OH][OW]

  explicit Problem(const Case& from) : c(from) {
    const ConvShape& s = c.shape;
    const int lo = -(1 << (c.bits - 1)), hi = (1 << (c.bits - 1)) - 1;
    weights.resize(static_cast<size_t>(s.out_channels * s.reduction()));
    for (auto& w : weights)
      w = static_cast<int8_t>(c.extreme ? (pick(0, 3) ? lo : hi) : pick(lo, hi));
    set_zeros(c, weights);
    levels.resize(static_cast<size_t>(c.images * s.in_channels * s.in_h * s.in_w));
    for (auto& v : levels)
      v = static_cast<uint8_t>(c.extreme ? 255 : pick(0, 255));

    draw(s, weights, c.bits, c.zero_point, c.table, c.bounded, pick);
    add_up();
  }

  int32_t sum(int64_t n, int64_t o, int64_t y, int64_t x) const {
    const ConvShape& s = c.shape;
    return sums[((n * s.out_channels + o) * s.out_h() + y) * s.out_w() + x];
  }

 private:
  void add_up() {
    const ConvShape& s = c.shape;
    const int64_t taps = s.kernel_h * s.kernel_w, plane = s.in_h * s.in_w;
    for (int64_t n = 0; n < c.images; ++n)
      for (int64_t o = 0; o < s.out_channels; ++o)
        for (int64_t oy = 0; oy < s.out_h(); ++oy)
          for (int64_t ox = 0; ox < s.out_w(); ++ox) {
            const int64_t first = n * s.in_channels + o / s.group_out() * s.group_in();
            int32_t acc = 0;
            for (int64_t ky = 0; ky < s.kernel_h; ++ky)
              for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
                const int64_t iy = oy * s.stride_h - s.pad_top + ky * s.dilation_h;
                const int64_t ix = ox * s.stride_w - s.pad_left + kx * s.dilation_w;
                // Padding is the zero point.
                if (iy < 0 || iy >= s.in_h || ix < 0 || ix >= s.in_w) continue;
                const uint8_t* a = levels.data() + first * plane + iy * s.in_w + ix;
                const int8_t* w = weights.data() + o * s.reduction() + ky * s.kernel_w + kx;
                for (int64_t i = 0; i < s.group_in(); ++i)
                  acc += (a[i * plane] - c.zero_point) * w[i * taps];
              }
            sums.push_back(acc);
          }
  }
};

void run_case(const Problem& problem, Isa isa, int parts, bool by_columns,
              Form form = Form::Dense) {
  force_isa(isa_name(isa));
  const check::Family family(isa_name(isa));
  const KernelRow& kernels = *active_kernels();
  if (form == Form::Bitmask && bitmask_kernels(kernels).expand == nullptr) return;
  const Case& c = problem.c;
  const ConvShape& s = c.shape;
  const ImageLayout in =
      image_layout(s.in_channels, s.in_h, s.in_w,
                   {s.pad_top + pick(0, 1), s.pad_left + pick(0, 1), s.pad_bottom, s.pad_right},
                   c.phases, s.stride_w);
  const ImageLayout out =
      image_layout(s.out_channels, s.out_h(), s.out_w(), {pick(0, 2), pick(0, 1), 1, 1});
  const ImageLayout res = image_layout(s.out_channels, s.out_h(), s.out_w(), {0, pick(0, 1), 0, 0});

  std::vector<uint8_t> x(static_cast<size_t>(c.images * in.image_bytes + in.slack));
  // What lies between channels and pitch is unspecified.
  for (auto& v : x)
    v = static_cast<uint8_t>(c.extreme ? 255 : pick(0, 255));
  fill_padding(in, x.data(), c.images, static_cast<uint8_t>(c.zero_point));
  size_t at_level = 0;
  for (int64_t n = 0; n < c.images; ++n)
    for (int64_t i = 0; i < s.in_channels; ++i)
      for (int64_t y = 0; y < s.in_h; ++y)
        for (int64_t column = 0; column < s.in_w; ++column)
          x[n * in.image_bytes + in.offset(y, column) + i] = problem.levels[at_level++];
  std::vector<uint8_t> r(static_cast<size_t>(c.images * res.image_bytes + res.slack));
  for (auto& v : r)
    v = static_cast<uint8_t>(pick(0, 255));

  const ConvPlan plan =
      plan_conv(s, in, &out, c.residual ? &res : nullptr, kernels, {}, form == Form::BlocksByPixel);
  SparsePanels sparse;
  if (form == Form::Bitmask)
    sparse = plan_bitmask(plan, problem.weights, c.bits);
  else if (form != Form::Dense)
    sparse = plan_blocks(plan, problem.weights);
  // Tiles are 64-byte aligned, as the engine keeps them.
  // Weights of few bits may lie unpacked.
  const int panel_bits = form != Form::Bitmask && pick(0, 3) == 0 ? 8 : c.bits;
  const int64_t bytes =
      form == Form::Dense ? plan.packed_bytes(panel_bits) : sparse.bytes(panel_bits);
  AlignedBuffer packed(static_cast<size_t>(bytes));
  if (form == Form::Dense)
    pack_panels(plan, problem.weights, panel_bits, packed.data());
  else
    pack_sparse(plan, sparse, problem.weights, panel_bits, packed.data());
  std::vector<uint8_t> y(static_cast<size_t>(c.images * out.image_bytes + out.slack), 0xA5);
  const WeightStream::Segment segment{packed.data(), bytes, 0};
  WeightStream stream({&segment, 1}, 4096);
  const ConvEpilogue& e = problem.epilogue;
  const ConvCall call{.plan = plan,
                      .weights = packed.data(),
                      .bits = panel_bits,
                      .weight_bits = c.bits,
                      .epilogue = &e,
                      .in = x.data(),
                      .images = c.images,
                      .out = y.data(),
                      .residual = c.residual ? r.data() : nullptr,
                      .by_columns = by_columns,
                      .other_order = pick(0, 1) == 1,
                      .stream = &stream,
                      .segment = 0,
                      .sparse = form == Form::Dense ? nullptr : &sparse};
  kernels.begin();
  for (int p = 0; p < parts; ++p)
    run_conv(call, kernels, {p, parts});
  kernels.end();

  int64_t wrong = 0;
  std::vector<uint8_t> touched(y.size(), 0);
  for (int64_t n = 0; n < c.images; ++n)
    for (int64_t oy = 0; oy < s.out_h(); ++oy)
      for (int64_t ox = 0; ox < s.out_w(); ++ox) {
        const int64_t at = n * out.image_bytes + out.offset(oy, ox);
        std::memset(touched.data() + at, 1, static_cast<size_t>(out.pitch));
        for (int64_t o = 0; o < s.out_channels; ++o) {
          float v = conv_value(problem.sum(n, o, oy, ox), e.scale[o], e.bias[o]);
          if (c.residual)
            v += dequantize_value(r[n * res.image_bytes + res.offset(oy, ox) + o], e.residual_scale,
                                  e.residual_zero);
          if (finish_u8(v, e.finish) != y[at + o]) ++wrong;
        }
      }
  for (size_t i = 0; i < y.size(); ++i)
    if (!touched[i] && y[i] != 0xA5) ++wrong;
  CHECK_MSG(wrong == 0, std::string(kernels.name) + ", " + kFormNames[static_cast<int>(form)] +
                            ", parts " + std::to_string(parts) + ": " + describe(c));
}

void all_isas(const Case& c) {
  const Problem problem(c);
  for (const KernelRow* row : kernel_rows()) {
    if (!isa_supported(row->isa)) continue;
    run_case(problem, row->isa, 1, false);
    run_case(problem, row->isa, 3, pick(0, 1) == 1);
  }
  force_isa("auto");
}

void all_forms(const Case& c) {
  const Problem problem(c);
  for (const KernelRow* row : kernel_rows()) {
    if (!isa_supported(row->isa)) continue;
    for (const Form form : kForms) {
      run_case(problem, row->isa, 1, false, form);
      run_case(problem, row->isa, 3, pick(0, 1) == 1, form);
    }
  }
  force_isa("auto");
}

Case square(int in, int size, int out, int kernel, int stride, int pad, int bits) {
  Case c;
  c.shape = {.batch = 1,
             .in_channels = in,
             .in_h = size,
             .in_w = size,
             .out_channels = out,
             .kernel_h = kernel,
             .kernel_w = kernel,
             .stride_h = stride,
             .stride_w = stride,
             .pad_top = pad,
             .pad_left = pad,
             .pad_bottom = pad,
             .pad_right = pad};
  c.bits = bits;
  c.phases = stride;
  return c;
}

}  // namespace

TEST(every_width) {
  for (int bits = 2; bits <= 8; ++bits) {
    Case c = square(64, 7, 48, 3, 1, 1, bits);
    c.residual = true;
    all_isas(c);
    c = square(70, 9, 33, 3, 2, 1, bits);
    c.zero_point = 12;
    all_isas(c);
    c = square(512, 7, 32, 3, 1, 1, bits);
    c.images = 2;
    all_isas(c);
  }
}

TEST(extremes_do_not_overflow) {
  for (int bits : {2, 7, 8}) {
    Case c = square(256, 6, 20, 3, 1, 1, bits);
    c.extreme = true;
    all_isas(c);
  }
}

TEST(channels_around_the_tile) {
  for (int in : {1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 129})
    for (int out : {1, 8, 15, 16, 17, 31, 32, 33, 65}) {
      Case c = square(in, 5, out, 3, 1, 1, 4);
      c.table = out % 2 == 0;
      all_isas(c);
    }
}

TEST(zeros_left_out_at_every_width) {
  for (int bits = 2; bits <= 8; ++bits) {
    Case c = square(128, 7, 80, 3, 1, 1, bits);
    c.dead_blocks = 50;
    c.zeros = 30;
    c.residual = true;
    c.zero_point = 9;
    all_forms(c);
    // A matrix times a few vectors, whose weights go through registers.
    c = square(192, 1, 112, 1, 1, 0, bits);
    c.images = pick(1, 4);
    c.dead_blocks = 60;
    c.zeros = 50;
    all_forms(c);
  }
}

TEST(zeros_left_out_around_the_blocks) {
  for (int in : {16, 48, 63, 64, 65, 128})
    for (int out : {15, 16, 17, 32, 33, 48}) {
      Case c = square(in, 5, out, 3, 1, 1, 5);
      c.dead_blocks = 60;
      c.zeros = 20;
      all_forms(c);
    }
}

TEST(nothing_but_zeros_and_no_zeros) {
  for (int bits : {3, 8})
    for (int size : {1, 6})
      for (int dead : {0, 100}) {
        Case c = square(96, size, 40, 1, 1, 0, bits);
        c.dead_blocks = dead;
        c.zero_point = 3;
        all_forms(c);
      }
}

TEST(random_shapes) {
  for (int i = 0; i < 150; ++i) {
    Case c;
    const int groups = pick(0, 3) == 0 ? pick(2, 4) : 1;
    c.shape = {.batch = 1,
               .in_channels = pick(1, 40) * groups,
               .in_h = pick(1, 20),
               .in_w = pick(1, 20),
               .out_channels = pick(1, 40) * groups,
               .kernel_h = pick(1, 4),
               .kernel_w = pick(1, 5),
               .stride_h = pick(1, 3),
               .stride_w = pick(1, 3),
               .pad_top = pick(0, 2),
               .pad_left = pick(0, 2),
               .pad_bottom = pick(0, 2),
               .pad_right = pick(0, 2),
               .dilation_h = pick(1, 2),
               .dilation_w = pick(1, 2),
               .groups = groups};
    if (c.shape.out_h() < 1 || c.shape.out_w() < 1 ||
        c.shape.in_h + c.shape.pad_top + c.shape.pad_bottom <=
            c.shape.dilation_h * (c.shape.kernel_h - 1) ||
        c.shape.in_w + c.shape.pad_left + c.shape.pad_right <=
            c.shape.dilation_w * (c.shape.kernel_w - 1))
      continue;
    c.bits = pick(2, 8);
    c.phases = pick(1, 3);
    c.images = pick(1, 3);
    c.zero_point = pick(0, 1) * pick(0, 255);
    c.residual = pick(0, 1) == 1;
    c.table = pick(0, 1) == 1;
    c.bounded = pick(0, 2) != 0;
    c.dead_blocks = pick(0, 1) * 50;
    c.zeros = pick(0, 1) * 50;
    if (i % 3 == 0)
      all_forms(c);
    else
      all_isas(c);
  }
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

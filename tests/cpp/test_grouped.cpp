// Depthwise and grouped convolutions of u8 images, on every instruction set, against a plain loop.
// Images lie in memory of exactly the promised size before an unreadable page.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "core/status.hpp"
#include "cpu/conv/grouped.hpp"
#include "seed.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

namespace {

std::mt19937 g_random(check::seed(20240611));

int pick(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(g_random); }

constexpr uint8_t kCanary = 0xA5;
// What run_grouped may read behind an image.
constexpr int64_t kBehind = 64;

/// One image, and behind it `kBehind` bytes and an unreadable page.
class Image {
 public:
  explicit Image(const ImageLayout& layout)
      : layout_(layout), page_(static_cast<size_t>(getpagesize())) {
    const auto bytes = static_cast<size_t>(layout.image_bytes + kBehind);
    span_ = (bytes + page_ - 1) / page_ * page_ + page_;
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, span_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw Error("mmap failed");
    mprotect(base_ + span_ - page_, page_, PROT_NONE);
    data_ = base_ + span_ - page_ - bytes;
  }
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;
  ~Image() { munmap(base_, span_); }

  ImageView view() const { return {&layout_, data_}; }
  const ImageLayout& layout() const { return layout_; }
  uint8_t* begin() { return data_; }
  uint8_t* end() { return data_ + layout_.image_bytes + kBehind; }

 private:
  ImageLayout layout_;
  size_t page_, span_ = 0;
  uint8_t* base_ = nullptr;
  uint8_t* data_ = nullptr;
};

struct Case {
  ConvShape shape;
  int64_t phases = 1;
  int zero_point = 0;
  float lo = -17.0f, hi = 233.0f;
  int out_zero_point = 20;
  bool residual = false, in_place = false, table = false, bounded = true, extreme = false;
};

std::string describe(const Case& c) {
  const ConvShape& s = c.shape;
  std::string text;
  for (int64_t v : {s.in_channels,
                    s.in_h,
                    s.in_w,
                    s.out_channels,
                    s.kernel_h,
                    s.kernel_w,
                    s.stride_h,
                    s.stride_w,
                    s.pad_top,
                    s.pad_left,
                    s.pad_bottom,
                    s.pad_right,
                    s.dilation_h,
                    s.dilation_w,
                    s.groups,
                    c.phases,
                    int64_t{c.zero_point},
                    int64_t{c.residual},
                    int64_t{c.in_place},
                    int64_t{c.table},
                    int64_t{c.bounded},
                    int64_t{c.extreme}})
    text += std::to_string(v) + " ";
  return text;
}

struct Numbers {
  std::vector<int8_t> weights;
  std::vector<int32_t> correction;
  std::vector<float> scale, bias;
  std::vector<uint8_t> table;
  ConvEpilogue epilogue;
};

void fill(const Case& c, Numbers& n) {
  const ConvShape& s = c.shape;
  n.weights.resize(static_cast<size_t>(s.out_channels * s.reduction()));
  for (auto& w : n.weights)
    w = static_cast<int8_t>(c.extreme ? (pick(0, 3) ? -128 : 127) : pick(-128, 127));
  const auto padded = static_cast<size_t>(epilogue_size(s.out_channels));
  n.correction.assign(padded, 0);
  n.scale.assign(padded, 0.0f);
  n.bias.assign(padded, 0.0f);
  for (int64_t o = 0; o < s.out_channels; ++o) {
    int32_t sum = 0;
    for (int64_t k = 0; k < s.reduction(); ++k)
      sum += n.weights[o * s.reduction() + k];
    n.correction[o] = -c.zero_point * sum;
    n.scale[o] = static_cast<float>(pick(-100, 100)) /
                 (1e4f * static_cast<float>(c.extreme ? 1 : 1 + s.reduction()));
    n.bias[o] = static_cast<float>(pick(-1000, 1000)) / 10.0f;
  }
  if (!c.bounded) n.scale[pick(0, static_cast<int>(s.out_channels) - 1)] = 1e30f;
  n.table.resize(256);
  for (auto& v : n.table)
    v = static_cast<uint8_t>(pick(0, 255));
  n.epilogue.correction = c.zero_point == 0 ? nullptr : n.correction.data();
  n.epilogue.scale = n.scale.data();
  n.epilogue.bias = n.bias.data();
  n.epilogue.residual_scale = 0.37f;
  n.epilogue.residual_zero = c.zero_point;
  n.epilogue.finish = {.lo = c.lo,
                       .hi = c.hi,
                       .zero_point = c.out_zero_point,
                       .table = c.table ? n.table.data() : nullptr,
                       .inv_scale = 1.7f};
  n.epilogue.bounded = c.bounded;
}

uint8_t expected(const Case& c, const Numbers& n, ConstImageView in, ConstImageView residual,
                 int64_t oy, int64_t ox, int64_t o) {
  const ConvShape& s = c.shape;
  const int64_t first = o / s.group_out() * s.group_in();
  int32_t sum = 0;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky)
    for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
      const int64_t iy = oy * s.stride_h - s.pad_top + ky * s.dilation_h;
      const int64_t ix = ox * s.stride_w - s.pad_left + kx * s.dilation_w;
      // Padding is zero: a - zero_point vanishes.
      if (iy < 0 || iy >= s.in_h || ix < 0 || ix >= s.in_w) continue;
      for (int64_t i = 0; i < s.group_in(); ++i)
        sum += (in.pixel(iy, ix)[first + i] - c.zero_point) *
               n.weights[((o * s.group_in() + i) * s.kernel_h + ky) * s.kernel_w + kx];
    }
  float y = conv_value(sum, n.scale[o], n.bias[o]);
  if (residual.data != nullptr)
    y += dequantize_value(residual.pixel(oy, ox)[o], n.epilogue.residual_scale,
                          n.epilogue.residual_zero);
  return finish_u8(y, n.epilogue.finish);
}

void run_case(const Case& c) {
  const ConvShape& s = c.shape;
  validate(s);
  Image in(image_layout(s.in_channels, s.in_h, s.in_w,
                        {s.pad_top + pick(0, 1), s.pad_left + pick(0, 1), s.pad_bottom + pick(0, 1),
                         s.pad_right + pick(0, 1)},
                        c.phases));
  Image out(image_layout(s.out_channels, s.out_h(), s.out_w(),
                         {pick(0, 2), pick(0, 1), pick(0, 1), pick(0, 1)}, pick(1, 2)));
  Image residual(c.in_place ? out.layout()
                            : image_layout(s.out_channels, s.out_h(), s.out_w(),
                                           {0, pick(0, 1), 0, pick(0, 1)}));
  for (uint8_t& v : in)
    v = static_cast<uint8_t>(c.extreme ? (pick(0, 7) ? 255 : 0) : pick(0, 255));
  fill_padding(in.layout(), in.begin(), 1, static_cast<uint8_t>(c.zero_point));
  for (uint8_t& v : residual)
    v = static_cast<uint8_t>(pick(0, 255));
  Numbers n;
  fill(c, n);
  const ConstImageView residual_view = c.residual ? residual.view() : ImageView{};

  std::vector<uint8_t> want;
  for (int64_t y = 0; y < s.out_h(); ++y)
    for (int64_t x = 0; x < s.out_w(); ++x)
      for (int64_t o = 0; o < s.out_channels; ++o)
        want.push_back(expected(c, n, in.view(), residual_view, y, x, o));

  for (Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    const check::Family family(isa_name(isa));
    const GroupedWeights weights = build_grouped(s, n.weights);
    for (int parts : {1, pick(2, 5)}) {
      if (c.in_place && c.residual)
        std::copy(residual.begin(), residual.end(), out.begin());
      else
        std::fill(out.begin(), out.end(), kCanary);
      std::vector<uint8_t> before(out.begin(), out.end());
      const ConstImageView r = c.residual && c.in_place ? out.view() : residual_view;
      for (int p = parts - 1; p >= 0; --p)
        run_grouped(s, weights, n.epilogue, in.view(), r, out.view(), {p, parts});

      int64_t wrong = 0, at = 0;
      for (int64_t y = 0; y < s.out_h(); ++y)
        for (int64_t x = 0; x < s.out_w(); ++x) {
          const uint8_t* pixel = out.view().pixel(y, x);
          for (int64_t o = 0; o < s.out_channels; ++o)
            wrong += pixel[o] != want[static_cast<size_t>(at++)];
          std::memset(before.data() + (pixel - out.begin()), 0,
                      static_cast<size_t>(out.layout().pitch));
          std::memset(out.view().pixel(y, x), 0, static_cast<size_t>(out.layout().pitch));
        }
      const bool outside = std::equal(before.begin(), before.end(), out.begin());
      const auto where = [&] {
        return std::string(isa_name(isa)) + ", parts " + std::to_string(parts) + ", wrong " +
               std::to_string(wrong) + ": " + describe(c);
      };
      CHECK_MSG(wrong == 0, where());
      CHECK_MSG(outside, where());
    }
  }
  force_isa("auto");
}

ConvShape grouped(int groups, int in, int out, int size, int kernel, int stride) {
  return {.batch = 1,
          .in_channels = groups * in,
          .in_h = size,
          .in_w = size,
          .out_channels = groups * out,
          .kernel_h = kernel,
          .kernel_w = kernel,
          .stride_h = stride,
          .stride_w = stride,
          .pad_top = kernel / 2,
          .pad_left = kernel / 2,
          .pad_bottom = kernel / 2,
          .pad_right = kernel / 2,
          .groups = groups};
}

void random_options(Case& c) {
  c.phases = pick(0, 1) ? c.shape.stride_h : pick(1, 3);
  c.zero_point = pick(0, 1) * pick(0, 255);
  c.residual = pick(0, 1) == 1;
  c.in_place = pick(0, 1) == 1;
  c.table = pick(0, 2) == 0;
  c.bounded = pick(0, 2) != 0;
  c.extreme = pick(0, 9) == 0;
  switch (pick(0, 2)) {
    case 0:
      c.lo = 0.0f;
      c.hi = 255.0f;
      c.out_zero_point = 0;
      break;
    case 1:
      c.out_zero_point = pick(0, 255);
      c.lo = static_cast<float>(-c.out_zero_point);
      c.hi = static_cast<float>(pick(0, 255) - c.out_zero_point);
      break;
    default:
      break;
  }
}

bool has_output(const ConvShape& s) {
  return s.in_h + s.pad_top + s.pad_bottom > s.dilation_h * (s.kernel_h - 1) &&
         s.in_w + s.pad_left + s.pad_right > s.dilation_w * (s.kernel_w - 1);
}

}  // namespace

TEST(depthwise_channels) {
  std::vector<int> counts{127, 128, 129, 191, 192, 208, 224, 240, 255, 256, 257};
  for (int c = 2; c <= 70; ++c)
    counts.push_back(c);
  for (int channels : counts)
    for (int stride : {1, 2}) {
      Case c;
      c.shape = grouped(channels, 1, 1, 7, 3, stride);
      random_options(c);
      run_case(c);
    }
}

TEST(depthwise_kernels) {
  for (int kernel_h = 1; kernel_h <= 7; ++kernel_h)
    for (int kernel_w = 1; kernel_w <= 7; ++kernel_w)
      for (int stride = 1; stride <= 3; ++stride) {
        Case c;
        c.shape = grouped(pick(2, 90), 1, 1, 12, 3, stride);
        c.shape.kernel_h = kernel_h;
        c.shape.kernel_w = kernel_w;
        c.shape.dilation_h = pick(1, 2);
        c.shape.dilation_w = pick(1, 2);
        c.shape.stride_h = pick(0, 1) ? stride : pick(1, 3);
        if (!has_output(c.shape)) continue;
        random_options(c);
        run_case(c);
      }
}

TEST(depthwise_sizes) {
  // Every remainder of columns and rows, and wide rows, which are cut into tiles.
  for (int size = 1; size <= 18; ++size)
    for (int stride : {1, 2}) {
      Case c;
      c.shape = grouped(pick(0, 1) ? 80 : 48, 1, 1, size, 3, stride);
      c.shape.in_w = pick(1, 18);
      random_options(c);
      run_case(c);
    }
  for (int width : {57, 112, 200}) {
    Case c;
    c.shape = grouped(40, 1, 1, 5, width == 200 ? 7 : 3, 1);
    c.shape.in_w = width;
    random_options(c);
    run_case(c);
  }
  Case large;
  large.shape = grouped(17, 1, 1, 33, 31, 1);
  run_case(large);
}

TEST(channel_multiplier) {
  for (int multiplier : {2, 3, 4, 7, 16, 20})
    for (int groups : {2, 3, 8, 33, 70}) {
      Case c;
      c.shape = grouped(groups, 1, multiplier, 6, 3, pick(1, 2));
      random_options(c);
      run_case(c);
    }
}

TEST(group_widths) {
  for (int width : {2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48})
    for (int groups : {2, 3, 4, 5, 8, 9, 13})
      for (int stride : {1, 2}) {
        Case c;
        c.shape = grouped(groups, width, width, 7, pick(0, 1) ? 3 : 1, stride);
        c.shape.in_w = pick(1, 20);
        random_options(c);
        run_case(c);
      }
}

TEST(unequal_groups) {
  for (int in : {2, 3, 4, 8, 10, 16, 20})
    for (int out : {1, 2, 4, 7, 8, 15, 16, 17, 31, 33, 40, 70}) {
      Case c;
      c.shape = grouped(pick(2, 5), in, out, 5, 3, 1);
      random_options(c);
      run_case(c);
    }
}

TEST(random_shapes) {
  for (int i = 0; i < 400; ++i) {
    const int widths[] = {1, 1, 2, 4, 8, 16, 5};
    const int width = widths[pick(0, 6)];
    Case c;
    c.shape = {.batch = 1,
               .in_channels = 0,
               .in_h = pick(1, 15),
               .in_w = pick(1, 15),
               .out_channels = 0,
               .kernel_h = pick(1, 5),
               .kernel_w = pick(1, 5),
               .stride_h = pick(1, 3),
               .stride_w = pick(1, 3),
               .pad_top = pick(0, 3),
               .pad_left = pick(0, 3),
               .pad_bottom = pick(0, 3),
               .pad_right = pick(0, 3),
               .dilation_h = pick(1, 2),
               .dilation_w = pick(1, 2),
               .groups = pick(2, 150 / width)};
    c.shape.in_channels = c.shape.groups * width;
    c.shape.out_channels = c.shape.groups * (pick(0, 5) == 0 ? pick(1, 9) : width);
    if (!has_output(c.shape)) continue;
    random_options(c);
    run_case(c);
  }
}

TEST(extremes_do_not_overflow) {
  for (int width : {1, 2, 4, 8, 12, 16, 32})
    for (int zero_point : {0, 255}) {
      Case c;
      c.shape = grouped(5, width, width, 6, 7, 1);
      c.extreme = true;
      c.zero_point = zero_point;
      run_case(c);
    }
}

TEST(wrong_arguments) {
  const ConvShape s = grouped(8, 1, 1, 4, 3, 1);
  const std::vector<int8_t> weights(8 * 9, 1);
  CHECK_THROWS(build_grouped(s, std::span(weights).first(71)), InvalidArgument, "72 weights");
  const std::vector<float> zeros(64, 0.0f);
  ConvEpilogue e;
  e.scale = e.bias = zeros.data();
  const GroupedWeights built = build_grouped(s, weights);
  Image padded(image_layout(8, 4, 4, {1, 1, 1, 1})), bare(image_layout(8, 4, 4));
  Image other(image_layout(8, 5, 4));
  const auto run = [&](const GroupedWeights& w, Image& in, Image& out) {
    run_grouped(s, w, e, in.view(), {}, out.view(), {});
  };
  CHECK_THROWS(run(built, bare, padded), InvalidArgument, "padded by at least 1 rows");
  CHECK_THROWS(run(built, padded, other), InvalidArgument, "expected the output to be 8 x 4 x 4");
  if (best_isa() != Isa::Scalar) {
    force_isa("scalar");
    CHECK_THROWS(run(built, padded, bare), InvalidArgument, "another instruction set");
    force_isa("auto");
  }
  run(built, padded, bare);
}

TEST(which_shapes_suit) {
  CHECK(grouped_suits(grouped(32, 1, 1, 8, 3, 1)));
  CHECK(grouped_suits(grouped(32, 1, 4, 8, 3, 1)));
  CHECK(grouped_suits(grouped(32, 4, 4, 8, 3, 1)));
  CHECK(!grouped_suits(grouped(1, 32, 32, 8, 3, 1)));
  CHECK(!grouped_suits(grouped(2, 64, 64, 8, 3, 1)));
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

// The list of convolution algorithms: each one that suits a task, in every form that its weights
// can have, against a plain sum; what it holds, against what it says that it will.
#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "cpu/conv/algorithm.hpp"
#include "cpu/conv/policy.hpp"
#include "cpu/conv/trial.hpp"
#include "cpu/image/ops.hpp"
#include "describe.hpp"
#include "seed.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

namespace {

std::mt19937 g_random(check::seed(5));
int g_winograd[3] = {};  // forms that were run, by ConvTask::room
int g_bytes[3] = {};     // of them, with products of bytes

int pick(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(g_random); }

/// `suits`: that Winograd takes.
ConvShape random_shape(bool suits) {
  for (;;) {
    ConvShape s;
    s.batch = 1;
    s.groups = pick(0, 2) == 0 ? pick(2, 12) : 1;
    const bool depthwise = s.groups > 1 && pick(0, 1) == 1;
    s.in_channels = depthwise ? s.groups : s.groups * pick(1, pick(0, 1) == 1 ? 4 : 80);
    s.out_channels = depthwise ? s.groups : s.groups * pick(1, 40);
    s.in_h = pick(1, 12);
    s.in_w = pick(1, 12);
    s.kernel_h = pick(1, 4);
    s.kernel_w = pick(1, 4);
    s.stride_h = pick(1, 2);
    s.stride_w = pick(1, 2);
    s.pad_top = pick(0, 2);
    s.pad_left = pick(0, 2);
    s.pad_bottom = pick(0, 2);
    s.pad_right = pick(0, 2);
    s.dilation_h = s.dilation_w = pick(0, 3) == 0 ? 2 : 1;
    if (suits || pick(0, 2) == 0) {
      s.kernel_h = s.kernel_w = 3;
      s.groups = s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    }
    const bool fits = s.in_h + s.pad_top + s.pad_bottom > s.dilation_h * (s.kernel_h - 1) &&
                      s.in_w + s.pad_left + s.pad_right > s.dilation_w * (s.kernel_w - 1);
    if (fits && s.reduction() < 800) return s;
  }
}

struct Layer {
  ConvShape shape;
  int bits = 8;
  int qmax = 255;  // of the input
  int zero_point = 0;
  std::vector<int8_t> weights;
  std::vector<uint8_t> levels;  // [h][w][c]
  std::vector<int32_t> correction;
  std::vector<float> want;  // [h][w][c]
};

/// `narrow`: Winograd's products may be of bytes.
Layer random_layer(bool narrow) {
  Layer l{random_shape(narrow), pick(2, narrow ? 4 : 8), 255, 0, {}, {}, {}, {}};
  const ConvShape& s = l.shape;
  if (narrow)
    l.qmax = (1 << pick(1, 6)) - 1;
  else if (pick(0, 1) == 1)
    l.qmax = (1 << pick(2, 8)) - 1;
  l.zero_point = pick(0, l.qmax);
  const int half = 1 << (l.bits - 1), zeros = pick(0, 90);
  // The least of all weights and the largest of all levels are where sums in 16 bits would end.
  const bool extreme = pick(0, 3) == 0;
  l.weights.resize(static_cast<size_t>(s.out_channels * s.reduction()));
  for (auto& w : l.weights)
    w = static_cast<int8_t>(extreme ? -half : pick(1, 100) <= zeros ? 0 : pick(-half, half - 1));
  // Tiles of zeros: the first output channels over all inputs of the first kernel positions.
  if (pick(0, 1) == 1)
    std::fill_n(l.weights.begin(), std::min<int64_t>(s.out_channels, 16) * s.reduction(),
                int8_t{0});
  l.levels.resize(static_cast<size_t>(s.in_channels * s.in_h * s.in_w));
  for (auto& q : l.levels)
    q = static_cast<uint8_t>(extreme ? l.qmax : pick(0, l.qmax));
  for (int64_t o = 0; o < s.out_channels; ++o) {
    int32_t sum = 0;
    for (int64_t k = 0; k < s.reduction(); ++k)
      sum += l.weights[o * s.reduction() + k];
    l.correction.push_back(-l.zero_point * sum);
  }
  for (int64_t y = 0; y < s.out_h(); ++y)
    for (int64_t x = 0; x < s.out_w(); ++x)
      for (int64_t o = 0; o < s.out_channels; ++o) {
        int32_t sum = 0;
        for (int64_t c = 0; c < s.group_in(); ++c)
          for (int64_t ky = 0; ky < s.kernel_h; ++ky)
            for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
              const int64_t iy = y * s.stride_h - s.pad_top + ky * s.dilation_h;
              const int64_t ix = x * s.stride_w - s.pad_left + kx * s.dilation_w;
              if (iy < 0 || iy >= s.in_h || ix < 0 || ix >= s.in_w) continue;
              const int64_t channel = o / s.group_out() * s.group_in() + c;
              sum += (l.levels[(iy * s.in_w + ix) * s.in_channels + channel] - l.zero_point) *
                     l.weights[((o * s.group_in() + c) * s.kernel_h + ky) * s.kernel_w + kx];
            }
        l.want.push_back(static_cast<float>(sum));  // exact: fewer than 24 bits
      }
  return l;
}

/// The layer's image as an algorithm wants it.
AlignedBuffer packed_input(const Layer& l, const OwnInput* own, const ImageLayout& layout) {
  const ConvShape& s = l.shape;
  AlignedBuffer image(static_cast<size_t>(layout.image_bytes + layout.slack));
  image.clear();
  if (own != nullptr) {
    own->pack({l.levels.data(), DType::U8, Layout::NHWC, {1.0f, l.zero_point, l.qmax}},
              image.data(), {});
    return image;
  }
  fill_padding(layout, image.data(), 1, static_cast<uint8_t>(l.zero_point));
  for (int64_t y = 0; y < s.in_h; ++y)
    for (int64_t x = 0; x < s.in_w; ++x)
      std::memcpy(image.data() + layout.offset(y, x),
                  l.levels.data() + (y * s.in_w + x) * s.in_channels,
                  static_cast<size_t>(s.in_channels));
  return image;
}

void check_form(const Layer& l, const ConvTask& task, const ConvAlgorithm& algorithm) {
  const ConvShape& s = l.shape;
  const check::About about([&] {
    return text_of(task.kernels) + ", " + algorithm.name(s) + ", " + text_of(s) + ", " +
           std::to_string(l.bits) + " bits, levels to " + std::to_string(l.qmax);
  });
  const auto own = algorithm.own_input(task);
  CHECK(own == nullptr || task.own_input);
  const LayoutNeeds needs = algorithm.needs(task);
  const ImageLayout in = own != nullptr ? own->layout
                                        : image_layout(s.in_channels, s.in_h, s.in_w, needs.padding,
                                                       needs.phases, needs.columns_multiple);
  const ConvForm form = make_form(algorithm, task, {in}, l.weights);
  if (form.weights == nullptr) return;
  const AlignedBuffer image = packed_input(l, own.get(), in);
  const std::vector<float> ones(static_cast<size_t>(epilogue_size(s.out_channels)), 1.0f);
  const std::vector<float> nothing(ones.size(), 0.0f);
  std::vector<float> got(l.want.size());
  OutputSpec tensor;
  tensor.data = got.data();
  tensor.layout = Layout::NHWC;
  tensor.scale = ones.data();
  tensor.bias = nothing.data();
  tensor.lo = -1e30f;
  tensor.hi = 1e30f;
  int64_t held = form.weights->own_bytes() + static_cast<int64_t>(form.plan->bytes());
  for (const bool widened : {false, true}) {
    if (widened && (task.bits == 8 || !form.weights->widens)) continue;
    const int bits = widened ? 8 : task.bits;
    AlignedBuffer packed(static_cast<size_t>(form.plan->packed_bytes(*form.weights, bits)));
    form.plan->pack(*form.weights, l.weights, bits, packed.data());
    held += static_cast<int64_t>(packed.size());
    for (const bool by_columns : {false, true})
      for (const int64_t parts : {1, 3}) {
        std::fill(got.begin(), got.end(), NAN);
        task.kernels.begin();
        for (int64_t p = 0; p < parts; ++p)
          form.plan->run({.weights = *form.weights,
                          .packed = packed.data(),
                          .bits = bits,
                          .in = image.data(),
                          .images = 1,
                          .correction = l.correction.data(),
                          .tensor = &tensor,
                          .by_columns = by_columns,
                          .other_order = pick(0, 1) == 1},
                         {p, parts});
        task.kernels.end();
        CHECK_MSG(got == l.want, std::string(task.kernels.name) + ", " + algorithm.name(s) + ", " +
                                     form.weights->form() + ", bits " + std::to_string(bits));
      }
    const auto [first, last] = form.plan->weight_range(*form.weights, bits, {});
    CHECK(first == 0 && last == static_cast<int64_t>(packed.size()));
  }
  if (algorithm.name(s).starts_with("winograd")) ++g_winograd[static_cast<int>(task.room)];
  if (form.weights->form() == "taps and factors s8") ++g_bytes[static_cast<int>(task.room)];
  // Without room for several, this one is in the place of the panels.
  double said = algorithm.bytes(task, in);
  if (task.room != Room::Several && form.weights->merit != Merit::Unknown)
    said += algorithms_for(task).front()->bytes(task, in);
  // Small fixed amounts are not counted.
  CHECK_MSG(static_cast<double>(held) <= said + 4096.0,
            algorithm.name(s) + " holds " + std::to_string(held));
}

/// The names of what may run a task.
std::vector<std::string> names_for(const ConvTask& task) {
  std::vector<std::string> names;
  for (const ConvAlgorithm* algorithm : algorithms_for(task))
    names.push_back(algorithm->name(task.shape));
  return names;
}

using Names = std::vector<std::string>;

}  // namespace

TEST(turns_of_a_trial) {
  int turns = 1;
  while (another_turn(turns, 1e-3 * turns))
    ++turns;
  CHECK_EQ(turns, 9);
  CHECK(another_turn(1, 60.0));  // there is something to compare
  CHECK(!another_turn(2, 60.0));
}

TEST(every_form_of_random_layers) {
  for (int i = 0; i < 64; ++i) {
    const Layer l = random_layer(i >= 60);
    for (const KernelRow* row : kernel_rows()) {
      if (!isa_supported(row->isa)) continue;
      force_isa(row->name);
      const check::Family family(row->name);
      for (const auto& [sparse, winograd] :
           {std::pair{"auto", "4x4"}, {"blocks", "2x2"}, {"bitmask", "off"}, {"auto", "auto"}}) {
        set_sparse_policy(sparse);
        set_winograd_policy(winograd);
        for (const bool own_input : {false, true})
          for (const Room room : {Room::Least, Room::Scratch, Room::Several}) {
            const ConvTask task{*row, l.shape, {}, l.bits, own_input, room, l.qmax};
            for (const ConvAlgorithm* algorithm : algorithms_for(task))
              check_form(l, task, *algorithm);
          }
      }
    }
  }
  set_sparse_policy("auto");
  set_winograd_policy("auto");
  force_isa("auto");
  CHECK(best_isa() == Isa::Scalar ||
        (g_winograd[0] == 0 && g_winograd[1] > 10 && g_winograd[2] > 10));
  const bool any = std::any_of(kernel_rows().begin(), kernel_rows().end(), [](const KernelRow* r) {
    return isa_supported(r->isa) && r->winograd_bytes != nullptr;
  });
  CHECK_EQ(g_bytes[1] > 0 && g_bytes[2] > 0, any);
}

TEST(what_suits) {
  for (const KernelRow* row : kernel_rows()) {
    if (!isa_supported(row->isa)) continue;
    force_isa(row->name);
    const check::Family family(row->name);
    ConvTask task{*row, {.batch = 1, .in_channels = 3, .in_h = 9, .in_w = 9}, {}, 8, true};
    const check::About about([&] { return text_of(*row) + ", " + text_of(task.shape); });
    task.shape.out_channels = 32;
    task.shape.kernel_h = task.shape.kernel_w = 3;
    CHECK((names_for(task) == Names{"stem"}));
    task.own_input = false;
    const Names made{"winograd 4x4 from packed weights", "winograd 2x2 from packed weights"};
    CHECK((names_for(task) ==
           Names{"panels", "sparse panels", "winograd 4x4", "winograd 2x2", made[0], made[1]}));
    task.room = Room::Scratch;
    CHECK((names_for(task) == Names{"panels", "sparse panels", made[0], made[1]}));
    task.room = Room::Least;
    CHECK((names_for(task) == Names{"panels", "sparse panels"}));
    task.room = Room::Several;
    task.shape.stride_w = 2;
    CHECK((names_for(task) == Names{"panels", "sparse panels"}));
    task.shape.stride_w = 1;
    task.shape.in_channels = task.shape.groups = 32;
    CHECK((names_for(task) == Names{"depthwise"}));
    task.shape.out_channels = 64;
    CHECK((names_for(task) == Names{"grouped"}));
    // Outputs that interleave with those of others.
    task.map = {0, 2, 1, 2, 14, 14};
    CHECK((names_for(task) == Names{"panels", "sparse panels"}));
  }
  force_isa("auto");
}

/// F(4x4) ends where a channel's largest sum may reach 2^25; F(2x2) takes over. With 7-bit levels
/// that is at twice as many weights.
TEST(winograd_where_sums_are_exact) {
  for (const KernelRow* row : kernel_rows()) {
    if (!isa_supported(row->isa)) continue;
    force_isa(row->name);
    const check::Family family(row->name);
    // 127 * 255 * 9 * 115 is below 2^25, and so is 127 * 127 * 9 * 231.
    for (const auto& [ins, qmax, large] : {std::tuple<int64_t, int, bool>{115, 255, true},
                                           {116, 255, false},
                                           {116, 127, true},
                                           {231, 127, true},
                                           {232, 127, false}}) {
      ConvTask task{*row,  {.batch = 1, .in_channels = ins, .in_h = 20, .in_w = 20},
                    {},    8,
                    false, Room::Several,
                    qmax};
      const check::About about([&] {
        return text_of(*row) + ", " + text_of(task.shape) + ", levels to " +
               std::to_string(task.qmax);
      });
      task.shape.out_channels = 16;
      task.shape.kernel_h = task.shape.kernel_w = 3;
      const std::vector<int8_t> weights(static_cast<size_t>(16 * ins * 9), int8_t{127});
      Names derived;
      for (const ConvAlgorithm* algorithm : algorithms_for(task)) {
        const ImageLayout in = image_layout(ins, 20, 20, algorithm->needs(task).padding);
        if (make_form(*algorithm, task, {in}, weights).weights != nullptr)
          derived.push_back(algorithm->name(task.shape));
      }
      CHECK((derived == Names{"panels", large ? "winograd 4x4" : "winograd 2x2"}));
    }
  }
  force_isa("auto");
}

/// On maps that F(4x4) divides well, F(2x2) is tried where its products are of bytes: with levels
/// of at most 6 bits and weights of which all taps fit, on rows that have such kernels.
TEST(winograd_in_bytes_is_tried_beside_4x4) {
  for (const KernelRow* row : kernel_rows()) {
    if (!isa_supported(row->isa)) continue;
    force_isa(row->name);
    const check::Family family(row->name);
    for (const auto& [qmax, weight, fits] :
         {std::tuple<int, int, bool>{63, 14, true}, {64, 14, false}, {63, 15, false}}) {
      ConvTask task{*row,  {.batch = 1, .in_channels = 64, .in_h = 32, .in_w = 32},
                    {},    5,
                    false, Room::Several,
                    qmax};
      task.shape.out_channels = 64;
      task.shape.kernel_h = task.shape.kernel_w = 3;
      task.shape.pad_top = task.shape.pad_left = task.shape.pad_bottom = task.shape.pad_right = 1;
      const check::About about(
          [&] { return text_of(task.shape) + ", 5 bits, levels to " + std::to_string(task.qmax); });
      // Nine of them are a tap: 126, or 135.
      const std::vector<int8_t> weights(64 * 64 * 9, static_cast<int8_t>(weight));
      Names derived;
      for (const ConvAlgorithm* algorithm : algorithms_for(task)) {
        const ImageLayout in = image_layout(64, 32, 32, algorithm->needs(task).padding);
        const ConvForm form = make_form(*algorithm, task, {in}, weights);
        if (form.weights == nullptr) continue;
        derived.push_back(algorithm->name(task.shape));
        CHECK_EQ(form.weights->form() == "taps and factors s8", derived.back() == "winograd 2x2");
      }
      Names want{"panels", "winograd 4x4"};
      if (fits && row->winograd_bytes != nullptr) want.push_back("winograd 2x2");
      CHECK(derived == want);
    }
  }
  force_isa("auto");
}

/// Where kernels add products in 16 bits, levels that lack bits leave room as weights do.
TEST(products_of_narrow_levels) {
  for (const KernelRow* row : kernel_rows()) {
    if (!isa_supported(row->isa)) continue;
    const check::Family family(row->name);
    CHECK_EQ(product_bits(*row, 8, 255), 8);
    CHECK_EQ(product_bits(*row, 3, 255), 3);
    const bool narrow = row->isa == Isa::Avx2 || row->isa == Isa::Avx512;
    CHECK_EQ(product_bits(*row, 8, 63), narrow ? 6 : 8);
    CHECK_EQ(product_bits(*row, 8, 127), narrow ? 7 : 8);
    CHECK_EQ(product_bits(*row, 8, 64), narrow ? 7 : 8);
    CHECK_EQ(product_bits(*row, 8, 128), 8);
    CHECK_EQ(product_bits(*row, 7, 100), narrow ? 6 : 7);
    CHECK_EQ(product_bits(*row, 4, 15), narrow ? 2 : 4);
    CHECK_EQ(product_bits(*row, 2, 1), 2);
    force_isa(row->name);
    ConvTask task{*row, {.batch = 1, .in_channels = 64, .in_h = 9, .in_w = 9}, {}, 8, false};
    task.shape.out_channels = 32;
    task.qmax = 63;
    const std::vector<int8_t> weights(64 * 32, int8_t{-128});
    const ImageLayout in = image_layout(64, 9, 9, {});
    const ConvForm form = make_form(*algorithms_for(task).front(), task, {in}, weights);
    CHECK_EQ(form.weights->form(), std::string(narrow ? "products of 6 bits" : ""));
  }
  force_isa("auto");
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

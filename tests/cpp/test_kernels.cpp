// Kernels of every instruction set against the scalar reference, in C++ so that the sanitizers see
// them: operands live in memory of exactly their size between unreadable pages, so that a stray
// read or write is an error, not luck.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "cpu/isa/avx2/arrange.hpp"
#include "cpu/kernel_table.hpp"
#include "describe.hpp"
#include "exact.hpp"
#include "formats/panels.hpp"
#include "seed.hpp"

using namespace adalayer;

namespace {

std::mt19937 rng(check::seed(20240607));

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

TEST(unpacking) {
  for (int bits = 2; bits <= 8; ++bits) {
    const int tiles = 3;
    std::vector<uint8_t> packed(static_cast<size_t>(tiles) * 128 * bits);
    for (auto& byte : packed)
      byte = static_cast<uint8_t>(uniform(0, 255));
    std::vector<int8_t> want(tiles * formats::kTileBytes), got(want.size());
    formats::unpack_tiles_scalar(packed.data(), bits, tiles, want.data());
    for (const cpu::KernelRow* row : cpu::kernel_rows()) {
      if (!isa_supported(row->isa)) continue;
      const check::Family family(row->name);
      const check::About about(
          [&] { return text_of(*row) + ", " + std::to_string(bits) + " bits"; });
      row->unpack_tiles(packed.data(), bits, tiles, got.data());
      CHECK(got == want);
      std::fill(got.begin(), got.end(), int8_t{0});
      cpu::unpacker (*row)(packed.data(), bits, tiles, got.data());
      CHECK(got == want);
    }
  }
}

TEST(bitmask_tiles) {
  for (int bits = 2; bits <= 8; ++bits)
    for (const int zeros : {0, 30, 80, 100}) {
      const int tiles = 5;
      const int low = -(1 << (bits - 1)), high = (1 << (bits - 1)) - 1;
      std::vector<int8_t> want(tiles * formats::kTileBytes), got(want.size());
      for (auto& w : want)
        w = static_cast<int8_t>(uniform(1, 100) <= zeros ? 0 : uniform(low, high));
      int64_t bytes = 0;
      for (int t = 0; t < tiles; ++t)
        bytes += formats::bitmask_tile_bytes(want.data() + t * formats::kTileBytes, bits);
      const Exact<uint8_t> packed(static_cast<size_t>(bytes + formats::kBitmaskSlack));
      uint8_t* at = packed.data();
      for (int t = 0; t < tiles; ++t)
        at += formats::pack_bitmask_tile(want.data() + t * formats::kTileBytes, bits, at);
      CHECK_EQ(at - packed.data(), bytes);
      formats::expand_tiles_scalar(packed.data(), bits, tiles, got.data());
      CHECK(got == want);
      for (const cpu::KernelRow* row : cpu::kernel_rows()) {
        if (!isa_supported(row->isa)) continue;
        const check::Family family(row->name);
        const cpu::UnpackTiles expand = cpu::bitmask_kernels(*row).expand;
        if (expand == nullptr) continue;
        const check::About about([&] {
          return text_of(*row) + ", " + std::to_string(bits) + " bits, " + std::to_string(zeros) +
                 " % zeros";
        });
        std::fill(got.begin(), got.end(), int8_t{0});
        expand(packed.data(), bits, tiles, got.data());
        CHECK(got == want);
      }
    }
}

// How weights and levels are filled: the extremes are where int16 sums would overflow.
enum class Fill { Random, Small, Bell, Low, High, Mixed };
constexpr Fill kFills[] = {Fill::Random, Fill::Small, Fill::Bell,
                           Fill::Low,    Fill::High,  Fill::Mixed};
constexpr int kFillCount = static_cast<int>(std::size(kFills));

int fill_value(Fill fill, int low, int high) {
  switch (fill) {
    case Fill::Low:
      return low;
    case Fill::High:
      return high;
    case Fill::Mixed:
      return uniform(0, 1) == 0 ? low : high;
    case Fill::Small:  // most near the middle, some at the ends
      return uniform(0, 19) == 0 ? uniform(low, high)
                                 : std::clamp((low + high) / 2 + uniform(-9, 9), low, high);
    case Fill::Bell: {  // as in trained layers: some pairs of neighbours are beyond int16
      const double spread = (high - low) / 7.0;
      const double value = std::normal_distribution<double>((low + high) / 2.0, spread)(rng);
      return std::clamp(static_cast<int>(std::lround(value)), low, high);
    }
    default:
      return uniform(low, high);
  }
}

/// Operands of one product of the kernel table, in memory of exactly the size that they may read.
/// Rows and steps lie anywhere.
struct Product {
  int bits, rows, steps, tiles, qmax;
  std::vector<int32_t> row_offsets;
  std::vector<int64_t> offsets;
  std::vector<uint8_t> live;
  std::vector<int8_t> weights;  // unpacked tiles [tiles][steps]
  std::vector<uint8_t> packed;  // the same
  std::optional<Exact<uint8_t>> levels;
  std::vector<int64_t> sums;  // [rows][columns]

  /// `whole`: all 64 bytes of a step are read, else just the live quads.
  Product(int width, int row_count, int step_count, int tile_count, Fill weight_fill,
          Fill level_fill, bool whole, int largest_level = 255)
      : bits(width), rows(row_count), steps(step_count), tiles(tile_count), qmax(largest_level) {
    for (int step = 0; step < steps; ++step) {
      live.push_back(static_cast<uint8_t>(uniform(0, 2) == 0 ? uniform(1, 16) : 16));
      offsets.push_back(uniform(0, 999));
    }
    for (int row = 0; row < rows; ++row)
      row_offsets.push_back(uniform(0, 4999));
    int64_t end = 0;
    for (int step = 0; step < steps; ++step)
      for (int row = 0; row < rows; ++row)
        end = std::max(end, row_offsets[row] + offsets[step] + (whole ? 64 : live[step] * 4));
    levels.emplace(static_cast<size_t>(end));
    for (size_t i = 0; i < levels->size(); ++i)
      (*levels)[i] = static_cast<uint8_t>(fill_value(level_fill, 0, qmax));
    // Weights of bytes that are not live are zero.
    const int low = -(1 << (bits - 1)), high = (1 << (bits - 1)) - 1;
    weights.resize(static_cast<size_t>(tiles * steps) * formats::kTileBytes, 0);
    packed.resize(static_cast<size_t>(tiles * steps * 128 * bits));
    for (int i = 0; i < tiles * steps; ++i) {
      int8_t* tile = weights.data() + i * formats::kTileBytes;
      for (int w = 0; w < live[i % steps] * 64; ++w)
        tile[w] = static_cast<int8_t>(fill_value(weight_fill, low, high));
      formats::pack_tile(tile, bits, packed.data() + i * 128 * bits);
    }
    add_up();
  }

  std::string text() const {
    return std::to_string(bits) + " bits, " + std::to_string(rows) + " rows, " +
           std::to_string(steps) + " steps, " + std::to_string(tiles) + " tiles, levels to " +
           std::to_string(qmax);
  }

  const int8_t* tile(int t) const { return weights.data() + t * steps * formats::kTileBytes; }

  int64_t want(int row, int column) const {
    return sums[static_cast<size_t>(row * tiles * 16 + column)];
  }

  /// Sums that every kernel has to give, from weights and levels.
  void add_up() {
    sums.assign(static_cast<size_t>(rows * tiles * 16), 0);
    for (int row = 0; row < rows; ++row)
      for (int t = 0; t < tiles; ++t)
        for (int s = 0; s < steps; ++s)
          for (int d = 0; d < live[s] * 4; ++d) {
            const int64_t level = (*levels)[static_cast<size_t>(row_offsets[row] + offsets[s] + d)];
            const int8_t* w = tile(t) + s * formats::kTileBytes + d / 4 * 64 + d % 4;
            int64_t* sum = sums.data() + (row * tiles + t) * 16;
            for (int column = 0; column < 16; ++column)
              sum[column] += level * w[column * 4];
          }
  }
};

/// The column tiles of a product as the row's gemm wants eight-bit weights.
Exact<int8_t> arranged(const cpu::TileArrangement& arrangement, const Product& p) {
  const int64_t bytes = p.steps * formats::kTileBytes;
  const int64_t pitch = bytes + arrangement.extra_bytes(p.steps);
  const Exact<uint8_t> scratch(static_cast<size_t>(arrangement.scratch_bytes(p.steps)));
  Exact<int8_t> tiles(static_cast<size_t>(p.tiles * pitch));
  for (int t = 0; t < p.tiles; ++t) {
    std::memcpy(tiles.data() + t * pitch, p.tile(t), static_cast<size_t>(bytes));
    arrangement.arrange(tiles.data() + t * pitch, p.steps, p.live.data(), p.qmax, scratch.data());
  }
  return tiles;
}

/// The row's products on their way to u8, in one call: every kind of epilogue in turn.
void check_gemm_requantize(const cpu::KernelRow& row, const Product& p, const cpu::GemmArgs& g) {
  static int turn = 0;
  const int kind = turn++;
  const bool with_residual = kind % 2 == 1, with_table = kind % 5 == 0, whole = kind % 3 != 0;
  const int cols = p.tiles * 16 - (kind % 3 == 2 ? 0 : uniform(0, 15));
  const int pitch = p.tiles * 16;
  cpu::ConvEpilogue e;
  std::vector<int32_t> correction;
  std::vector<float> scale, bias;
  for (int c = 0; c < cpu::epilogue_size(pitch); ++c) {
    correction.push_back(uniform(-100000, 100000));
    scale.push_back(static_cast<float>(uniform(1, 1000)) * 1e-6f);
    bias.push_back(static_cast<float>(uniform(-1000, 1000)) * 0.01f);
  }
  e.correction = correction.data();
  e.scale = scale.data();
  e.bias = bias.data();
  e.residual_scale = 0.37f;
  e.residual_zero = 17;
  e.bounded = kind % 4 < 2;
  uint8_t table[256];
  for (int i = 0; i < 256; ++i)
    table[i] = static_cast<uint8_t>(255 - i);
  e.finish = {-20.0f, 200.0f, 31, with_table ? table : nullptr, 0.83f};
  std::vector<int32_t> at;  // rows in any order
  for (int r = 0; r < p.rows; ++r)
    at.push_back((p.rows - 1 - r) * pitch);
  const auto bytes = static_cast<size_t>(p.rows * pitch);
  const Exact<uint8_t> out(bytes), residual(bytes);
  for (size_t i = 0; i < bytes; ++i) {
    out[i] = 99;
    residual[i] = static_cast<uint8_t>(uniform(0, 255));
  }
  cpu::RequantizeArgs q{};
  q.cols = cols;
  q.whole = whole;
  q.out_offset = at.data();
  q.out = out.data();
  if (with_residual) {
    q.residual_offset = at.data();
    q.residual = residual.data();
  }
  q.epilogue = &e;
  row.begin();
  row.gemm_requantize(g, q, cpu::requantizer(row));
  row.end();
  bool equal = true;
  for (int r = 0; r < p.rows; ++r)
    for (int c = 0; c < pitch; ++c) {
      const uint8_t got = out[static_cast<size_t>(at[r] + c)];
      if (c >= cols) {
        equal = equal && (whole || got == 99);
        continue;
      }
      float y = conv_value(static_cast<int32_t>(p.want(r, c)) + correction[c], scale[c], bias[c]);
      if (with_residual)
        y += dequantize_value(residual[static_cast<size_t>(at[r] + c)], e.residual_scale,
                              e.residual_zero);
      equal = equal && got == finish_u8(y, e.finish);
    }
  CHECK_MSG(equal, "requantized, epilogue " + std::to_string(kind));
}

void check_gemm(const cpu::KernelRow& row, const Product& p, const Exact<int8_t>* tiles) {
  const check::About about(
      [&] { return text_of(row) + ", " + p.text() + (tiles == nullptr ? "" : ", arranged"); });
  std::vector<int32_t> sums(static_cast<size_t>(p.rows) * cpu::kBlockCols, -1);
  cpu::GemmArgs g{};
  g.activations = p.levels->data();
  g.row_offsets = p.row_offsets.data();
  g.step_offsets = p.offsets.data();
  g.live_quads = p.live.data();
  g.steps = p.steps;
  g.tile0 = p.tile(0);
  g.tile1 = p.tiles == 2 ? p.tile(1) : nullptr;
  g.weight_bits = cpu::product_bits(row, p.bits, p.qmax);
  if (tiles != nullptr) {
    g.arranged = true;
    g.tile0 = tiles->data();
    if (p.tiles == 2) g.tile1 = g.tile0 + tiles->size() / 2;
  }
  g.rows = p.rows;
  g.sums = sums.data();
  row.begin();
  row.gemm(g);
  row.end();
  bool equal = true;
  for (int r = 0; r < p.rows; ++r)
    for (int c = 0; c < p.tiles * 16; ++c)
      equal = equal && sums[static_cast<size_t>(r * cpu::kBlockCols + c)] == p.want(r, c);
  CHECK(equal);
  if (row.gemm_requantize != nullptr) check_gemm_requantize(row, p, g);
}

/// In every form of the weights that the row takes.
void check_gemm(const cpu::KernelRow& row, const Product& p) {
  const check::Family family(row.name);
  if (row.arrangement == nullptr || cpu::product_bits(row, p.bits, p.qmax) < 8)
    check_gemm(row, p, nullptr);
  if (row.arrangement == nullptr) return;
  const Exact<int8_t> tiles = arranged(*row.arrangement, p);
  check_gemm(row, p, &tiles);
}

TEST(every_row_is_whole) {
  for (const cpu::KernelRow* row : cpu::kernel_rows()) {
    const check::About about([&] { return text_of(*row); });
    CHECK(row->quantize_row && row->quantize_planar && row->fake_quantize && row->unpack_tiles);
    CHECK(row->begin && row->end && row->gemm && row->gemv && row->store && row->requantize);
    CHECK(row->gemm_rows >= 1 && row->gemm_rows <= cpu::kGemmRows);
    const bool flattened = row->positions == cpu::Positions::Flattened;
    CHECK_EQ(row->block != nullptr, flattened);
    const cpu::StemKernels& s = row->stem;
    CHECK(!flattened || (s.quantize_quads && s.interleave_pairs && s.interleave_fours));
    CHECK(row->grouped->depthwise && row->grouped->in_lane && row->grouped->broadcast);
    const cpu::WinogradKernels& w = *row->winograd;
    CHECK(w.multiply && w.groups >= 1 && w.rows >= 1);
    for (int form = 0; form < kWinogradForms; ++form)
      CHECK(w.input[form] && w.output[form]);
    if (const cpu::WinogradByteKernels* b = row->winograd_bytes)
      CHECK(b->input && b->multiply && b->cell > 2 && b->rows % b->together == 0);
    const cpu::ImageKernels& i = *row->image;
    CHECK(i.copy && i.lookup && i.gather && i.add && i.mul && i.line);
    CHECK(i.max_window && i.average_window && i.bilinear && i.moments && i.normalize);
    CHECK(i.quantize_planar && i.quantize_pixels && i.dequantize_planar && i.dequantize_row);
    CHECK(i.blend_columns && i.blend_rows && i.fma_values && i.softmax && i.function && i.combine);
  }
}

/// The matrix product of every row of the table, alone: 1..64 rows, one and two column tiles.
TEST(gemm_of_every_row) {
  int i = 0;
  for (int bits = 2; bits <= 8; ++bits)
    for (int rows = 1; rows <= 64; ++rows) {
      const int steps = 1 + i % 7, tiles = 1 + i / 7 % 2;
      const Product p(bits, rows, steps, tiles, kFills[i % kFillCount],
                      kFills[i / kFillCount % kFillCount], false);
      ++i;
      for (const cpu::KernelRow* row : cpu::kernel_rows())
        if (isa_supported(row->isa)) check_gemm(*row, p);
    }
}

/// Long reductions and as many rows as the row of the table takes, with every pair of fills.
TEST(gemm_of_many_rows) {
  const int row_counts[] = {33, 49, 56, 101, cpu::kGemmRows}, step_counts[] = {16, 17, 35};
  int i = 0;
  for (int bits = 2; bits <= 8; ++bits)
    for (Fill weights : kFills)
      for (Fill levels : kFills) {
        const int rows = row_counts[i % kFillCount == 0 ? 4 : i % 4], steps = step_counts[i % 3];
        const Product p(bits, rows, steps, 1 + i / 3 % 2, weights, levels, false);
        ++i;
        for (const cpu::KernelRow* row : cpu::kernel_rows())
          if (isa_supported(row->isa) && rows <= row->gemm_rows) check_gemm(*row, p);
      }
}

/// Around the levels up to which two products, or eight, of the largest weights of either sign are
/// what an int16 just holds, and just does not.
TEST(gemm_of_every_largest_level) {
  int i = 0;
  for (const int qmax : {1, 15, 31, 32, 63, 64, 65, 85, 86, 126, 127, 128, 129, 130, 170, 254})
    for (Fill weights : kFills)
      for (Fill levels : {Fill::High, Fill::Mixed, Fill::Random}) {
        const Product p(i % 5 == 4 ? 7 : 8, 1 + i % 19, 1 + i % 11, 1 + i % 2, weights, levels,
                        false, qmax);
        ++i;
        for (const cpu::KernelRow* row : cpu::kernel_rows())
          if (isa_supported(row->isa)) check_gemm(*row, p);
      }
}

#ifdef ADALAYER_HAVE_AVX2
/// A column tile of equal weights, times the largest level.
Product equal_products(int qmax, int weight, int steps) {
  Product p(8, 9, steps, 1, Fill::Low, Fill::High, false, qmax);
  std::fill(p.live.begin(), p.live.end(), uint8_t{16});
  std::fill(p.weights.begin(), p.weights.end(), static_cast<int8_t>(weight));
  std::fill(p.row_offsets.begin(), p.row_offsets.end(), 0);
  std::fill(p.offsets.begin(), p.offsets.end(), 0);
  p.levels.emplace(size_t{64});
  std::fill_n(p.levels->data(), 64, static_cast<uint8_t>(qmax));
  p.add_up();
  return p;
}

/// The quads of a tile of equal weights, by how many of them int16 adds up.
TEST(largest_groups_that_int16_holds) {
  using Table = cpu::ArrangedTable;
  struct Case {
    int qmax, weight;
    uint32_t Table::* kind;
  };
  const Case cases[] = {
      {255, 16, &Table::four},    {255, 17, &Table::paired},  {255, 32, &Table::paired},
      {255, 33, &Table::whole},   {255, 64, &Table::whole},   {255, 65, &Table::wide},
      {255, -16, &Table::four},   {255, -17, &Table::paired}, {255, -33, &Table::whole},
      {255, -64, &Table::whole},  {255, -65, &Table::wide},   {127, 32, &Table::four},
      {127, 33, &Table::paired},  {127, 64, &Table::paired},  {127, 65, &Table::whole},
      {127, 127, &Table::whole},  {127, -32, &Table::four},   {127, -33, &Table::paired},
      {127, -64, &Table::paired}, {127, -65, &Table::whole},  {127, -128, &Table::whole},
      {128, 31, &Table::four},    {128, 32, &Table::paired},  {128, 127, &Table::whole},
      {128, -32, &Table::four},   {128, -128, &Table::whole},  // -32768 is held, 32768 is not
      {129, 127, &Table::whole},  {129, -127, &Table::whole}, {129, -128, &Table::wide},
      {130, 126, &Table::whole},  {130, 127, &Table::wide},   {63, 127, &Table::paired},
      {64, -128, &Table::paired}, {65, -128, &Table::whole},  {31, 127, &Table::four},
      {32, -128, &Table::four},   {33, -128, &Table::paired}, {1, -128, &Table::four}};
  for (const Case& c : cases) {
    const Product p = equal_products(c.qmax, c.weight, 6);
    for (const cpu::KernelRow* row : cpu::kernel_rows()) {
      if (row->arrangement == nullptr || !isa_supported(row->isa)) continue;
      const Exact<int8_t> tiles = arranged(*row->arrangement, p);
      const int lists = row->isa == Isa::Avx2 ? 2 : 1;  // of the vectors that a quad has
      for (int list = 0; list < lists; ++list)
        CHECK_MSG(cpu::arranged_table(tiles.data(), p.steps, list).*c.kind == 96,
                  std::string(row->name) + ", levels to " + std::to_string(c.qmax) + ", weights " +
                      std::to_string(c.weight));
      check_gemm(*row, p, &tiles);
    }
  }
}

/// Few steps are multiplied in bytes where int16 holds every pair, else in 16 bits.
TEST(forms_of_few_steps) {
  if (!isa_supported(Isa::Avx2)) return;
  struct Case {
    int qmax, weight;
    cpu::PlainForm form;
  };
  for (const Case& c :
       {Case{255, 64, cpu::PlainForm::Bytes}, Case{255, 65, cpu::PlainForm::Words},
        Case{128, -128, cpu::PlainForm::Bytes}, Case{129, 127, cpu::PlainForm::Bytes},
        Case{129, -128, cpu::PlainForm::Words}, Case{130, 127, cpu::PlainForm::Words}})
    for (const int steps : {1, 2}) {
      const Product p = equal_products(c.qmax, c.weight, steps);
      const check::About about([&] {
        return "levels to " + std::to_string(c.qmax) + ", weights of " + std::to_string(c.weight) +
               ", " + std::to_string(steps) + " steps";
      });
      const Exact<int8_t> tiles = arranged(cpu::kAvx2Arrangement, p);
      CHECK(cpu::arranged_table(tiles.data(), steps, 0).plain_form == c.form);
      check_gemm(cpu::kAvx2Row, p, &tiles);
    }
}
#endif

/// The matrix-vector product of every row of the table, and what the machine has in place of it.
TEST(gemv_of_every_row) {
  int i = 0;
  for (int bits = 2; bits <= 8; ++bits)
    for (int rows = 1; rows <= cpu::kGemvRows; ++rows)
      for (int steps : {1, 2, 5, 9}) {
        const int tiles = uniform(1, 4);
        const int qmax = bits == 8 && i % 2 == 1 ? 63 : 255;
        const Product p(bits, rows, steps, tiles, kFills[i % kFillCount],
                        kFills[i / kFillCount % kFillCount], true, qmax);
        ++i;
        for (const cpu::KernelRow* row : cpu::kernel_rows()) {
          const bool is_arranged = row->arrangement != nullptr && bits == 8 && qmax == 255;
          if (!isa_supported(row->isa) || is_arranged) continue;
          const check::Family family(row->name);
          for (const cpu::Gemv gemv : {row->gemv, cpu::gemv(*row)}) {
            const int64_t stride = tiles * 16 + uniform(0, 9);
            const Exact<int32_t> sums(static_cast<size_t>((rows - 1) * stride + tiles * 16));
            const auto packed = Exact<uint8_t>::of(p.packed);
            cpu::GemvArgs g{};
            for (int r = 0; r < rows; ++r)
              g.activations[r] = p.levels->data() + p.row_offsets[r];
            g.step_offsets = p.offsets.data();
            g.steps = steps;
            g.packed = packed.data();
            g.bits = bits;
            g.rows = rows;
            g.column_tiles = tiles;
            g.sums = sums.data();
            g.sums_stride = stride;
            gemv(g);
            const check::About about([&] { return text_of(*row) + ", " + p.text(); });
            bool equal = true;
            for (int r = 0; r < rows; ++r)
              for (int c = 0; c < tiles * 16; ++c)
                equal = equal && sums[static_cast<size_t>(r * stride + c)] == p.want(r, c);
            CHECK(equal);
          }
        }
      }
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }

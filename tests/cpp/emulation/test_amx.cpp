// The emulated tile instructions themselves: their arithmetic, and that misuse is found.
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "amx.hpp"
#include "check.hpp"
#include "core/cpu_features.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/probe.hpp"
#include "exact.hpp"

using namespace adalayer;
using amx_emulation::Config;
using amx_emulation::Fault;

namespace {

std::mt19937 g_random(3);

int pick(int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(g_random); }

/// Tile 0 for sums of `rows` x `columns`, 1 for levels and 2 for weights with a reduction of 4 * k.
Config product_shapes(int rows, int columns, int k) {
  Config c{};
  c.palette = 1;
  const auto set = [&](int tile, int tile_rows, int row_bytes) {
    c.rows[tile] = static_cast<uint8_t>(tile_rows);
    c.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
  };
  set(0, rows, 4 * columns);
  set(1, rows, 4 * k);
  set(2, k, 4 * columns);
  return c;
}

/// The tiles of a thread for the length of a test.
struct Configured {
  explicit Configured(const Config& c) { _tile_loadconfig(&c); }
  ~Configured() { _tile_release(); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;
};

}  // namespace

TEST(products_of_every_shape) {
  for (int i = 0; i < 300; ++i) {
    const int rows = pick(1, 16), columns = pick(1, 16), k = pick(1, 16);
    const bool extreme = i % 3 == 0;
    // Rows lie apart, and memory ends behind the last: nothing else may be touched.
    const int level_stride = 4 * k + pick(0, 9), weight_stride = 4 * columns + pick(0, 9);
    const Exact<uint8_t> levels(static_cast<size_t>((rows - 1) * level_stride + 4 * k));
    const Exact<int8_t> weights(static_cast<size_t>((k - 1) * weight_stride + 4 * columns));
    const Exact<int32_t> sums(static_cast<size_t>(rows * columns));
    for (size_t j = 0; j < levels.size(); ++j)
      levels[j] = static_cast<uint8_t>(extreme ? 255 : pick(0, 255));
    for (size_t j = 0; j < weights.size(); ++j)
      weights[j] = static_cast<int8_t>(extreme ? -128 : pick(-128, 127));
    std::vector<int32_t> want(sums.size());
    for (size_t j = 0; j < sums.size(); ++j)
      want[j] = sums[j] = pick(INT32_MIN, INT32_MAX);  // sums wrap around
    for (int m = 0; m < rows; ++m)
      for (int n = 0; n < columns; ++n) {
        int64_t sum = want[static_cast<size_t>(m * columns + n)];
        for (int d = 0; d < 4 * k; ++d)
          sum += levels[static_cast<size_t>(m * level_stride + d)] *
                 weights[static_cast<size_t>(d / 4 * weight_stride + n * 4 + d % 4)];
        want[static_cast<size_t>(m * columns + n)] = static_cast<int32_t>(sum);
      }
    const Configured tiles(product_shapes(rows, columns, k));
    _tile_loadd(0, sums.data(), 4 * columns);
    _tile_loadd(1, levels.data(), level_stride);
    _tile_loadd(2, weights.data(), weight_stride);
    _tile_dpbusd(0, 1, 2);
    _tile_stored(0, sums.data(), 4 * columns);
    CHECK_MSG(std::memcmp(sums.data(), want.data(), sums.size() * 4) == 0,
              std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(k));
    _tile_zero(0);
    _tile_stored(0, sums.data(), 4 * columns);
    for (size_t j = 0; j < sums.size(); ++j)
      CHECK_EQ(sums[j], 0);
  }
}

TEST(configurations_that_fault) {
  const Config good = product_shapes(4, 5, 6);
  const auto check = [&](const char* text, auto&& change) {
    Config c = good;
    change(c);
    CHECK_THROWS(_tile_loadconfig(&c), Fault, text);
    CHECK_EQ(amx_emulation::configured_threads(), 0);
  };
  check("palette", [](Config& c) { c.palette = 2; });
  check("start_row", [](Config& c) { c.start_row = 1; });
  check("reserved", [](Config& c) { c.reserved[13] = 1; });
  check("too large", [](Config& c) { c.rows[0] = 17; });
  check("too large", [](Config& c) { c.row_bytes[0] = 65; });
  check("alone", [](Config& c) { c.rows[7] = 1; });
  check("alone", [](Config& c) { c.row_bytes[7] = 4; });
  check("must be 0", [](Config& c) { c.rows[8] = c.row_bytes[8] = 4; });
  const Configured tiles(good);
  CHECK_THROWS(_tile_loadconfig(&good), Fault, "were not released");
  CHECK_EQ(amx_emulation::configured_threads(), 1);
}

TEST(uses_that_fault) {
  std::array<uint8_t, 1024> memory{};
  const auto each = [&](int tile, const char* text) {
    CHECK_THROWS(_tile_zero(tile), Fault, text);
    CHECK_THROWS(_tile_loadd(tile, memory.data(), 64), Fault, text);
    CHECK_THROWS(_tile_stored(tile, memory.data(), 64), Fault, text);
    CHECK_THROWS(_tile_dpbusd(tile, 1, 2), Fault, text);
  };
  each(0, "without configuration");
  {
    const Configured tiles(product_shapes(4, 5, 6));
    each(3, "tile 3 is not configured");
    each(8, "no tile 8");
    each(-1, "no tile -1");
    CHECK_THROWS(_tile_dpbusd(0, 1, 1), Fault, "three different");
    CHECK_THROWS(_tile_dpbusd(0, 0, 2), Fault, "three different");
    CHECK_THROWS(_tile_dpbusd(0, 1, 0), Fault, "three different");
    CHECK_THROWS(_tile_dpbusd(1, 0, 2), Fault, "do not fit");
  }
  each(0, "without configuration");
  const auto check = [&](const char* text, int tile, int rows, int row_bytes) {
    Config c = product_shapes(4, 5, 6);
    c.rows[tile] = static_cast<uint8_t>(rows);
    c.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
    const Configured tiles(c);
    CHECK_THROWS(_tile_dpbusd(0, 1, 2), Fault, text);
  };
  check("do not fit", 0, 5, 20);
  check("do not fit", 0, 4, 24);
  check("do not fit", 1, 4, 20);
  check("do not fit", 2, 5, 20);
  check("multiples of 4", 0, 4, 21);
  check("multiples of 4", 1, 4, 26);
  check("multiples of 4", 2, 6, 23);
}

TEST(tiles_start_with_rubbish) {
  std::array<int32_t, 20> sums{};
  for (int round = 0; round < 2; ++round) {
    const Configured tiles(product_shapes(4, 5, 6));
    _tile_stored(0, sums.data(), 20);
    for (const int32_t sum : sums)
      CHECK(sum != 0);
    _tile_zero(0);
  }
}

TEST(every_thread_has_its_own_tiles) {
  const Config shapes = product_shapes(1, 1, 1);
  const Configured tiles(shapes);
  _tile_zero(0);
  std::thread([&] {
    CHECK_THROWS(_tile_zero(0), Fault, "without configuration");
    const Configured others(shapes);
    CHECK_EQ(amx_emulation::configured_threads(), 2);
  }).join();
  CHECK_EQ(amx_emulation::configured_threads(), 1);
  int32_t sum = 1;
  _tile_stored(0, &sum, 4);
  CHECK_EQ(sum, 0);
}

/// Status of a process that did `body` and then left main() with 0.
template <class Body>
int exit_status(const Body& body) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    // What it says on its way out is not about this run.
    for (std::FILE* stream : {stdout, stderr})
      if (std::freopen("/dev/null", "w", stream) == nullptr) _exit(2);
    body();
    std::exit(0);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(a_process_that_leaves_tiles_configured_fails) {
  const Config shapes = product_shapes(1, 1, 1);
  const auto multiply = [&] {
    _tile_loadconfig(&shapes);
    _tile_dpbusd(0, 1, 2);
  };
  CHECK_EQ(exit_status(multiply), 1);
  CHECK_EQ(exit_status([&] {
             multiply();
             _tile_release();
           }),
           0);
}

/// The row is in the table, and what it multiplies with are the emulated tiles.
TEST(the_table_has_the_emulated_row) {
  CHECK(isa_supported(Isa::Amx));
  force_isa("amx");
  const cpu::KernelRow& row = *cpu::active_kernels();
  CHECK_EQ(std::string(row.name), std::string("amx"));
  const std::vector<uint8_t> levels(16 * 64, 2);
  const std::vector<int8_t> weights(1024, -3);
  const int64_t offset = 0;
  std::vector<int32_t> sums(cpu::kBlockRows * cpu::kBlockCols, 0);
  cpu::BlockArgs b{};
  b.activations = levels.data();
  b.row_stride = 64;
  b.step_offsets = &offset;
  b.steps = 1;
  b.packed[0] = reinterpret_cast<const uint8_t*>(weights.data());
  b.bits = 8;
  b.rows = 1;
  b.sums = sums.data();
  CHECK_THROWS(row.block(b), Fault, "without configuration");
  const long long before = amx_emulation::products();
  row.begin();
  CHECK_THROWS(row.begin(), Fault, "were not released");
  row.block(b);
  row.end();
  CHECK_EQ(amx_emulation::products(), before + 1);
  CHECK_EQ(sums[0], 64 * 2 * -3);
  force_isa("auto");
}

TEST(the_probe_multiplies_and_releases) {
  const long long before = amx_emulation::products();
  const cpu::Probe probe = cpu::probe_cores(1);
  CHECK_EQ(probe.operations, (amx_emulation::products() - before) / 2 * 2 * 16 * 16 * 64);
  CHECK_EQ(amx_emulation::configured_threads(), 0);
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

// Levels of quality: planes of stored weights, programs that read them, and the engine that keeps
// the levels.
#include <atomic>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "core/status.hpp"
#include "engine/at_size.hpp"
#include "engine/container.hpp"
#include "engine/leveled_engine.hpp"
#include "engine/levels.hpp"
#include "engine_programs.hpp"
#include "engine_results.hpp"

using namespace adalayer;
using namespace adalayer::engine;
using programs::convolutions;
using programs::leveled;
using programs::narrowed;

namespace {

using programs::Results;

const EngineOptions kStreamed{.weights = WeightForm::Streamed};

Results run(const Engine& e, int threads = 1) { return programs::computed(e, 2, 2.0f, threads); }

Results interpreted(const Program& p) { return programs::interpreted(p, 2, 2.0f); }

/// What `lower` computes as a program of its own: the levels of leveled().
Results wanted(size_t level) {
  return interpreted(narrowed(convolutions(), static_cast<int>(2 * level)));
}

template <class Change>
std::string refusal(const Change& change) {
  Program p = leveled();
  try {
    change(p);
    validate(p);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return {};
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST(planes_are_the_nearest_multiples) {
  for (int stored = 2; stored <= 8; ++stored)
    for (int bits = 2; bits <= stored; ++bits)
      for (int drop = 0; bits + drop <= stored; ++drop) {
        const int top = (1 << (bits - 1)) - 1;
        for (int w = -(1 << (stored - 1)); w < 1 << (stored - 1); ++w) {
          const double exact = std::floor(static_cast<double>(w) / (1 << drop) + 0.5);
          const double clamped = std::fmin(std::fmax(exact, -top - 1), top);
          CHECK_EQ(int{upper_planes(static_cast<int8_t>(w), bits, drop)},
                   static_cast<int>(clamped));
        }
        CHECK_EQ(int{upper_planes(0, bits, drop)}, 0);  // what is pruned stays so
      }
  // All encodings, through the packed bytes.
  for (const int zeros : {1, 3, 64}) {
    std::vector<int8_t> w(32 * 64 * 9, 0);
    for (size_t k = 0; k < w.size(); ++k)
      if (zeros == 64 ? k / 9 % 64 < 8 : k % static_cast<size_t>(zeros) == 0)
        w[k] = static_cast<int8_t>(static_cast<int>(k * 37 % 128) - 64);
    const auto packed = formats::pack_canonical(w, 7, 32, 64, 3, 3);
    const auto got = formats::unpack_canonical(packed, {4, 2});
    for (size_t k = 0; k < w.size(); ++k)
      CHECK_EQ(int{got[k]}, int{upper_planes(w[k], 4, 2)});
    for (const formats::Planes& bad : {formats::Planes{4, 4}, {8, 0}, {1, 0}, {4, -1}, {0, 1}})
      CHECK_THROWS(formats::unpack_canonical(packed, bad), InvalidArgument, "planes of 7");
  }
}

TEST(a_level_computes_what_its_own_program_computes) {
  const Program p = leveled();
  CHECK_EQ(p.levels.size(), size_t{2});
  for (size_t level = 0; level <= 2; ++level) {
    const Program at = at_level(p, level);
    CHECK(at.levels.empty());
    CHECK(interpreted(at) == wanted(level));
    for (const WeightForm form : {WeightForm::Streamed, WeightForm::Resident})
      for (const int threads : {1, 2})
        CHECK(run(Engine(at, {.weights = form}), threads) == wanted(level));
    CHECK(interpreted(own_weights(at)) == wanted(level));
    // One copy of the stored weights.
    for (size_t k = 0; level > 0 && k < p.levels[level - 1].views.size(); ++k)
      CHECK(at.constants[p.constants.size() + k].bytes.is(
          p.constants[p.levels[level - 1].views[k].constant].bytes));
  }
  CHECK(wanted(0) != wanted(1) && wanted(1) != wanted(2));
  CHECK_THROWS(at_level(p, 3), InvalidArgument, "quality level 3 does not exist: there are 3");
  CHECK_THROWS(at_level(convolutions(), 1), InvalidArgument, "there are 1");
}

TEST(levels_in_a_file) {
  const Program p = leveled();
  const auto file = write_program(p);
  CHECK_EQ(int{read_ada_header(file, file.size()).minor}, 4);
  const Program again = read_program(file);
  CHECK(write_program(again) == file);
  for (size_t level = 0; level <= 2; ++level)
    CHECK(interpreted(at_level(again, level)) == wanted(level));
  // Weights are there once; a file without levels is what it was.
  const auto alone = write_program(convolutions());
  CHECK(int{read_ada_header(alone, alone.size()).minor} < 4);
  size_t weights = 0;
  for (const Constant& c : p.constants)
    weights += c.kind == ConstantKind::Weights;
  CHECK_EQ(weights, size_t{5});
  CHECK_THROWS(write_program(at_level(p, 1)), InvalidArgument, "views of weights");
  CHECK(interpreted(read_program(write_program(own_weights(at_level(p, 2))))) == wanted(2));
}

TEST(files_with_damaged_levels) {
  // Whatever is accepted is valid, and runs.
  const auto file = write_program(leveled());
  AdaHeader header;
  std::memcpy(&header, file.data(), sizeof header);
  AdaSection table;
  std::memcpy(&table, file.data() + sizeof header + (header.sections - 1) * sizeof table,
              sizeof table);
  CHECK_EQ(std::string(table.id, 4), "LEVL");
  int accepted = 0;
  for (uint64_t at = table.offset; at + 4 <= table.offset + table.bytes; ++at)
    for (const uint32_t v : {UINT32_MAX, 0x7FFFFFFFu, 0x10000u, 1u, 0u}) {
      auto forged = file;
      std::memcpy(forged.data() + at, &v, 4);
      programs::repair_checksums(forged);
      try {
        const Program p = read_program(forged);
        ++accepted;
        if (at % 16 != 0) continue;
        for (size_t level = 1; level <= p.levels.size(); ++level)
          run(Engine(at_level(p, level), kStreamed));
      } catch (const CorruptData& e) {
        CHECK(*e.what() != '\0');
      }
    }
  CHECK(accepted > 0);
  auto none = file;
  const uint32_t zero = 0;
  std::memcpy(none.data() + table.offset, &zero, 4);
  programs::repair_checksums(none);
  CHECK_THROWS(read_program(none), CorruptData, "section LEVL: expected at least one level");
}

TEST(levels_that_disagree_with_their_program) {
  CHECK_EQ(refusal([](Program&) {}), "");
  using P = Program&;
  CHECK(
      has(refusal([](P p) { p.levels[0].views[0].constant = 99; }), "level 1: constant 99 holds"));
  CHECK(has(refusal([](P p) { p.levels[1].views[0].constant = 1; }), "level 2: constant 1 holds"));
  CHECK(has(refusal([](P p) { p.levels[0].views[0].planes = {7, 2}; }), "planes of 8"));
  CHECK(has(refusal([](P p) { p.levels[0].views[0].planes = {0, 0}; }), "reads none"));
  CHECK(has(refusal([](P p) { p.levels[0].nodes[0].second.ints[2] = 1; }),
            "stride_h: expected 2 as in the program, got 1"));
  CHECK(has(refusal([](P p) { p.levels[0].nodes[0].second.op = OpKind::ConvTranspose; }),
            "expected conv"));
  CHECK(has(refusal([](P p) { p.levels[0].nodes[0].second.output = 0; }), "other values"));
  CHECK(has(refusal([](P p) { p.levels[0].nodes[0].second.name = "x"; }), "expected the name"));
  CHECK(has(refusal([](P p) { p.levels[0].nodes[0].second.constants[0] = 999; }), "level 1"));
  CHECK(has(refusal([](P p) { p.levels[0].nodes[0].second.constants.pop_back(); }), "parameters"));
  CHECK(has(refusal([](P p) { p.levels[0].values[0].second.w = 1; }), "as in the program"));
  CHECK(has(refusal([](P p) { p.levels[0].values[0].second.kind = ValueKind::F32; }), "kind u8"));
  CHECK(has(refusal([](P p) { p.levels[0].values[0].second.scale = NAN; }), "level 1"));
  CHECK(has(refusal([](P p) { p.levels[0].values[0].first = 99; }), "ascending order"));
  CHECK(has(refusal([](P p) { p.levels[0].nodes[1].first = p.levels[0].nodes[0].first; }),
            "ascending order"));
  CHECK(has(refusal([](P p) { p.levels.resize(16, p.levels[0]); }), "at most 16"));
  CHECK(has(refusal([](P p) { add_level(p, leveled()); }), "levels itself"));
  CHECK(has(refusal([](P p) { add_level(p, programs::small_program()); }), "another network"));
  CHECK(has(refusal([](P p) {
              Program other = narrowed(convolutions(), 2);
              for (Constant& c : other.constants)
                if (c.kind == ConstantKind::Weights && weight_bits(c) == 6) {
                  const auto h = formats::read_header(std::as_const(c).bytes);
                  auto w = unpacked_weights(c);
                  w[3] = static_cast<int8_t>(w[3] == 0 ? 1 : 0);
                  c.bytes = formats::pack_canonical(w, 6, h.out_channels, h.group_in, h.kernel_h,
                                                    h.kernel_w);
                }
              add_level(p, other);
            }),
            "its weights of 6 bits are no planes of the program's of 8"));
  // A refused level leaves the program as it was.
  Program p = leveled();
  const auto before = write_program(p);
  CHECK_THROWS(add_level(p, programs::small_program()), InvalidArgument, "level 3");
  CHECK(write_program(p) == before);
}

TEST(the_levels_used_last_are_kept) {
  LeveledEngine engine(leveled(), kStreamed);
  CHECK_EQ(engine.levels(), size_t{3});
  CHECK(engine.at(0) == engine.best());
  CHECK_EQ(engine.info().entries, size_t{0});
  const auto one = engine.at(1);
  CHECK(engine.at(1) == one);
  engine.at(2);
  CHECK_EQ(engine.info().made, uint64_t{2});
  CHECK_EQ(engine.info().entries, size_t{2});
  for (size_t level = 0; level < 3; ++level)
    CHECK(run(*engine.at(level)->compiled()) == wanted(level));
  engine.set_limits({1, size_t{1} << 30});
  CHECK_EQ(engine.info().entries, size_t{1});
  CHECK(run(*one->compiled()) == wanted(1));  // who uses a level keeps it
  engine.at(1);
  CHECK_EQ(engine.info().made, uint64_t{3});
  CHECK_EQ(engine.info().entries, size_t{1});
  engine.set_limits({16, 1});  // the one used last stays, whatever it takes
  CHECK_EQ(engine.info().entries, size_t{1});
  CHECK_THROWS(engine.at(3), InvalidArgument, "quality level 3 does not exist");
  const LeveledEngine small(leveled(), {.weights = WeightForm::Streamed, .memory_bytes = 8 << 20});
  CHECK_EQ(small.info().limits.bytes, size_t{1} << 20);
  CHECK_THROWS(LeveledEngine(leveled(), {.memory_bytes = 1000}), LimitExceeded, "the limit is");
}

TEST(levels_at_other_sizes) {
  Program p = programs::ranged();
  add_level(p, narrowed(programs::ranged(), 2));
  const LeveledEngine engine(p, kStreamed);
  for (const auto& [h, w] : {std::pair{16, 20}, {38, 22}}) {
    const std::vector<int64_t> sizes = {h, w};
    for (const size_t level : {0, 1}) {
      const Program alone = narrowed(programs::sized_network(h, w), static_cast<int>(2 * level));
      CHECK(run(*engine.at(level)->at(sizes)) == interpreted(alone));
    }
  }
}

TEST(threads_that_switch_levels) {
  LeveledEngine engine(leveled(), kStreamed);
  engine.set_limits({1, size_t{1} << 30});  // so that levels come and go meanwhile
  const Results want[] = {wanted(0), wanted(1), wanted(2)};
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int round = 0; round < 30; ++round) {
        const auto level = static_cast<size_t>((t + round) % 3);
        if (run(*engine.at(level)->compiled()) != want[level]) ++wrong;
      }
    });
  for (std::thread& thread : threads)
    thread.join();
  CHECK_EQ(wrong.load(), 0);
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

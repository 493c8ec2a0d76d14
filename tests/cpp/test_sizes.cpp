// Programs made for other image sizes, and the engine that keeps them.
#include <atomic>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "core/status.hpp"
#include "engine/at_size.hpp"
#include "engine/sized_engine.hpp"
#include "engine_programs.hpp"
#include "engine_results.hpp"

using namespace adalayer;
using namespace adalayer::engine;
using programs::ranged;

namespace {

using programs::Results;

Results run(const Engine& e, int threads = 1) { return programs::computed(e, 3, 1.0f, threads); }

Results interpreted(const Program& p) { return programs::interpreted(p, 3, 1.0f); }

template <class Body>
std::string refusal(const Body& body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  return {};
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

const EngineOptions kStreamed{.weights = WeightForm::Streamed};

std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text = "sizes";
  for (const int64_t size : sizes)
    text.append(" ").append(std::to_string(size));
  return text;
}

}  // namespace

TEST(a_program_at_another_size) {
  const Program p = ranged();
  const SizeRules rules = read_sizes(p);
  for (const auto& [h, w] : {std::pair{16, 20}, {8, 8}, {10, 64}, {38, 22}, {64, 64}}) {
    const std::vector<int64_t> sizes = {h, w};
    const check::About about([&] { return text_of(sizes); });
    const Program got = at_size(p, rules, sizes), wanted = programs::sized_network(h, w);
    CHECK_EQ(got.nodes.size(), wanted.nodes.size());
    for (size_t v = 0; v < wanted.values.size(); ++v) {
      CHECK_EQ(got.values[v].c, wanted.values[v].c);
      CHECK_EQ(got.values[v].h, wanted.values[v].h);
      CHECK_EQ(got.values[v].w, wanted.values[v].w);
    }
    for (size_t k = 0; k < wanted.nodes.size(); ++k) {
      CHECK(got.nodes[k].ints == wanted.nodes[k].ints);
      for (size_t c = 0; c < wanted.nodes[k].constants.size(); ++c) {
        const int32_t mine = got.nodes[k].constants[c], other = wanted.nodes[k].constants[c];
        if (other >= 0) CHECK(got.constants[mine].bytes == wanted.constants[other].bytes);
      }
    }
    CHECK(interpreted(got) == interpreted(wanted));
    // Weights are not copied.
    const auto place = static_cast<size_t>(got.nodes[1].constants[0]);
    CHECK(got.constants[place].bytes.is(p.constants[place].bytes));
  }
}

TEST(an_engine_at_other_sizes_has_the_bits_of_its_own) {
  const SizedEngine engine(ranged(), kStreamed);
  const size_t weights = engine.compiled()->weight_bytes();
  for (const auto& [h, w] : {std::pair{16, 20}, {8, 8}, {10, 64}, {38, 22}, {16, 20}}) {
    const std::vector<int64_t> sizes = {h, w};
    const check::About about([&] { return text_of(sizes); });
    const auto at = engine.at(sizes);
    const Results wanted = interpreted(programs::sized_network(h, w));
    CHECK(run(*at) == wanted);
    CHECK(run(*at, 2) == wanted);
    CHECK_EQ(at->weight_bytes(), weights);
  }
  CHECK(engine.at(std::vector<int64_t>{16, 20}) == engine.compiled());
  CHECK_EQ(engine.info().entries, size_t{3});
}

TEST(a_size_that_was_timed_shares_weights_where_it_can) {
  const SizedEngine engine(ranged());
  const std::vector<int64_t> sizes = {32, 40};
  const auto before = engine.at(sizes), timed = engine.warm_up(sizes);
  CHECK(run(*before) == run(*timed));
  CHECK(run(*timed) == interpreted(programs::sized_network(32, 40)));
  CHECK(engine.at(sizes) == timed);
  CHECK(engine.warm_up(sizes) == timed);
  CHECK_EQ(engine.info().made, uint64_t{2});
  // A size beside it runs as it does, with the weights of either.
  const auto beside = engine.at(std::vector<int64_t>{34, 42});
  CHECK(run(*beside) == interpreted(programs::sized_network(34, 42)));
  CHECK_EQ(beside->weight_bytes(), timed->weight_bytes());
}

TEST(the_sizes_used_longest_ago_leave) {
  SizedEngine engine(ranged(), kStreamed, {.entries = 2, .bytes = size_t{1} << 30});
  const auto size = [](int64_t n) { return std::vector<int64_t>{n, n}; };
  const auto first = engine.at(size(8));
  engine.at(size(10));
  engine.at(size(8));
  engine.at(size(12));  // and 10 leaves
  CHECK_EQ(engine.info().entries, size_t{2});
  CHECK(engine.at(size(8)) == first);
  CHECK_EQ(engine.info().made, uint64_t{3});
  engine.at(size(10));
  CHECK_EQ(engine.info().made, uint64_t{4});
  engine.set_limits({.entries = 9, .bytes = 1});
  CHECK_EQ(engine.info().entries, size_t{1});
  CHECK(run(*first) == interpreted(programs::sized_network(8, 8)));  // whoever has one keeps it
  for (int64_t n = 8; n <= 64; n += 2)
    engine.at(size(n));
  CHECK_EQ(engine.info().entries, size_t{1});
  CHECK(engine.info().bytes < size_t{4} << 20);
}

TEST(threads_make_a_size_once) {
  const SizedEngine engine(ranged(), kStreamed);
  const std::vector<Results> wanted = {interpreted(programs::sized_network(24, 30)),
                                       interpreted(programs::sized_network(64, 8))};
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int k = 0; k < 6; ++k) {
        const bool second = (k + t) % 2 != 0;
        const auto at =
            engine.at(second ? std::vector<int64_t>{64, 8} : std::vector<int64_t>{24, 30});
        if (run(*at) != wanted[second]) ++wrong;
      }
    });
  for (std::thread& t : threads)
    t.join();
  CHECK_EQ(wrong.load(), 0);
  CHECK_EQ(engine.info().made, uint64_t{2});
}

TEST(what_is_refused) {
  const SizedEngine engine(ranged(), kStreamed);
  const auto at = [&](std::vector<int64_t> sizes) { return refusal([&] { engine.at(sizes); }); };
  CHECK(has(at({9, 8}), "height: expected a multiple of 2 from 8 to 64, got 9"));
  CHECK(has(at({8, 66}), "width"));
  CHECK(has(at({8}), "expected 2 sizes"));
  CHECK_EQ(engine.info().entries, size_t{0});
  const Program alone = programs::sized_network(16, 20);
  CHECK(has(refusal([&] { at_size(alone, read_sizes(alone), {}); }), "compiled for one size"));
  // A position that is a constant: a sum needs one size.
  Program fixed = ranged();
  fixed.nodes[3].inputs[1] = fixed.nodes[3].inputs[0];
  CHECK(at_size(fixed, read_sizes(fixed), std::vector<int64_t>{8, 8}).nodes.size() > 0);
  // Without its rule, a node says that it is not known, and which one it is.
  Program unknown = ranged();
  std::string text = programs::kSizedRules;
  text.replace(text.find("\"mode\""), 6, "\"keep\"");
  unknown.metadata["adalayer.sizes"] = text;
  CHECK(has(refusal([&] { read_sizes(unknown); }), "\"keep\" is unknown"));
  text = programs::kSizedRules;
  const size_t begin = text.find("\"8\": ");
  text.replace(begin, text.find('}', begin) - begin + 1, "\"8\": {}");
  Program cut = ranged();
  cut.metadata["adalayer.sizes"] = text;
  const std::vector<int64_t> small = {8, 8};
  CHECK(has(refusal([&] { at_size(cut, read_sizes(cut), small); }),
            "node 8 (slice \"layer.slice\")"));
}

TEST(texts_that_are_wrong) {
  const auto with = [](const char* from, const char* to) {
    std::string text = programs::kSizedRules;
    const size_t at = text.find(from);
    CHECK(at != std::string::npos);
    text.replace(at, std::string(from).size(), to);
    return refusal([&] { const SizedEngine engine(ranged(16, 20, text), kStreamed); });
  };
  CHECK(has(with("8, 64, 2", "64, 8, 2"), "64 is more than 8"));
  CHECK(has(with("8, 64, 2", "8, 64, 0"), "expected 1 to"));
  CHECK(has(with("8, 64, 2", "8, 9000000, 2"), "a whole number from 0 to"));
  CHECK(has(with("8, 64, 2", "18, 64, 2"), "own size"));
  CHECK(has(with("[[0, 1]]", "[[0, 0]]"), "is both"));
  CHECK(has(with("[[0, 1]]", "[[0, null]]"), "is the size of no input"));
  CHECK(has(with("[[0, 1]]", "[[0, 2]]"), "a whole number from 0 to 1"));
  CHECK(has(with("\"4\": {", "\"44\": {"), "there is no node \"44\""));
  CHECK(has(with("\"4\": {", "\"4x\": {"), "there is no node"));
  CHECK(has(with("\"4\": {", "\"3\": {"), "has no \"window\""));
  CHECK(has(with("\"up\", \"up\"", "\"up\", \"over\""), "\"over\" is unknown"));
  // Rules of another program, or wrong ones.
  CHECK(has(with("\"nearest\"", "\"linear\""), "another program"));
  CHECK(has(with("[\"like\", 3], [\"like\", 3]", "[\"like\", 0], [\"like\", 3]"), ""));
  CHECK(has(with("[\"like\", 3], [\"like\", 3]", "[\"like\", 11], [\"like\", 3]"), "later"));
  CHECK(has(with("\"leaves\": 1", "\"leaves\": 0"), "another program"));
  CHECK(has(with("{\"parts\": [[4, [4, 1, 1, 1]]]}", "{\"parts\": [[5, [4, 1, 1, 1]]]}"),
            "it would give 5 channels"));
  CHECK(has(with("[4, 1, 1, 1]", "[4, 7, 1, 1]"), "cannot be divided"));
}

TEST(memory_has_a_limit) {
  std::string text = programs::kSizedRules;
  for (size_t at = text.find("64, 2"); at != std::string::npos; at = text.find("64, 2", at + 1))
    text.replace(at, 5, "1000000, 2");
  EngineOptions options = kStreamed;
  options.memory_bytes = 8 << 20;
  const SizedEngine engine(ranged(16, 20, text), options);
  CHECK(run(*engine.at(std::vector<int64_t>{32, 20})) ==
        interpreted(programs::sized_network(32, 20)));
  CHECK(has(refusal([&] { engine.at(std::vector<int64_t>{1500, 1500}); }), "limit"));
  CHECK(!refusal([&] { engine.at(std::vector<int64_t>{1000000, 1000000}); }).empty());
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

// Choices of the planner: what the clock decides, what is kept, and what a damaged cache does.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "engine/engine.hpp"
#include "engine/limits.hpp"
#include "engine/planner.hpp"
#include "engine_programs.hpp"

using namespace programs;

namespace {

namespace fs = std::filesystem;

/// A folder that goes away.
struct Folder {
  fs::path path = fs::temp_directory_path() / ("adalayer-planner-" + std::to_string(::getpid()));
  Folder() { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
};

std::string text_of(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// A program of three convolutions, two of which have weights below 8 bits.
Program three_convolutions() {
  Builder b;
  const auto x = b.value("x", 16, 6, 6, ValueKind::F32);
  auto y = b.node(OpKind::Quantize, {x}, b.value("q", 16, 6, 6));
  const auto conv = [&](const char* name, uint32_t outs, int bits, ValueKind kind) {
    const auto in = static_cast<uint32_t>(b.p.values[static_cast<size_t>(y)].c);
    const bool u8 = kind == ValueKind::U8;
    y = b.node(OpKind::Conv, {y}, b.value(name, outs, 6, 6, kind),
               {3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 255, u8 ? 10 : 0}, {kInverse, -1, 1},
               {b.weights(outs, in, 3, 3, bits), b.floats(std::vector<float>(outs, 0.01f)),
                b.floats(std::vector<float>(outs, 0.5f)), -1});
  };
  conv("a", 32, 4, ValueKind::U8);
  conv("b", 48, 8, ValueKind::U8);
  conv("c", 16, 3, ValueKind::F32);
  b.p.inputs = {x};
  b.p.outputs = {y};
  return b.p;
}

/// Three pointwise convolutions of zeros, but for `rows` output channels of each.
Builder three_with_zeros(int64_t rows) {
  Builder b;
  const auto x = b.value("x", 128, 4, 4, ValueKind::F32);
  auto y = b.node(OpKind::Quantize, {x}, b.value("q", 128, 4, 4));
  for (int k = 0; k < 3; ++k) {
    const int64_t ins = k == 0 ? 128 : 64;
    std::vector<int8_t> weights(static_cast<size_t>(64 * ins), 0);
    std::fill(weights.begin(), weights.begin() + rows * ins, int8_t{3});
    const auto packed =
        b.constant(ConstantKind::Weights,
                   formats::pack_canonical(weights, 4, 64, static_cast<uint32_t>(ins), 1, 1));
    const ValueKind kind = k == 2 ? ValueKind::F32 : ValueKind::U8;
    y = b.node(OpKind::Conv, {y},
               b.value(std::string(1, static_cast<char>('a' + k)), 64, 4, 4, kind),
               {1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 255, k == 2 ? 0 : 10}, {kInverse, -1, 1},
               {packed, b.floats(std::vector<float>(64, 0.01f)),
                b.floats(std::vector<float>(64, 0.5f)), -1});
  }
  b.p.inputs = {x};
  b.p.outputs = {y};
  return b;
}

/// Steps that were never run: for keys, choices and the cache.
struct Plan {
  Program program = three_convolutions();
  std::vector<ValueLayout> layouts = plan_layouts(program);
  std::vector<Step> steps = build_steps(program, layouts, cpu::Room::Several);

  ConvStep& conv(int k) {
    for (Step& step : steps)
      if (step.conv && k-- == 0) return *step.conv;
    std::abort();
  }
};

}  // namespace

TEST(the_clock_decides_for_every_convolution) {
  if (cpu::active_kernels() == nullptr) return;
  Plan plan;
  // `a` is much faster with resident weights, `c` in the other order; `b` gains too little, and
  // has nothing to unpack.
  choose_by_clock(plan.steps, [&](std::vector<double>& seconds) {
    for (size_t k = 0; k < plan.steps.size(); ++k) {
      const Step& step = plan.steps[k];
      if (!step.conv) continue;
      seconds[k] = 1.0;
      if (step.conv.get() == &plan.conv(0) && step.conv->choice().resident) seconds[k] = 0.5;
      if (step.conv.get() == &plan.conv(1) && step.conv->choice().other_order) seconds[k] = 0.96;
      if (step.conv.get() == &plan.conv(2) && step.conv->choice().other_order) seconds[k] = 0.8;
    }
  });
  CHECK(plan.conv(0).choice().resident);
  CHECK((plan.conv(1).choice() == ConvChoice{false, false}));
  CHECK((plan.conv(2).choice() == ConvChoice{false, true}));
  plan.conv(1).choose({true, true});
  CHECK((plan.conv(1).choice() == ConvChoice{false, true}));
}

TEST(a_core_that_changes_its_speed_decides_nothing) {
  if (cpu::active_kernels() == nullptr) return;
  Plan plan;
  // The clock is fast in one round only, and there only after the first choice has run; `a` gains
  // from resident weights in any round, and a run now and then takes much longer.
  int runs = 0;
  choose_by_clock(plan.steps, [&](std::vector<double>& seconds) {
    const bool fast = runs >= 9 && runs < 12;
    for (size_t k = 0; k < plan.steps.size(); ++k) {
      const Step& step = plan.steps[k];
      if (!step.conv) continue;
      seconds[k] = fast ? 1.0 : 1.6;
      if (step.conv.get() == &plan.conv(0) && step.conv->choice().resident) seconds[k] *= 0.8;
      if (runs % 11 == static_cast<int>(k)) seconds[k] *= 3.0;
    }
    ++runs;
  });
  CHECK(plan.conv(0).choice().resident);
  CHECK((plan.conv(1).choice() == ConvChoice{false, false}));
  CHECK((plan.conv(2).choice() == ConvChoice{false, false}));
}

TEST(zeros_are_left_out_where_that_is_clearly_faster) {
  if (cpu::active_kernels() == nullptr) return;
  const Builder b = three_with_zeros(1);
  const std::vector<ValueLayout> layouts = plan_layouts(b.p);
  std::vector<Step> steps = build_steps(b.p, layouts, cpu::Room::Several);
  std::vector<ConvStep*> conv;
  for (Step& step : steps)
    if (step.conv) conv.push_back(step.conv.get());
  for (ConvStep* c : conv)
    CHECK_EQ(c->forms(), 2);
  const uint64_t key = planning_key(steps, 1);
  // The first gains; the second as little as the clock scatters; the third would, but is faster
  // still with unpacked weights.
  choose_by_clock(steps, [&](std::vector<double>& seconds) {
    for (size_t k = 0; k < steps.size(); ++k) {
      if (!steps[k].conv) continue;
      const ConvChoice c = steps[k].conv->choice();
      seconds[k] = 1.0;
      if (c.form == 1) seconds[k] = steps[k].conv.get() == conv[1] ? 0.97 : 0.7;
      if (steps[k].conv.get() == conv[2] && c.resident) seconds[k] = 0.5;
    }
  });
  CHECK((conv[0]->choice() == ConvChoice{false, false, 1}));
  CHECK((conv[1]->choice() == ConvChoice{false, false, 0}));
  CHECK((conv[2]->choice() == ConvChoice{true, false, 0}));
  CHECK(conv[0]->why().starts_with("blocks: "));
  CHECK(conv[0]->kernel().ends_with(" sparse panels, blocks"));
  CHECK(conv[2]->kernel().ends_with(" panels, resident"));
  CHECK(conv[1]->why().starts_with("dense, not blocks: "));
  // Kept choices are about these zeros.
  const Folder folder;
  const PlanCache cache(folder.path / "plans");
  cache.keep(key, steps);
  conv[0]->choose({});
  CHECK(cache.apply(key, steps));
  CHECK_EQ(conv[0]->choice().form, 1);
  Builder other = b;
  std::vector<int8_t> weights(64 * 64, 0);
  std::fill(weights.begin(), weights.begin() + 64 * 40, int8_t{1});
  other.p.constants[static_cast<size_t>(conv_attributes(b.p.nodes[2]).weights)].bytes =
      formats::pack_canonical(weights, 4, 64, 64, 1, 1);
  std::vector<Step> others = build_steps(other.p, layouts, cpu::Room::Several);
  CHECK(planning_key(others, 1) != key);
}

TEST(sparse_forms_are_counted_while_the_clock_holds_them) {
  if (cpu::active_kernels() == nullptr) return;
  // One of four column tiles: surely faster without the rest. Three of four: a clock must say.
  for (const int64_t rows : {16, 48}) {
    const Builder b = three_with_zeros(rows);
    const std::vector<ValueLayout> layouts = plan_layouts(b.p);
    const auto held = [&](cpu::Room room) {
      const bool several = room == cpu::Room::Several;
      double bytes = 0.0;
      for (const Step& step : build_steps(b.p, layouts, room)) {
        if (!step.conv) continue;
        CHECK_EQ(step.conv->forms(), several ? 2 : 1);
        for (int form = 0; form < step.conv->forms(); ++form)
          for (const bool resident : {false, true}) {
            const ConvChoice choice{resident, false, form};
            if (step.conv->possible(choice) == choice)
              bytes += static_cast<double>(step.conv->panel_bytes(choice));
          }
        if (!several) CHECK_EQ(step.conv->kernel().ends_with(" sparse panels, blocks"), rows == 16);
      }
      return bytes;
    };
    CHECK(held(cpu::Room::Several) > held(cpu::Room::Least));
    // The noise and the tables are the same; what is more is more forms.
    const double more = planned_memory(b.p, layouts, cpu::Room::Several) -
                        planned_memory(b.p, layouts, cpu::Room::Least);
    CHECK_MSG(more >= held(cpu::Room::Several) - held(cpu::Room::Least), std::to_string(more));
    CHECK(planned_memory(b.p, layouts, cpu::Room::Least) >= held(cpu::Room::Least));
  }
}

TEST(choices_outlive_the_process) {
  if (cpu::active_kernels() == nullptr) return;
  const Folder folder;
  const fs::path file = folder.path / "deep" / "plans";
  const PlanCache cache(file);
  Plan plan;
  const uint64_t key = planning_key(plan.steps, 2);
  CHECK(!cache.apply(key, plan.steps));
  plan.conv(0).choose({true, false});
  plan.conv(2).choose({true, true});
  cache.keep(key, plan.steps);
  CHECK(text_of(file).starts_with("adalayer plans 1\n"));

  Plan again;
  CHECK_EQ(planning_key(again.steps, 2), key);
  CHECK(planning_key(again.steps, 1) != key);
  CHECK(cache.apply(key, again.steps));
  CHECK((again.conv(0).choice() == ConvChoice{true, false}));
  CHECK((again.conv(1).choice() == ConvChoice{false, false}));
  CHECK((again.conv(2).choice() == ConvChoice{true, true}));
  CHECK(!cache.apply(key + 1, again.steps));
  // The last line counts.
  plan.conv(0).choose({false, true});
  cache.keep(key, plan.steps);
  CHECK(cache.apply(key, again.steps));
  CHECK((again.conv(0).choice() == ConvChoice{false, true}));
  // Nothing but the file is left behind.
  CHECK_EQ(std::distance(fs::directory_iterator(file.parent_path()), {}), 1);
}

/// What was chosen among other algorithms, or between other kernels of theirs, is not used.
TEST(choices_are_of_these_algorithms) {
  if (cpu::active_kernels() == nullptr) return;
  const Folder folder;
  const fs::path file = folder.path / "plans";
  const PlanCache cache(file);
  Plan plan;
  const uint64_t key = planning_key(plan.steps, 1);
  CHECK(key == planning_key(plan.steps, 1, kernels_digest()));
  plan.conv(0).choose({true, false});
  cache.keep(planning_key(plan.steps, 1, kernels_digest() + 1), plan.steps);
  CHECK(!cache.apply(key, plan.steps));
  // A list without Winograd: the layers' forms have other names, or are fewer.
  std::vector<Step> fewer = build_steps(plan.program, plan.layouts, cpu::Room::Least);
  CHECK(planning_key(fewer, 1) != key);
  cache.keep(planning_key(fewer, 1), fewer);
  CHECK(!cache.apply(key, plan.steps));
  // The engine chooses by the clock, then, and keeps that.
  ::setenv("ADALAYER_PLAN_CACHE", file.c_str(), 1);
  const std::string before = text_of(file);
  const Engine engine(plan.program, {.threads = 1});
  ::setenv("ADALAYER_PLAN_CACHE", "off", 1);
  CHECK(text_of(file).starts_with(before) && text_of(file).size() > before.size());
  CHECK(cache.apply(key, plan.steps));
  // Every side's padding counts.
  Plan cut;
  cut.program.nodes.back().ints[6] = 0;
  cut.program.values.back().h = 5;
  CHECK(planning_key(build_steps(cut.program, plan_layouts(cut.program), cpu::Room::Several), 1) !=
        key);
}

TEST(a_damaged_cache_is_none) {
  if (cpu::active_kernels() == nullptr) return;
  const Folder folder;
  const fs::path file = folder.path / "plans";
  Plan plan;
  const PlanCache cache(file);
  const uint64_t key = planning_key(plan.steps, 1);
  cache.keep(key, plan.steps);
  const std::string good = text_of(file);
  const std::string line = good.substr(good.find('\n') + 1);
  const std::string name = line.substr(0, line.find(' '));
  const auto refused = [&](const std::string& text) {
    std::ofstream(file) << text;
    return !cache.apply(key, plan.steps);
  };
  CHECK(!refused(good));
  CHECK(refused(""));
  CHECK(refused("adalayer plans 2\n" + line));
  CHECK(refused("adalayer plans 1\n" + name + " pp\n"));
  CHECK(refused("adalayer plans 1\n" + name + " pp?\n"));
  CHECK(refused("adalayer plans 1\n" + name));
  CHECK(refused(std::string(1000, '\0')));
  // Writing begins a good file again, and a place that cannot be written is no error.
  cache.keep(key, plan.steps);
  CHECK(cache.apply(key, plan.steps));
  PlanCache("/proc/nowhere/plans").keep(key, plan.steps);
}

TEST(engines_follow_the_cache) {
  if (cpu::active_kernels() == nullptr) return;
  const Folder folder;
  const fs::path file = folder.path / "plans";
  ::setenv("ADALAYER_PLAN_CACHE", file.c_str(), 1);
  const Program program = three_convolutions();
  EngineOptions options{.threads = 1};
  Plan plan;
  plan.conv(0).choose({true, false});
  plan.conv(2).choose({true, false});
  PlanCache(file).keep(planning_key(plan.steps, 1), plan.steps);
  const Engine kept(program, options);
  options.weights = WeightForm::Resident;
  const Engine resident(program, options);
  options.weights = WeightForm::Streamed;
  const Engine streamed(program, options);
  CHECK_EQ(kept.weight_bytes(), resident.weight_bytes());
  CHECK(streamed.weight_bytes() < resident.weight_bytes());
  // Without a kept choice the clock decides, and what it decided is kept.
  fs::remove(file);
  options.weights = WeightForm::Measured;
  const Engine measured(program, options);
  CHECK(PlanCache(file).apply(planning_key(plan.steps, 1), plan.steps));
  ::setenv("ADALAYER_PLAN_CACHE", "off", 1);
  CHECK(!PlanCache::of_user());
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

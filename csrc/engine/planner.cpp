#include "engine/planner.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <string_view>
#include <system_error>
#include <vector>

#include "core/cpu_features.hpp"

namespace adalayer::engine {
namespace {

using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

// A choice must win by this much: clocks scatter, and packed weights take less memory.
constexpr double kClearly = 0.95;
// Rounds of all choices, the first of which only warms up; large programs get fewer.
constexpr int kMostRounds = 8, kLeastRounds = 3;
constexpr double kMostSeconds = 1.0;

constexpr std::array<ConvChoice, 8> kChoices{{{false, false, false},
                                              {false, true, false},
                                              {true, false, false},
                                              {true, true, false},
                                              {false, false, true},
                                              {false, true, true},
                                              {true, false, true},
                                              {true, true, true}}};
constexpr size_t kFirstSparse = 4;
constexpr std::string_view kLetters = "porxPORX";  // in the file: one for each of kChoices

constexpr std::string_view kFirstLine = "adalayer plans 1";
constexpr size_t kMostLines = 4096;
constexpr int64_t kMostBytes = 8 << 20;

void choose(std::vector<Step>& steps, const ConvChoice& choice) {
  for (Step& step : steps)
    if (step.conv) step.conv->choose(choice);
}

class Hash {
 public:
  void add(uint64_t v) { state_ = (state_ ^ v) * 0x9E3779B97F4A7C15ull, state_ ^= state_ >> 29; }
  void add(std::string_view text) {
    add(text.size());
    for (const char c : text)
      add(static_cast<uint8_t>(c));
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0xADA1A7E4;
};

std::string hex(uint64_t key) {
  std::ostringstream text;
  text << std::hex << key;
  return text.str();
}

/// The file's lines without the first; empty where there is no file of this format.
std::vector<std::string> read_lines(const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error) || fs::file_size(path, error) > kMostBytes) return {};
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line) || line != kFirstLine) return {};
  std::vector<std::string> lines;
  while (std::getline(file, line))
    lines.push_back(line);
  return lines;
}

}  // namespace

void choose_by_clock(std::vector<Step>& steps, const TimedRun& run) {
  const auto packs = [](const Step& s) { return s.conv && s.conv->can_be_resident(); };
  const auto skips = [](const Step& s) { return s.conv && s.conv->can_be_sparse(); };
  const bool resident = std::any_of(steps.begin(), steps.end(), packs);
  const bool sparse = std::any_of(steps.begin(), steps.end(), skips);
  std::vector<size_t> timed;
  for (size_t c = 0; c < kChoices.size(); ++c)
    if ((resident || !kChoices[c].resident) && (sparse || !kChoices[c].sparse)) timed.push_back(c);
  std::array<std::vector<double>, kChoices.size()> best;
  for (auto& times : best)
    times.assign(steps.size(), std::numeric_limits<double>::infinity());
  std::vector<double> seconds(steps.size());
  const auto start = Clock::now();
  for (int round = 0; round < kMostRounds; ++round) {
    for (const size_t c : timed) {
      choose(steps, kChoices[c]);
      std::fill(seconds.begin(), seconds.end(), 0.0);
      run(seconds);
      for (size_t k = 0; round > 0 && k < steps.size(); ++k)
        best[c][k] = std::min(best[c][k], seconds[k]);
    }
    const std::chrono::duration<double> spent = Clock::now() - start;
    if (round + 1 >= kLeastRounds && spent.count() > kMostSeconds) break;
  }
  for (size_t k = 0; k < steps.size(); ++k) {
    if (!steps[k].conv) continue;
    // The fastest of one kind, where its first one wins ties.
    const auto fastest_of = [&](size_t first) {
      size_t fastest = first;
      for (const size_t c : timed)
        if (kChoices[c].sparse == kChoices[first].sparse &&
            best[c][k] < kClearly * best[first][k] && best[c][k] < best[fastest][k])
          fastest = c;
      return fastest;
    };
    size_t fastest = fastest_of(0);
    if (steps[k].conv->can_be_sparse()) {
      const size_t zeros_out = fastest_of(kFirstSparse);
      steps[k].conv->measured(best[zeros_out][k], best[fastest][k]);
      if (best[zeros_out][k] < kClearly * best[fastest][k]) fastest = zeros_out;
    }
    steps[k].conv->choose(kChoices[fastest]);
  }
}

uint64_t planning_key(const std::vector<Step>& steps, int threads) {
  Hash hash;
  hash.add(cpu_brand());
  hash.add(isa_name(active_isa()));
  hash.add(describe_cpu_features());
  hash.add(static_cast<uint64_t>(threads));
  hash.add(static_cast<uint64_t>(cpu::sparse_policy()));
  for (const Step& step : steps) {
    hash.add(static_cast<uint64_t>(step.node->op));
    if (!step.conv) continue;
    hash.add(static_cast<uint64_t>(step.conv->bits()));
    hash.add(step.node->inputs.size());
    hash.add(step.conv->sparse_key());
    const ConvShape& s = step.conv->shape();
    for (const int64_t v :
         {s.in_channels, s.in_h, s.in_w, s.out_channels, s.kernel_h, s.kernel_w, s.stride_h,
          s.stride_w, s.pad_top, s.pad_left, s.dilation_h, s.dilation_w, s.groups})
      hash.add(static_cast<uint64_t>(v));
  }
  return hash.value();
}

std::optional<PlanCache> PlanCache::of_user() {
  const auto text = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string_view(value == nullptr ? "" : value);
  };
  if (const auto own = text("ADALAYER_PLAN_CACHE"); !own.empty())
    return own == "off" ? std::nullopt : std::optional(PlanCache(own));
  fs::path base = text("XDG_CACHE_HOME");
  if (!base.is_absolute()) {  // as the XDG base directory specification has it
    base = text("HOME");
    if (!base.is_absolute()) return std::nullopt;
    base /= ".cache";
  }
  return PlanCache(base / "adalayer_native" / "engine-plans");
}

bool PlanCache::apply(uint64_t key, std::vector<Step>& steps) const {
  const std::string wanted = hex(key) + ' ';
  const std::vector<std::string> lines = read_lines(file_);
  for (auto line = lines.rbegin(); line != lines.rend(); ++line) {
    if (line->compare(0, wanted.size(), wanted) != 0) continue;
    const std::string letters = line->substr(wanted.size());
    const auto convolutions =
        std::count_if(steps.begin(), steps.end(), [](const Step& s) { return s.conv != nullptr; });
    if (static_cast<int64_t>(letters.size()) != convolutions ||
        letters.find_first_not_of(kLetters) != std::string::npos)
      continue;
    size_t at = 0;
    for (Step& step : steps)
      if (step.conv) step.conv->choose(kChoices[kLetters.find(letters[at++])]);
    return true;
  }
  return false;
}

void PlanCache::keep(uint64_t key, const std::vector<Step>& steps) const {
  std::string line = hex(key) + ' ';
  for (const Step& step : steps) {
    if (!step.conv) continue;
    const auto* at = std::find(kChoices.begin(), kChoices.end(), step.conv->choice());
    line += kLetters[static_cast<size_t>(at - kChoices.begin())];
  }
  std::vector<std::string> lines = read_lines(file_);
  if (lines.size() >= kMostLines) lines.erase(lines.begin());
  lines.push_back(std::move(line));
  std::error_code ignored;
  fs::create_directories(file_.parent_path(), ignored);
  // A reader finds the old file or the new one; of two writers at once, the last one's line.
  fs::path temporary = file_;
  temporary += '.' + std::to_string(::getpid()) + ".tmp";
  bool whole = false;
  {
    std::ofstream file(temporary, std::ios::trunc);
    file << kFirstLine << '\n';
    for (const std::string& each : lines)
      file << each << '\n';
    whole = static_cast<bool>(file.flush());
  }
  if (whole) fs::rename(temporary, file_, ignored);
  if (!whole || ignored) fs::remove(temporary, ignored);
}

}  // namespace adalayer::engine

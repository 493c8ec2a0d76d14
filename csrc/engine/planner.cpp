#include "engine/planner.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string_view>
#include <system_error>
#include <vector>

#include "core/cpu_features.hpp"
#include "core/median.hpp"
#include "cpu/conv/policy.hpp"
#include "engine/kernels_digest.hpp"

namespace adalayer::engine {
namespace {

using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

// A choice must win by this much: clocks scatter, and packed weights take less memory.
constexpr double kClearly = 0.95;
// Rounds of all choices, the first of which only warms up; large programs get fewer.
constexpr int kMostRounds = 10, kLeastRounds = 4;
constexpr double kMostSeconds = 1.0;

// In the file: four letters for the choices of each form.
constexpr std::string_view kLetters = "porxPORXabcdABCDefghEFGH";
constexpr size_t kOfForm = 4;

ConvChoice choice_of(size_t letter) {
  return {.resident = letter / 2 % 2 == 1,
          .other_order = letter % 2 == 1,
          .form = static_cast<int>(letter / kOfForm)};
}
size_t letter_of(const ConvChoice& c) {
  return static_cast<size_t>(c.form) * kOfForm + 2 * c.resident + c.other_order;
}

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

int most_forms(const std::vector<Step>& steps) {
  int most = 1;
  for (const Step& step : steps)
    if (step.conv) most = std::max(most, step.conv->forms());
  return std::min(most, static_cast<int>(kLetters.size() / kOfForm));
}

void choose_by_clock(std::vector<Step>& steps, const TimedRun& run) {
  const int forms = most_forms(steps);
  const auto choices = static_cast<size_t>(forms) * kOfForm;
  std::vector<size_t> timed;
  for (size_t c = 0; c < choices; ++c) {
    const bool possible = std::any_of(steps.begin(), steps.end(), [&](const Step& s) {
      return s.conv && s.conv->possible(choice_of(c)) == choice_of(c);
    });
    if (possible || c == 0) timed.push_back(c);
  }
  // A core's speed changes in the middle of it all, so that only times of the same round compare.
  std::vector<std::vector<std::vector<double>>> ratios(
      choices, std::vector<std::vector<double>>(steps.size()));
  std::vector<double> seconds(steps.size()), first_choice;
  const auto start = Clock::now();
  for (int round = 0; round < kMostRounds; ++round) {
    for (const size_t c : timed) {
      choose(steps, choice_of(c));
      std::fill(seconds.begin(), seconds.end(), 0.0);
      run(seconds);
      if (c == timed.front()) first_choice = seconds;
      for (size_t k = 0; round > 0 && k < steps.size(); ++k)
        ratios[c][k].push_back(first_choice[k] > 0.0 ? seconds[k] / first_choice[k] : 1.0);
    }
    const std::chrono::duration<double> spent = Clock::now() - start;
    if (round + 1 >= kLeastRounds && spent.count() > kMostSeconds) break;
  }
  std::vector<std::vector<double>> times(choices, std::vector<double>(steps.size()));
  for (const size_t c : timed)
    for (size_t k = 0; k < steps.size(); ++k)
      times[c][k] = median(ratios[c][k]);
  for (size_t k = 0; k < steps.size(); ++k) {
    if (!steps[k].conv) continue;
    // The fastest of each form, where its first choice wins ties; then the form, likewise.
    size_t fastest = 0;
    std::vector<double> seconds_of_forms;
    for (int form = 0; form < std::min(forms, steps[k].conv->forms()); ++form) {
      const size_t first = static_cast<size_t>(form) * kOfForm;
      size_t of_form = first;
      for (const size_t c : timed)
        if (choice_of(c).form == form && times[c][k] < kClearly * times[first][k] &&
            times[c][k] < times[of_form][k])
          of_form = c;
      seconds_of_forms.push_back(times[of_form][k]);
      if (form == 0 || times[of_form][k] < kClearly * times[fastest][k]) fastest = of_form;
    }
    steps[k].conv->measured(std::move(seconds_of_forms));
    steps[k].conv->choose(choice_of(fastest));
  }
}

uint64_t kernels_digest() { return kKernelsDigest; }

uint64_t planning_key(const std::vector<Step>& steps, int threads, uint64_t kernels) {
  Hash hash;
  hash.add(kernels);
  hash.add(cpu_brand());
  hash.add(isa_name(active_isa()));
  hash.add(describe_cpu_features());
  hash.add(static_cast<uint64_t>(threads));
  hash.add(static_cast<uint64_t>(cpu::sparse_policy()));
  hash.add(static_cast<uint64_t>(cpu::winograd_policy()));
  for (const Step& step : steps) {
    hash.add(static_cast<uint64_t>(step.node->op));
    if (!step.conv) continue;
    hash.add(static_cast<uint64_t>(step.conv->bits()));
    hash.add(step.node->inputs.size());
    hash.add(step.conv->forms_key());
    const ConvShape& s = step.conv->shape();
    for (const int64_t v : {s.in_channels, s.in_h, s.in_w, s.out_channels, s.kernel_h, s.kernel_w,
                            s.stride_h, s.stride_w, s.pad_top, s.pad_left, s.pad_bottom,
                            s.pad_right, s.dilation_h, s.dilation_w, s.groups})
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

std::string plan_line(uint64_t key, const std::vector<Step>& steps) {
  std::string line = hex(key) + ' ';
  for (const Step& step : steps) {
    if (!step.conv) continue;
    line += kLetters[letter_of(step.conv->choice())];
  }
  return line;
}

bool apply_plan(std::string_view line, uint64_t key, std::vector<Step>& steps) {
  const std::string wanted = hex(key) + ' ';
  if (line.substr(0, wanted.size()) != wanted) return false;
  const std::string_view letters = line.substr(wanted.size());
  const auto convolutions =
      std::count_if(steps.begin(), steps.end(), [](const Step& s) { return s.conv != nullptr; });
  if (static_cast<int64_t>(letters.size()) != convolutions ||
      letters.find_first_not_of(kLetters) != std::string_view::npos)
    return false;
  size_t at = 0;
  for (Step& step : steps)
    if (step.conv) step.conv->choose(choice_of(kLetters.find(letters[at++])));
  return true;
}

bool PlanCache::apply(uint64_t key, std::vector<Step>& steps) const {
  const std::vector<std::string> lines = read_lines(file_);
  return std::any_of(lines.rbegin(), lines.rend(),
                     [&](const std::string& line) { return apply_plan(line, key, steps); });
}

void PlanCache::keep(uint64_t key, const std::vector<Step>& steps) const {
  std::vector<std::string> lines = read_lines(file_);
  if (lines.size() >= kMostLines) lines.erase(lines.begin());
  lines.push_back(plan_line(key, steps));
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

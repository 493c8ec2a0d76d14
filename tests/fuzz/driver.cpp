// A small coverage-guided fuzzer for compilers without libFuzzer: g++ reports every basic block
// that runs (-fsanitize-coverage=trace-pc), and an input that reaches a block, or reaches it a
// number of times, as none before it did joins the corpus. Takes libFuzzer's options as far as the
// Makefile uses them:
//
//   fuzz_ada [-max_total_time=S] [-seed=N] [-max_len=N] [-artifact_prefix=P] FOLDER_OR_FILE ...
//
// Files are run once each; folders are corpora, the first of which gets what is found.
#include <sanitizer/common_interface_defs.h>
#include <sys/time.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" {
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed);
size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);
}

namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<uint8_t>;

constexpr size_t kCounters = 1 << 16;
uint8_t g_counters[kCounters];
uint8_t g_seen[kCounters];  // a bit per magnitude of the count

std::mt19937 g_random;
Bytes g_current;
char g_artifact[4096] = "crash-ada";

size_t below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(g_random); }

/// The input that is running, for whoever has to find out why. Called while the process dies.
void save_current() {
  if (std::FILE* file = std::fopen(g_artifact, "wb")) {
    std::fwrite(g_current.data(), 1, g_current.size(), file);
    std::fclose(file);
    std::fprintf(stderr, "input of %zu bytes written to %s\n", g_current.size(), g_artifact);
  }
}

extern "C" void on_signal(int number) {
  save_current();
  std::signal(number, SIG_DFL);
  std::raise(number);
}

/// Seconds of this process's CPU time until SIGPROF: a machine with other work to do is no finding.
void set_timer(int seconds) {
  itimerval timer = {};
  timer.it_value.tv_sec = seconds;
  setitimer(ITIMER_PROF, &timer, nullptr);
}

/// Runs it, and says whether it reached something new.
bool run(const Bytes& input) {
  g_current = input;
  std::memset(g_counters, 0, sizeof g_counters);
  set_timer(30);  // stuck is a finding, too
  LLVMFuzzerTestOneInput(g_current.data(), g_current.size());
  set_timer(0);
  bool found = false;
  for (size_t k = 0; k < kCounters; ++k) {
    if (g_counters[k] == 0) continue;
    const auto magnitude = static_cast<uint8_t>(1u << (std::bit_width(g_counters[k]) - 1));
    found = found || (g_seen[k] & magnitude) == 0;
    g_seen[k] |= magnitude;
  }
  return found;
}

Bytes read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// The value of "-name=value" if this is it.
bool option(const std::string& argument, const char* name, std::string& value) {
  const std::string start = std::string("-") + name + "=";
  if (argument.compare(0, start.size(), start) != 0) return false;
  value = argument.substr(start.size());
  return true;
}

}  // namespace

// Called by every basic block; must not be instrumented itself, and is not: only the engine is.
extern "C" void __sanitizer_cov_trace_pc() {
  const auto at = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& counter = g_counters[(at ^ at >> 16) % kCounters];
  if (counter != 255) ++counter;
}

size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size) {
  constexpr uint64_t kEdges[] = {0,      1,          0x7F,       0x80,       0xFF,       0x7FFF,
                                 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1ull << 32, ~0ull};
  for (size_t changes = 1 + below(4); changes > 0; --changes) {
    if (size == 0) {
      if (max_size == 0) return 0;
      data[size++] = static_cast<uint8_t>(below(256));
      continue;
    }
    const size_t at = below(size), width = size_t{1} << below(4);
    switch (below(7)) {
      case 0:
        data[at] ^= static_cast<uint8_t>(1u << below(8));
        break;
      case 1:
        data[at] = static_cast<uint8_t>(below(256));
        break;
      case 2: {  // a number of 1 to 8 bytes
        const uint64_t edge = kEdges[below(std::size(kEdges))];
        std::memcpy(data + at, &edge, std::min(width, size - at));
        break;
      }
      case 3: {  // a little more or less
        uint64_t number = 0;
        const size_t bytes = std::min(width, size - at);
        std::memcpy(&number, data + at, bytes);
        number += below(33) - 16;
        std::memcpy(data + at, &number, bytes);
        break;
      }
      case 4: {  // a piece leaves
        const size_t bytes = 1 + below(std::min<size_t>(size - at, 32));
        std::memmove(data + at, data + at + bytes, size - at - bytes);
        size -= bytes;
        break;
      }
      case 5: {  // a piece comes twice
        const size_t bytes = std::min(1 + below(std::min<size_t>(size - at, 32)), max_size - size);
        std::memmove(data + at + bytes, data + at, size - at);
        size += bytes;
        break;
      }
      default: {  // a piece goes elsewhere
        const size_t bytes = 1 + below(std::min<size_t>(size - at, 32));
        std::memmove(data + below(size - bytes + 1), data + at, bytes);
      }
    }
  }
  return size;
}

int main(int argc, char** argv) {
  double limit = 0.0;
  size_t max_size = 1 << 16;
  unsigned seed = std::random_device()();
  std::string prefix, value;
  std::vector<fs::path> folders;
  size_t executions = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (option(argument, "max_total_time", value)) {
      limit = std::stod(value);
    } else if (option(argument, "seed", value)) {
      seed = static_cast<unsigned>(std::stoul(value));
    } else if (option(argument, "max_len", value)) {
      max_size = std::stoul(value);
    } else if (option(argument, "artifact_prefix", value)) {
      prefix = value;
    } else if (argument[0] == '-') {
      continue;  // an option of libFuzzer that means nothing here
    } else if (fs::is_directory(argument)) {
      folders.emplace_back(argument);
    } else {
      run(read_file(argument));
      ++executions;
      std::printf("%s: ran\n", argument.c_str());
    }
  }
  if (folders.empty()) return executions > 0 ? 0 : 2;
  std::snprintf(g_artifact, sizeof g_artifact, "%scrash-ada-%u", prefix.c_str(), seed);
  __sanitizer_set_death_callback(save_current);
  for (const int number : {SIGABRT, SIGPROF})
    std::signal(number, on_signal);
  g_random.seed(seed);
  std::printf("seed %u\n", seed);

  const auto begin = std::chrono::steady_clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  std::vector<Bytes> corpus;
  for (const fs::path& folder : folders)
    for (const auto& entry : fs::directory_iterator(folder)) {
      Bytes input = read_file(entry.path());
      if (input.size() > max_size) continue;
      run(input);
      ++executions;
      corpus.push_back(std::move(input));
    }
  if (corpus.empty()) corpus.emplace_back();
  double said = 0.0;
  while (seconds() < limit) {
    // New inputs are tried more often than old ones.
    const size_t newest = std::min<size_t>(corpus.size(), 32);
    Bytes input = corpus[below(2) == 0 ? below(corpus.size()) : corpus.size() - 1 - below(newest)];
    const size_t size = input.size();
    input.resize(max_size);
    input.resize(LLVMFuzzerCustomMutator(input.data(), size, max_size, g_random()));
    ++executions;
    if (run(input)) {
      const fs::path path = folders[0] / ("found-" + std::to_string(corpus.size()));
      std::ofstream(path, std::ios::binary)
          .write(reinterpret_cast<const char*>(input.data()),
                 static_cast<std::streamsize>(input.size()));
      corpus.push_back(std::move(input));
    }
    if (seconds() - said < 10.0) continue;
    said = seconds();
    std::printf("%.0f s: %zu executions, corpus of %zu\n", said, executions, corpus.size());
    std::fflush(stdout);
  }
  std::printf("stat::number_of_executed_units: %zu\n", executions);
  std::printf("corpus of %zu inputs, no finding\n", corpus.size());
  return 0;
}

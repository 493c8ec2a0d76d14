// What the fuzzer does with its seeds, for machines and emulators that have no sanitizer: every
// file of a folder as it is, and changed in some ways, the same ones in every run. Usage:
// fuzz_files FOLDER CHANGES [FATES]
//
// With a third argument files are loaded alone, and that file gets a line for each: what the reader
// says. It says the same on every machine.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "adalayer/adalayer.h"

extern "C" {
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed);
size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);
}

namespace {
constexpr size_t kMostBytes = 65536;
uint32_t g_state = 1;

uint32_t next() {
  g_state = g_state * 1664525u + 1013904223u;
  return g_state >> 8;
}

std::string fate(const std::vector<uint8_t>& input, size_t size) {
  adalayer_load_options options = {};
  options.struct_size = sizeof options;
  options.memory_limit = 32 << 20;
  adalayer_model* model = nullptr;
  const adalayer_status status = adalayer_model_load_memory(input.data(), size, &options, &model);
  adalayer_model_free(model);
  return status == ADALAYER_OK ? "loaded" : adalayer_last_error();
}
}  // namespace

/// What the mutator of the format asks for where it has no better idea: some other bytes.
size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size) {
  if (size == 0 || (next() % 8 == 0 && size < max_size)) data[size++] = 0;
  for (uint32_t k = next() % 4 + 1; k > 0; --k)
    data[next() % size] = static_cast<uint8_t>(next());
  return next() % 8 == 0 ? size - next() % size : size;
}

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: %s FOLDER CHANGES [FATES]\n", argv[0]);
    return 2;
  }
  std::ofstream fates;
  if (argc == 4) fates.open(argv[3]);
  const int changes = std::atoi(argv[2]);
  std::set<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1]))
    files.insert(entry.path());
  size_t executions = 0;
  for (const auto& path : files) {
    std::ifstream stream(path, std::ios::binary);
    const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(stream), {}};
    for (int change = 0; change <= changes; ++change) {
      std::vector<uint8_t> input = bytes;
      size_t size = bytes.size();
      if (change > 0) {
        input.resize(kMostBytes > size ? kMostBytes : size);
        g_state = static_cast<uint32_t>(change);
        size = LLVMFuzzerCustomMutator(input.data(), size, input.size(),
                                       static_cast<unsigned>(change));
      }
      if (argc == 4)
        fates << path.filename().string() << ' ' << change << ": " << fate(input, size) << '\n';
      else
        LLVMFuzzerTestOneInput(input.data(), size);
      ++executions;
    }
  }
  std::printf("%zu seeds, %zu executions\n", files.size(), executions);
  return files.empty() || (argc == 4 && !fates.flush()) ? 1 : 0;
}

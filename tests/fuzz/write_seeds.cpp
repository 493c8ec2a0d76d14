// Writes the seeds of the fuzzer into a folder: files as the writer of today makes them, so that
// they follow the format. Usage: write_seeds FOLDER
#include <cstdio>
#include <exception>
#include <filesystem>

#include "engine/container.hpp"
#include "fuzz/seeds.hpp"

using namespace programs;

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  try {
    const std::filesystem::path folder = argv[1];
    std::filesystem::create_directories(folder);
    for (const auto& [name, program] : seeds())
      save_program(program, folder / (name + ".ada"));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}

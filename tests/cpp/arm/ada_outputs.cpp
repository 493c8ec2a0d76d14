// .ada files of one architecture on another: same bytes in the file, same bits in the results.
//
//   ada_outputs write FOLDER   the fuzzer's programs as NAME.ada, and what they make of noise,
//   computed
//                              by the fastest instruction set of this machine, as NAME.out; a
//                              network that classifies, and a picture for it
//   ada_outputs answer FOLDER  NAME.out for other files that lie there: tests/write_programs.py
//   ada_outputs check FOLDER   reads them, and compares on every instruction set of this machine
#include <bit>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu_features.hpp"
#include "engine/container.hpp"
#include "engine/engine.hpp"
#include "fuzz/seeds.hpp"

using namespace programs;
namespace fs = std::filesystem;

namespace {

constexpr int64_t kBatch = 3;

std::string bytes_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path.string() + ": cannot be opened");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_bytes(const fs::path& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file << bytes;
  if (!file.flush()) throw std::runtime_error(path.string() + ": cannot be written");
}

/// A stem and a convolution of four bits, averaged to twenty classes.
Program classifier() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr int64_t kClasses = 20;
  Builder b;
  const auto x = b.value("image", 3, 9, 8, ValueKind::F32);
  auto y = b.node(OpKind::Quantize, {x}, b.value("levels", 3, 9, 8));
  const auto conv = [&](int64_t in, int64_t out, int64_t h, int64_t w, int64_t stride, int bits) {
    std::vector<float> scale, bias;
    for (int64_t o = 0; o < out; ++o) {
      scale.push_back(0.002f * static_cast<float>(1 + o % 5));
      bias.push_back(static_cast<float>(o * 5 % 7) - 3.0f);
    }
    y = b.node(OpKind::Conv, {y}, b.value("conv", out, h, w),
               {3, 3, stride, stride, 1, 1, 1, 1, 1, 1, 1, 0, 255, 10}, {kInverse, -kInf, kInf},
               {b.weights(static_cast<uint32_t>(out), static_cast<uint32_t>(in), 3, 3, bits),
                b.floats(scale), b.floats(bias), -1});
  };
  conv(3, 24, 5, 4, 2, 8);
  conv(24, kClasses, 5, 4, 1, 4);
  const auto average = b.node(OpKind::AdaptiveAvgPool, {y}, b.value("average", kClasses, 1, 1),
                              {0, 255, 10}, {kInverse, kScale}, {-1});
  const auto scores =
      b.node(OpKind::Dequantize, {average}, b.value("scores", kClasses, 1, 1, ValueKind::F32));
  b.p.inputs = {x};
  b.p.outputs = {scores};
  b.p.metadata["preprocessing"] = R"({"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]})";
  std::string classes;
  for (int64_t c = 0; c < kClasses; ++c)
    classes += (c == 0 ? "[\"class " : ", \"class ") + std::to_string(c) + "\"";
  b.p.metadata["classes"] = classes + "]";
  return b.p;
}

/// All outputs' bytes, one after another. Noise has NaN, infinities and what lies beyond every
/// grid.
std::string run(const Engine& engine) {
  const Program& p = engine.program();
  std::vector<std::vector<float>> images;
  std::vector<InputTensor> inputs;
  uint32_t state = 1;
  for (const int32_t v : p.inputs) {
    const Value& value = p.values[static_cast<size_t>(v)];
    auto& image = images.emplace_back(static_cast<size_t>(kBatch * value.c * value.h * value.w));
    if (value.kind == ValueKind::I32) continue;  // the ids that every table has
    for (float& x : image) {
      state = state * 1664525u + 1013904223u;
      x = static_cast<float>(static_cast<int32_t>(state >> 16) - 32768) / 256.0f;
    }
    image[0] = std::bit_cast<float>(0x7FC00000u);
    image[1] = std::bit_cast<float>(0x7F800000u);
  }
  for (const auto& image : images)
    inputs.push_back({image.data()});
  std::vector<std::vector<float>> results;
  std::vector<float*> outputs;
  for (const int32_t v : p.outputs) {
    const Value& value = p.values[static_cast<size_t>(v)];
    results.emplace_back(static_cast<size_t>(kBatch * value.c * value.h * value.w));
  }
  for (auto& result : results)
    outputs.push_back(result.data());
  engine.run(inputs, kBatch, outputs, 1);
  std::string bytes;
  for (const auto& result : results)
    for (float y : result) {
      // Which NaN an operation makes is the processor's.
      if (y != y) y = std::bit_cast<float>(0x7FC00000u);
      bytes.append(reinterpret_cast<const char*>(&y), sizeof y);
    }
  return bytes;
}

Engine engine_of(const fs::path& path, WeightForm form) {
  EngineOptions options;
  options.weights = form;
  return Engine(load_program(path), options);
}

void write(const fs::path& folder) {
  fs::create_directories(folder);
  std::vector<std::pair<std::string, Program>> all = seeds();
  all.emplace_back("classifier", classifier());
  for (const auto& [name, program] : all) {
    const fs::path path = folder / (name + ".ada");
    save_program(program, path);
    write_bytes(folder / (name + ".out"), run(engine_of(path, WeightForm::Resident)));
  }
  std::string picture = "P6\n8 9\n255\n";
  for (int i = 0; i < 8 * 9 * 3; ++i)
    picture += static_cast<char>(i * 37 % 256);
  write_bytes(folder / "picture.ppm", picture);
  std::printf("%zu files, computed on %s\n", all.size(),
              std::string(isa_name(active_isa())).c_str());
}

void answer(const fs::path& folder) {
  int files = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".ada") continue;
    fs::path out = entry.path();
    write_bytes(out.replace_extension(".out"), run(engine_of(entry.path(), WeightForm::Resident)));
    ++files;
  }
  std::printf("%d files, computed on %s\n", files, std::string(isa_name(active_isa())).c_str());
}

int check(const fs::path& folder) {
  int files = 0, failed = 0;
  long long compared = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".ada") continue;
    ++files;
    const std::string name = entry.path().filename().string();
    fs::path out = entry.path();
    const std::string expected = bytes_of(out.replace_extension(".out"));
    const fs::path again = folder / "again.tmp";
    save_program(load_program(entry.path()), again);
    if (bytes_of(again) != bytes_of(entry.path())) {
      std::fprintf(stderr, "%s: written again, the file has other bytes\n", name.c_str());
      ++failed;
    }
    for (const Isa isa : supported_isas()) {
      force_isa(isa_name(isa));
      for (const WeightForm form : {WeightForm::Streamed, WeightForm::Resident}) {
        const std::string got = run(engine_of(entry.path(), form));
        if (got.empty() || got != expected) {
          std::fprintf(stderr, "%s on %s: other results than in %s\n", name.c_str(),
                       std::string(isa_name(isa)).c_str(), out.filename().string().c_str());
          ++failed;
        }
        compared += static_cast<long long>(got.size() / sizeof(float));
      }
    }
  }
  std::printf("%d files, %lld results compared on:", files, compared);
  for (const Isa isa : supported_isas())
    std::printf(" %s", std::string(isa_name(isa)).c_str());
  std::printf(", %d failures\n", failed);
  return failed == 0 && compared > 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc == 3 ? argv[1] : "";
  if (command != "write" && command != "answer" && command != "check") {
    std::fprintf(stderr, "usage: %s write|answer|check FOLDER\n", argv[0]);
    return 2;
  }
  try {
    if (command == "check") return check(argv[2]);
    command == "write" ? write(argv[2]) : answer(argv[2]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}

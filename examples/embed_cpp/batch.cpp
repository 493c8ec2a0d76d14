// Runs a batch of images in several threads, each with a context of its own, and times a call.
//
//   batch model.ada images.f32 [--threads N] [--repeat N] [--output scores.f32]
//
// The file holds preprocessed images, float32 [images][channels][height][width], as
// `array.astype(numpy.float32).tofile("images.f32")` writes them. Prints the best class of every
// image and the median time of a call with one image and one thread.
#include <adalayer/adalayer.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Arguments {
  std::string model, images, output;
  int threads = 2;
  int repeat = 20;
};

Arguments parse(int argc, char** argv) {
  Arguments a;
  std::vector<std::string> positional;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&] {
      if (++i >= argc) throw std::invalid_argument(word + " needs a value");
      return std::string(argv[i]);
    };
    if (word == "--threads")
      a.threads = std::stoi(value());
    else if (word == "--repeat")
      a.repeat = std::stoi(value());
    else if (word == "--output")
      a.output = value();
    else
      positional.push_back(word);
  }
  if (positional.size() != 2 || a.threads < 1 || a.repeat < 1)
    throw std::invalid_argument(
        "usage: batch model.ada images.f32 [--threads N] [--repeat N] [--output scores.f32]");
  a.model = positional[0];
  a.images = positional[1];
  return a;
}

std::vector<float> read_floats(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  std::vector<float> values(static_cast<std::size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(float)));
  return values;
}

/// Scores of all images, computed image by image in `threads` threads.
std::vector<float> run_all(const adalayer::Model& model, const std::vector<float>& images,
                           int threads) {
  const std::size_t in = model.input().elements, out = model.output().elements;
  const std::size_t count = images.size() / in;
  std::vector<float> scores(count * out);
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(threads));
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      try {
        adalayer::Context context(model);
        context.set_threads(1);  // the images are the parallelism
        for (std::size_t k = static_cast<std::size_t>(t); k < count;
             k += static_cast<std::size_t>(threads))
          context.run(
              1, {{images.data() + k * in, in * sizeof(float), ADALAYER_FLOAT32, ADALAYER_NCHW}},
              {{scores.data() + k * out, out * sizeof(float)}});
      } catch (...) {
        errors[static_cast<std::size_t>(t)] = std::current_exception();
      }
    });
  for (std::thread& thread : team)
    thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
  return scores;
}

double median_milliseconds(const adalayer::Model& model, const std::vector<float>& images,
                           int repeat) {
  adalayer::Context context(model);
  context.set_threads(1);
  const std::vector<float> image(
      images.begin(), images.begin() + static_cast<std::ptrdiff_t>(model.input().elements));
  std::vector<float> scores(model.output().elements);
  std::vector<double> times;
  for (int i = 0; i < repeat + 2; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    context.run(1, {{image.data(), image.size() * sizeof(float), ADALAYER_FLOAT32, ADALAYER_NCHW}},
                {{scores.data(), scores.size() * sizeof(float)}});
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    if (i >= 2) times.push_back(took.count());  // the first calls allocate
  }
  std::nth_element(times.begin(), times.begin() + repeat / 2, times.end());
  return times[static_cast<std::size_t>(repeat / 2)];
}

void run(const Arguments& arguments) {
  const adalayer::Model model(arguments.model);
  const std::vector<float> images = read_floats(arguments.images);
  const std::size_t in = model.input().elements, out = model.output().elements;
  if (model.input_count() != 1 || images.empty() || images.size() % in != 0)
    throw std::runtime_error(arguments.images + ": expected images of " + std::to_string(in) +
                             " floats, got " + std::to_string(images.size()) + " floats");

  const std::vector<float> scores = run_all(model, images, arguments.threads);
  const std::vector<std::string> names = model.class_names();
  for (std::size_t k = 0; k < scores.size() / out; ++k) {
    const float* first = scores.data() + k * out;
    const auto best = static_cast<std::size_t>(std::max_element(first, first + out) - first);
    std::printf("image %zu: %s (class %zu, %.4f)\n", k,
                best < names.size() ? names[best].c_str() : "?", best,
                static_cast<double>(first[best]));
  }
  std::printf("%.3f ms per call (%s)\n", median_milliseconds(model, images, arguments.repeat),
              adalayer_instruction_set());
  if (arguments.output.empty()) return;
  std::ofstream file(arguments.output, std::ios::binary);
  file.write(reinterpret_cast<const char*>(scores.data()),
             static_cast<std::streamsize>(scores.size() * sizeof(float)));
  if (!file) throw std::runtime_error(arguments.output + ": cannot be written");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}

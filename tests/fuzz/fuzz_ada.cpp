// Fuzzes the .ada reader, and the run of whatever loads.
//
// The functions are libFuzzer's; clang's fuzzer or driver.cpp calls them. An input is a file. What
// has to hold for every one: it is refused with a sentence, or it loads within the limit on memory,
// is written back as it was read, and runs with the bits of the interpreter.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "adalayer/adalayer.h"
#include "core/status.hpp"
#include "engine/container.hpp"
#include "engine/interpret.hpp"
#include "engine/levels.hpp"
#include "fuzz/mutate.hpp"

using namespace adalayer;
using namespace adalayer::engine;

namespace {

constexpr int64_t kMemory = 32 << 20;
// Larger programs are loaded, not run: a fuzzer lives from many short executions.
constexpr double kWork = 3e5;

[[noreturn]] void broken(const char* what) {
  std::fprintf(stderr, "fuzz_ada: %s; last error: %s\n", what, adalayer_last_error());
  std::abort();
}

/// Multiply-adds and elements of one image, roughly.
double work_of(const Program& p) {
  double work = 0.0;
  for (const Value& v : p.values)
    work += static_cast<double>(v.c) * static_cast<double>(v.h) * static_cast<double>(v.w);
  for (const Node& n : p.nodes) {
    const Value& y = p.values[n.output];
    const double outputs = static_cast<double>(y.c) * static_cast<double>(y.h) * y.w;
    if (n.op == OpKind::Conv || n.op == OpKind::ConvTranspose) {
      const ConvAttributes a = conv_attributes(n);
      const double taps = static_cast<double>(a.kernel_h) * static_cast<double>(a.kernel_w);
      const double group_in = static_cast<double>(p.values[n.inputs[0]].c / a.groups);
      work += std::max(outputs, static_cast<double>(y.c)) * taps * group_in;
      // Padding is memory that is filled, and strides of a transposed one are convolutions.
      work += static_cast<double>(a.stride_h) * static_cast<double>(a.stride_w);
    } else if (n.op == OpKind::FloatConv) {
      work += static_cast<double>(conv_shape(p, n).macs()) + static_cast<double>(y.c) * 256.0;
    } else if (n.op == OpKind::Recurrence) {
      const RecurrenceSpec s = recurrence_spec(p, n);
      work += outputs * static_cast<double>(recurrent_gates(s.kind) * s.hidden);
    } else if (n.op == OpKind::Linear) {
      work += outputs * static_cast<double>(p.values[n.inputs[0]].c);
    } else if (n.op == OpKind::MaxPool || n.op == OpKind::AvgPool) {
      const PoolSpec s = pool_spec(p, n);
      work += outputs * static_cast<double>(s.kernel_h) * static_cast<double>(s.kernel_w);
    } else if (n.op == OpKind::AdaptiveAvgPool) {
      const Value& x = p.values[n.inputs[0]];
      work += outputs + static_cast<double>(x.c) * static_cast<double>(x.h) * x.w;
    }
  }
  return work;
}

bool computed_in_double(const Program& p) {
  for (const Node& n : p.nodes)
    if (n.op == OpKind::Softmax) return true;
  return false;
}

std::vector<std::vector<float>> noise(const Program& p, int64_t batch) {
  std::vector<std::vector<float>> images;
  uint32_t state = 1;
  for (const int32_t v : p.inputs) {
    const Value& value = p.values[v];
    auto& image = images.emplace_back(static_cast<size_t>(batch * value.c * value.h * value.w));
    if (value.kind == ValueKind::I32) continue;  // the ids that every table has
    for (float& x : image) {
      state = state * 1664525u + 1013904223u;
      x = static_cast<float>(static_cast<int32_t>(state >> 16) - 32768) / 256.0f;
    }
  }
  return images;
}

/// Runs at the shapes that the context has; whether it could.
bool run_at(adalayer_context* context, const adalayer_model* model, int64_t batch) {
  std::vector<std::vector<float>> memory;
  std::vector<adalayer_input> inputs;
  std::vector<adalayer_output> outputs;
  adalayer_tensor_info info = {};
  info.struct_size = sizeof info;
  double total = 0.0;
  for (size_t k = 0; k < adalayer_model_input_count(model); ++k) {
    if (adalayer_context_input_info(context, k, &info) != ADALAYER_OK) return false;
    total += static_cast<double>(info.elements);
    if (total > kWork) return true;
    const float filling = info.type == ADALAYER_INT32 ? 0.0f : 0.5f;
    auto& x = memory.emplace_back(info.elements * static_cast<size_t>(batch), filling);
    inputs.push_back({x.data(), x.size() * 4, info.type, ADALAYER_NCHW});
  }
  for (size_t k = 0; k < adalayer_model_output_count(model); ++k) {
    if (adalayer_context_output_info(context, k, &info) != ADALAYER_OK) return false;
    total += static_cast<double>(info.elements);
    if (total > kWork) return true;
    auto& y = memory.emplace_back(info.elements * static_cast<size_t>(batch), 0.0f);
    outputs.push_back({y.data(), y.size() * 4});
  }
  return adalayer_run(context, batch, inputs.data(), inputs.size(), outputs.data(),
                      outputs.size()) == ADALAYER_OK;
}

/// At the smallest sizes, and at the next ones that are allowed. A size may be refused, but only
/// with a sentence.
void run_at_sizes(adalayer_context* context, const adalayer_model* model) {
  for (const int64_t steps : {0, 1}) {
    for (size_t k = 0; k < adalayer_model_input_count(model); ++k) {
      adalayer_tensor_info info = {};
      info.struct_size = sizeof info;
      if (adalayer_model_input_info(model, k, &info) != ADALAYER_OK) broken("input_info");
      for (size_t a = 0; a < info.rank; ++a) {
        adalayer_axis_info axis = {};
        axis.struct_size = sizeof axis;
        if (adalayer_model_input_sizes(model, k, a, &axis) != ADALAYER_OK) broken("input_sizes");
        if (axis.least == axis.most) continue;
        const int64_t step = axis.multiple_of;
        info.shape[a] = ((axis.least + step - 1) / step + steps) * step;
      }
      if (adalayer_context_set_shape(context, k, info.shape, info.rank) != ADALAYER_OK &&
          *adalayer_last_error() == '\0')
        broken("a shape is refused without a sentence");
    }
    if (!run_at(context, model, 1) && *adalayer_last_error() == '\0')
      broken("a size is refused without a sentence");
  }
}

/// Every tensor that the model describes, filled with noise or room for results.
void run_through_c(adalayer_context* context, const adalayer_model* model, int64_t batch) {
  std::vector<std::vector<float>> memory;
  std::vector<adalayer_input> inputs;
  std::vector<adalayer_output> outputs;
  adalayer_tensor_info info = {};
  info.struct_size = sizeof info;
  double total = 0.0;
  for (size_t k = 0; k < adalayer_model_input_count(model); ++k) {
    if (adalayer_model_input_info(model, k, &info) != ADALAYER_OK) broken("input_info");
    total += static_cast<double>(info.elements);
    if (total > kWork) return;
    const float filling = info.type == ADALAYER_INT32 ? 0.0f : 0.5f;  // ids are bits of zero
    auto& x = memory.emplace_back(info.elements * static_cast<size_t>(batch), filling);
    inputs.push_back({x.data(), x.size() * 4, info.type, ADALAYER_NCHW});
  }
  for (size_t k = 0; k < adalayer_model_output_count(model); ++k) {
    if (adalayer_model_output_info(model, k, &info) != ADALAYER_OK) broken("output_info");
    total += static_cast<double>(info.elements);
    if (total > kWork) return;
    auto& y = memory.emplace_back(info.elements * static_cast<size_t>(batch), 0.0f);
    outputs.push_back({y.data(), y.size() * 4});
  }
  if (adalayer_run(context, batch, inputs.data(), inputs.size(), outputs.data(), outputs.size()) !=
      ADALAYER_OK)
    broken("a loaded model does not run");
}

/// At the sizes that the context has now. A level is refused only with a sentence: one that exists
/// may need more memory, or have damaged weights.
void run_at_levels(adalayer_context* context, const adalayer_model* model) {
  const size_t levels = adalayer_model_quality_count(model);
  for (size_t level = 1; level <= levels; ++level) {
    const bool set = adalayer_context_set_quality(context, level) == ADALAYER_OK;
    if (set && level == levels) broken("a level that does not exist");
    if ((!set || !run_at(context, model, 1)) && *adalayer_last_error() == '\0')
      broken("a level is refused without a sentence");
  }
}

void check_results(const Program& p, const Engine& engine, int64_t batch, int threads) {
  const std::vector<std::vector<float>> images = noise(p, batch);
  std::vector<InputTensor> inputs;
  for (const auto& image : images)
    inputs.push_back({image.data(), Layout::NCHW});
  const std::vector<std::vector<float>> want = interpret(p, inputs, batch);
  std::vector<std::vector<float>> got;
  std::vector<float*> outputs;
  for (const auto& y : want)
    got.emplace_back(y.size(), NAN);
  for (auto& y : got)
    outputs.push_back(y.data());
  engine.run(inputs, batch, outputs, threads);
  if (computed_in_double(p)) return;
  for (size_t k = 0; k < want.size(); ++k)
    for (size_t i = 0; i < want[k].size(); ++i)
      if (std::memcmp(&want[k][i], &got[k][i], 4) != 0 &&
          !(std::isnan(want[k][i]) && std::isnan(got[k][i]))) {
        std::fprintf(stderr, "output %zu, element %zu: expected %a, got %a\n", k, i,
                     static_cast<double>(want[k][i]), static_cast<double>(got[k][i]));
        broken("the engine and the interpreter disagree");
      }
}

void run_program(const Program& p) {
  EngineOptions options;
  options.memory_bytes = kMemory;
  options.chunk = static_cast<int64_t>(p.nodes.size() % 3);
  options.weights = p.constants.size() % 2 == 0 ? WeightForm::Streamed : WeightForm::Resident;
  const Engine engine(p, options);
  check_results(p, engine, 1, 1);
  check_results(p, engine, 3, 1 + static_cast<int>(p.values.size() % 2));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // A copy of exactly this size, so that the sanitizer sees every byte read beyond it.
  const std::vector<uint8_t> file(data, data + size);
  // Not measured: the clock would be asked in every execution.
  adalayer_load_options options = {};
  options.struct_size = sizeof options;
  options.memory_limit = static_cast<uint64_t>(kMemory);
  options.weights = size % 2 == 0 ? ADALAYER_WEIGHTS_PACKED : ADALAYER_WEIGHTS_UNPACKED;
  adalayer_model* model = nullptr;
  const adalayer_status status =
      adalayer_model_load_memory(file.data(), file.size(), &options, &model);
  if ((status == ADALAYER_OK) != (model != nullptr)) broken("status and model disagree");
  if (status == ADALAYER_INTERNAL_ERROR || status == ADALAYER_OUT_OF_MEMORY ||
      (status == ADALAYER_INVALID_ARGUMENT && size != 0))
    broken("a file was refused for the wrong reason");
  if (status != ADALAYER_OK && *adalayer_last_error() == '\0') broken("refused without a sentence");

  Program program;
  try {
    program = read_program(file);
  } catch (const CorruptData&) {
    if (model != nullptr) broken("one reader takes what the other refuses");
    return 0;
  }
  const std::vector<uint8_t> again = write_program(program);
  if (write_program(read_program(again)) != again) broken("the file changes when written again");

  const bool small = work_of(program) <= kWork;
  const bool loaded = model != nullptr;
  adalayer_context* context = nullptr;
  if (loaded) {
    if (adalayer_context_create(model, &context) != ADALAYER_OK) broken("no context");
    if (small) {
      run_through_c(context, model, 2);
      run_at_sizes(context, model);
      run_at_levels(context, model);
    }
  }
  adalayer_model_free(model);
  adalayer_context_free(context);
  if (!small) return 0;
  // What the C interface refused because of its texts runs all the same. Weights are unpacked, and
  // found to be damaged, when the program is made ready.
  for (size_t level = 0; level <= program.levels.size(); ++level) {
    try {
      run_program(at_level(program, level));
    } catch (const Error& e) {
      if (loaded && level == 0) broken(e.what());
    }
  }
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  return fuzz::mutate_file(data, size, max_size, seed);
}

/// What the sanitizers are told: one allocation beyond the limit on memory is a finding.
extern "C" const char* __asan_default_options() {
  return "max_allocation_size_mb=256:allocator_may_return_null=0:detect_leaks=1:abort_on_error=0";
}

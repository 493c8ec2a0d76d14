// The functions of adalayer.h: what they get is checked, exceptions end here.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "adalayer/adalayer.h"
#include "capi/context.hpp"
#include "capi/model.hpp"
#include "core/cpu_features.hpp"
#include "core/status.hpp"
#include "engine/container.hpp"
#include "engine/engine.hpp"

using namespace adalayer;

struct adalayer_model {
  std::shared_ptr<const capi::Model> shared;
};
struct adalayer_context {
  capi::Context context;
};

namespace {

constexpr int64_t kDefaultMemory = int64_t{4} << 30;

static_assert(capi::kMaxRank == ADALAYER_MAX_RANK);

/// The last error of a thread. A fixed size: to say that there is no memory must need none.
struct LastError {
  char text[2048] = "";

  void set(const char* message) noexcept {
    const size_t length = std::min(std::strlen(message), sizeof text - 1);
    std::memcpy(text, message, length);
    text[length] = '\0';
  }
};
thread_local LastError g_last_error;

adalayer_status failed(adalayer_status status, const char* message) noexcept {
  g_last_error.set(message);
  return status;
}

/// Runs `body`; every exception becomes a status and a sentence.
template <class F>
adalayer_status guarded(F&& body) noexcept {
  try {
    body();
    return ADALAYER_OK;
  } catch (const InvalidArgument& e) {
    return failed(ADALAYER_INVALID_ARGUMENT, e.what());
  } catch (const CorruptData& e) {
    return failed(ADALAYER_CORRUPT_DATA, e.what());
  } catch (const LimitExceeded& e) {
    return failed(ADALAYER_LIMIT_EXCEEDED, e.what());
  } catch (const engine::FileError& e) {
    return failed(ADALAYER_FILE_ERROR, e.what());
  } catch (const OutOfMemory& e) {
    return failed(ADALAYER_OUT_OF_MEMORY, e.what());
  } catch (const std::bad_alloc&) {
    return failed(ADALAYER_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return failed(ADALAYER_INTERNAL_ERROR, e.what());
  } catch (...) {
    return failed(ADALAYER_INTERNAL_ERROR, "an unknown exception");
  }
}

template <class T>
void not_null(const T* pointer, const char* what) {
  if (pointer == nullptr) fail<InvalidArgument>(what, ": expected a pointer, got null");
}

/// The options that the caller's version of the header knows; later ones have their defaults.
engine::EngineOptions options_from(const adalayer_load_options* given) {
  adalayer_load_options o = {};
  if (given != nullptr) {
    constexpr size_t kFirst = offsetof(adalayer_load_options, memory_limit) + sizeof(uint64_t);
    if (given->struct_size < kFirst)
      fail<InvalidArgument>("options: expected a struct_size of at least ", kFirst, ", got ",
                            given->struct_size);
    std::memcpy(&o, given, std::min(given->struct_size, sizeof o));
  }
  engine::EngineOptions options;
  options.memory_bytes = o.memory_limit == 0
                             ? kDefaultMemory
                             : static_cast<int64_t>(std::min<uint64_t>(o.memory_limit, INT64_MAX));
  switch (o.weights) {
    case ADALAYER_WEIGHTS_MEASURED:
      options.weights = engine::WeightForm::Measured;
      break;
    case ADALAYER_WEIGHTS_PACKED:
      options.weights = engine::WeightForm::Streamed;
      break;
    case ADALAYER_WEIGHTS_UNPACKED:
      options.weights = engine::WeightForm::Resident;
      break;
    default:
      fail<InvalidArgument>("options: expected weights of 0 to 2, got ", o.weights);
  }
  if (o.reserved != 0) fail<InvalidArgument>("options: the reserved field must be 0");
  return options;
}

template <class Read>
adalayer_status load(adalayer_model** model, const adalayer_load_options* given, const Read& read) {
  if (model != nullptr) *model = nullptr;
  return guarded([&] {
    not_null(model, "model");
    const engine::EngineOptions options = options_from(given);
    auto made = std::make_unique<adalayer_model>();
    engine::Program program = read(options.memory_bytes);
    (void)active_isa();  // what is wrong with the environment is not the file's fault
    try {
      made->shared = std::make_shared<const capi::Model>(std::move(program), options);
    } catch (const InvalidArgument& e) {
      throw CorruptData(e.what());  // of the file, not of the caller
    }
    *model = made.release();
  });
}

adalayer_type type_of(const capi::Port& port) {
  return port.ids ? ADALAYER_INT32 : ADALAYER_FLOAT32;
}
adalayer_type type_of(const capi::OutputView&) { return ADALAYER_FLOAT32; }

template <class Tensor>
void describe(const std::vector<Tensor>& tensors, size_t index, const char* what,
              adalayer_tensor_info* info) {
  not_null(info, "info");
  // The struct of earlier headers ends here.
  constexpr size_t kFirst = offsetof(adalayer_tensor_info, type);
  if (info->struct_size < kFirst)
    fail<InvalidArgument>("info: expected a struct_size of at least ", kFirst, ", got ",
                          info->struct_size);
  if (index >= tensors.size())
    fail<InvalidArgument>(what, ' ', index, " does not exist (there are ", tensors.size(), ")");
  const Tensor& t = tensors[index];
  info->name = t.name.c_str();
  info->rank = t.shape.size();
  std::fill(std::begin(info->shape), std::end(info->shape), 0);
  std::copy(t.shape.begin(), t.shape.end(), info->shape);
  info->elements = static_cast<uint64_t>(t.elements);
  if (info->struct_size < sizeof *info) return;
  info->type = type_of(t);
  info->reserved = 0;
}

const std::map<std::string, std::string>& metadata_of(const adalayer_model& model) {
  return model.shared->engine().program().metadata;
}

/// A function that returns no status: `fallback` where something is wrong.
template <class T, class F>
T quiet(T fallback, F&& body) noexcept {
  try {
    return body();
  } catch (const std::exception& e) {
    g_last_error.set(e.what());
    return fallback;
  }
}

}  // namespace

extern "C" {

const char* adalayer_last_error(void) { return g_last_error.text; }

const char* adalayer_status_text(adalayer_status status) {
  switch (status) {
    case ADALAYER_OK:
      return "ok";
    case ADALAYER_INVALID_ARGUMENT:
      return "invalid argument";
    case ADALAYER_CORRUPT_DATA:
      return "corrupt data";
    case ADALAYER_FILE_ERROR:
      return "file error";
    case ADALAYER_LIMIT_EXCEEDED:
      return "limit exceeded";
    case ADALAYER_OUT_OF_MEMORY:
      return "out of memory";
    case ADALAYER_INTERNAL_ERROR:
      return "internal error";
    default:
      return "unknown status";
  }
}

uint32_t adalayer_abi_version(void) { return ADALAYER_ABI_VERSION; }
const char* adalayer_version(void) { return ADALAYER_PACKAGE_VERSION; }
const char* adalayer_instruction_set(void) {
  // The names are literals, so that they end with a zero byte.
  return quiet("invalid", [] { return isa_name(active_isa()).data(); });
}

adalayer_status adalayer_model_load(const char* path, const adalayer_load_options* options,
                                    adalayer_model** model) {
  return load(model, options, [&](int64_t limit) {
    not_null(path, "path");
    return engine::load_program(path, limit);
  });
}

adalayer_status adalayer_model_load_memory(const void* bytes, size_t size,
                                           const adalayer_load_options* options,
                                           adalayer_model** model) {
  return load(model, options, [&](int64_t limit) {
    not_null(bytes, "bytes");
    if (size > static_cast<uint64_t>(limit))
      fail<LimitExceeded>("expected at most ", limit, " bytes (the limit on memory), got ", size);
    return engine::read_program({static_cast<const uint8_t*>(bytes), size});
  });
}

void adalayer_model_free(adalayer_model* model) { delete model; }

size_t adalayer_model_input_count(const adalayer_model* model) {
  return model == nullptr ? 0 : model->shared->inputs().size();
}

size_t adalayer_model_output_count(const adalayer_model* model) {
  return model == nullptr ? 0 : model->shared->outputs().size();
}

adalayer_status adalayer_model_input_info(const adalayer_model* model, size_t index,
                                          adalayer_tensor_info* info) {
  if (model == nullptr) return failed(ADALAYER_INVALID_ARGUMENT, "model: got null");
  return guarded([&] { describe(model->shared->inputs(), index, "input", info); });
}

adalayer_status adalayer_model_output_info(const adalayer_model* model, size_t index,
                                           adalayer_tensor_info* info) {
  if (model == nullptr) return failed(ADALAYER_INVALID_ARGUMENT, "model: got null");
  return guarded([&] { describe(model->shared->outputs(), index, "output", info); });
}

adalayer_status adalayer_model_input_sizes(const adalayer_model* model, size_t index, size_t axis,
                                           adalayer_axis_info* info) {
  return guarded([&] {
    not_null(model, "model");
    not_null(info, "info");
    if (info->struct_size < sizeof *info)
      fail<InvalidArgument>("info: expected a struct_size of at least ", sizeof *info, ", got ",
                            info->struct_size);
    const capi::Model& m = *model->shared;
    if (index >= m.inputs().size())
      fail<InvalidArgument>("input ", index, " does not exist (there are ", m.inputs().size(), ")");
    const std::vector<int64_t>& shape = m.inputs()[index].shape;
    if (axis >= shape.size())
      fail<InvalidArgument>("axis ", axis, " does not exist (there are ", shape.size(), ")");
    const engine::SizeAxis* free = m.axis(index, axis);
    info->name = free == nullptr ? "" : free->name.c_str();
    info->least = free == nullptr ? shape[axis] : free->least;
    info->most = free == nullptr ? shape[axis] : free->most;
    info->multiple_of = free == nullptr ? 1 : free->multiple_of;
  });
}

size_t adalayer_model_class_count(const adalayer_model* model) {
  return model == nullptr ? 0 : model->shared->class_names().size();
}

const char* adalayer_model_class_name(const adalayer_model* model, size_t index) {
  if (index >= adalayer_model_class_count(model)) return nullptr;
  return model->shared->class_names()[index].c_str();
}

const char* adalayer_model_metadata(const adalayer_model* model, const char* key) {
  if (model == nullptr || key == nullptr) return nullptr;
  return quiet<const char*>(nullptr, [&]() -> const char* {
    const auto found = metadata_of(*model).find(key);
    return found == metadata_of(*model).end() ? nullptr : found->second.c_str();
  });
}

size_t adalayer_model_metadata_count(const adalayer_model* model) {
  return model == nullptr ? 0 : metadata_of(*model).size();
}

const char* adalayer_model_metadata_key(const adalayer_model* model, size_t index) {
  if (index >= adalayer_model_metadata_count(model)) return nullptr;
  return std::next(metadata_of(*model).begin(), static_cast<std::ptrdiff_t>(index))->first.c_str();
}

adalayer_status adalayer_model_normalization(const adalayer_model* model, float* mean, float* std,
                                             size_t channels) {
  return guarded([&] {
    not_null(model, "model");
    not_null(mean, "mean");
    not_null(std, "std");
    const auto n = model->shared->normalization(
        static_cast<int64_t>(std::min<size_t>(channels, engine::kMaxAxis)));
    if (!n.has_value() || n->mean.size() != channels)
      fail<InvalidArgument>("the model has no normalization for images of ", channels, " channels");
    std::copy(n->mean.begin(), n->mean.end(), mean);
    std::copy(n->std.begin(), n->std.end(), std);
  });
}

uint64_t adalayer_model_weight_bytes(const adalayer_model* model) {
  return model == nullptr ? 0 : model->shared->engine().weight_bytes();
}

size_t adalayer_model_quality_count(const adalayer_model* model) {
  return model == nullptr ? 0 : model->shared->levels();
}

uint64_t adalayer_model_workspace_bytes(const adalayer_model* model) {
  return model == nullptr ? 0 : model->shared->engine().workspace_bytes();
}

adalayer_status adalayer_context_create(const adalayer_model* model, adalayer_context** context) {
  if (context != nullptr) *context = nullptr;
  return guarded([&] {
    not_null(context, "context");
    not_null(model, "model");
    *context = new adalayer_context{capi::Context(model->shared)};
  });
}

void adalayer_context_free(adalayer_context* context) { delete context; }

adalayer_status adalayer_context_set_threads(adalayer_context* context, int32_t threads) {
  return guarded([&] {
    not_null(context, "context");
    context->context.set_threads(threads);
  });
}

adalayer_status adalayer_context_set_normalization(adalayer_context* context, size_t index,
                                                   const float* mean, const float* std,
                                                   size_t channels) {
  return guarded([&] {
    not_null(context, "context");
    not_null(mean, "mean");
    not_null(std, "std");
    context->context.set_normalization(index, {mean, channels}, {std, channels});
  });
}

adalayer_status adalayer_context_set_shape(adalayer_context* context, size_t index,
                                           const int64_t* shape, size_t rank) {
  return guarded([&] {
    not_null(context, "context");
    not_null(shape, "shape");
    context->context.set_shape(index, {shape, rank});
  });
}

adalayer_status adalayer_context_set_quality(adalayer_context* context, size_t level) {
  return guarded([&] {
    not_null(context, "context");
    context->context.set_quality(level);
  });
}

adalayer_status adalayer_context_input_info(adalayer_context* context, size_t index,
                                            adalayer_tensor_info* info) {
  return guarded([&] {
    not_null(context, "context");
    context->context.describe(
        [&](const capi::Sized& at) { describe(at.inputs, index, "input", info); });
  });
}

adalayer_status adalayer_context_output_info(adalayer_context* context, size_t index,
                                             adalayer_tensor_info* info) {
  return guarded([&] {
    not_null(context, "context");
    context->context.describe(
        [&](const capi::Sized& at) { describe(at.outputs, index, "output", info); });
  });
}

adalayer_status adalayer_run(adalayer_context* context, int64_t batch, const adalayer_input* inputs,
                             size_t input_count, const adalayer_output* outputs,
                             size_t output_count) {
  return guarded([&] {
    not_null(context, "context");
    not_null(inputs, "inputs");
    not_null(outputs, "outputs");
    context->context.run(batch, {inputs, input_count}, {outputs, output_count});
  });
}

}  // extern "C"

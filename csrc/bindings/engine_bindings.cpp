// _C.Program, which Python builds piece by piece, and _C.Engine, which runs it. Buffers are raw
// addresses, as in module.cpp; the sizes follow from the program's values.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "core/status.hpp"
#include "engine/at_size.hpp"
#include "engine/container.hpp"
#include "engine/engine.hpp"
#include "engine/interpret.hpp"
#include "engine/leveled_engine.hpp"
#include "engine/levels.hpp"
#include "engine/program.hpp"
#include "engine/sized_engine.hpp"
#include "formats/canonical.hpp"

namespace py = pybind11;
using namespace adalayer;
using namespace adalayer::engine;

namespace {

using Addresses = std::vector<uintptr_t>;

WeightForm weight_form(const std::string& name) {
  if (name == "measured") return WeightForm::Measured;
  if (name == "streamed") return WeightForm::Streamed;
  if (name == "resident") return WeightForm::Resident;
  fail<InvalidArgument>("weights: expected measured, streamed or resident, got '", name, "'");
}

int32_t add_value(Program& p, std::string name, const std::string& kind, int64_t c, int64_t h,
                  int64_t w, float scale, int32_t zero_point, int32_t qmax) {
  if (kind != "u8" && kind != "f32" && kind != "i32")
    fail<InvalidArgument>("value \"", name, "\": expected kind u8, f32 or i32, got ", kind);
  const ValueKind number = kind == "u8"    ? ValueKind::U8
                           : kind == "f32" ? ValueKind::F32
                                           : ValueKind::I32;
  p.values.push_back({std::move(name), number, c, h, w, scale, zero_point, qmax});
  return static_cast<int32_t>(p.values.size()) - 1;
}

/// Copies `count` entries of `Width` bytes.
template <ConstantKind kind, size_t Width>
int32_t add_constant(Program& p, uintptr_t address, size_t count) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(address);
  p.constants.push_back({kind, SharedBytes(bytes, bytes + count * Width)});
  return static_cast<int32_t>(p.constants.size()) - 1;
}

void add_node(Program& p, const std::string& op, std::string name, std::vector<int32_t> inputs,
              int32_t output, std::vector<int64_t> ints, std::vector<float> floats,
              std::vector<int32_t> constants) {
  p.nodes.push_back({op_from_name(op), std::move(name), std::move(inputs), output, std::move(ints),
                     std::move(floats), std::move(constants)});
}

py::list values(const Program& p) {
  py::list out;
  for (const Value& v : p.values)
    out.append(
        py::make_tuple(v.name, kind_name(v.kind), v.c, v.h, v.w, v.scale, v.zero_point, v.qmax));
  return out;
}

py::list nodes(const Program& p) {
  py::list out;
  for (const Node& n : p.nodes)
    out.append(
        py::make_tuple(op_name(n.op), n.name, n.inputs, n.output, n.ints, n.floats, n.constants));
  return out;
}

py::list constants(const Program& p) {
  py::list out;
  for (const Constant& c : p.constants)
    out.append(py::make_tuple(kind_name(c.kind), c.bytes.size()));
  return out;
}

/// The table of operations, by name and in the order of their numbers;
/// python/adalayer_native/operations.py reads it.
py::dict operations() {
  const auto text = [](std::string_view view) { return py::str(view.data(), view.size()); };
  py::dict all;
  for (const Operation& o : kOperations) {
    py::list forms, ints, floats, constants;
    for (const Form& f : o.forms)
      forms.append(
          py::make_tuple(kind_name(f.inputs), kind_name(f.output), std::max(f.minor, o.minor)));
    for (const IntParameter& p : o.ints)
      ints.append(py::make_tuple(text(p.name), p.low, p.high,
                                 p.usual == kNoUsual ? py::object(py::none()) : py::int_(p.usual)));
    for (const FloatParameter& p : o.floats)
      floats.append(py::make_tuple(
          text(p.name), p.has_usual ? py::object(py::float_(p.usual)) : py::object(py::none())));
    for (const ConstantParameter& p : o.constants)
      constants.append(
          py::make_tuple(text(p.name), kind_name(p.kind), kind_name(p.other), p.optional));
    py::dict entry;
    entry["inputs"] = py::make_tuple(o.inputs_min, o.inputs_max);
    entry["forms"] = forms;
    entry["ints"] = ints;
    entry["floats"] = floats;
    entry["constants"] = constants;
    entry["table_per_input"] = o.table_per_input;
    all[text(o.name)] = entry;
  }
  return all;
}

py::bytes constant_bytes(const Program& p, size_t index) {
  if (index >= p.constants.size())
    fail<InvalidArgument>("constant ", index, " does not exist (there are ", p.constants.size(),
                          ")");
  const auto& bytes = p.constants[index].bytes;
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

py::bytes to_bytes(const Program& p) {
  std::vector<uint8_t> bytes;
  {
    const py::gil_scoped_release release;
    bytes = write_program(p);
  }
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// The tensors of one call. Their number is checked here: run() would read beyond the lists.
struct Call {
  std::vector<InputTensor> inputs;
  std::vector<float*> outputs;

  Call(const Program& p, const Addresses& in, const std::vector<bool>& nhwc, const Addresses& out) {
    if (in.size() != p.inputs.size() || nhwc.size() != p.inputs.size())
      fail<InvalidArgument>("expected ", p.inputs.size(), " inputs and as many layouts, got ",
                            in.size(), " and ", nhwc.size());
    if (out.size() != p.outputs.size())
      fail<InvalidArgument>("expected ", p.outputs.size(), " outputs, got ", out.size());
    for (size_t k = 0; k < in.size(); ++k)
      inputs.push_back(
          {reinterpret_cast<const void*>(in[k]), nhwc[k] ? Layout::NHWC : Layout::NCHW});
    for (const uintptr_t address : out)
      outputs.push_back(reinterpret_cast<float*>(address));
  }
};

void run_reference(const Program& p, const Addresses& in, const std::vector<bool>& nhwc,
                   int64_t batch, const Addresses& out) {
  const Call call(p, in, nhwc, out);
  const py::gil_scoped_release release;
  const auto results = interpret(p, call.inputs, batch);
  for (size_t k = 0; k < results.size(); ++k)
    std::copy(results[k].begin(), results[k].end(), call.outputs[k]);
}

/// Every value of a reference run as bytes: u8 levels, float32 numbers or int32 ids.
py::list reference_values(const Program& p, const Addresses& in, const std::vector<bool>& nhwc,
                          int64_t batch) {
  const Call call(p, in, nhwc, Addresses(p.outputs.size()));
  std::vector<Tensor> tensors;
  {
    const py::gil_scoped_release release;
    tensors = interpret_values(p, call.inputs, batch);
  }
  py::list out;
  for (size_t v = 0; v < tensors.size(); ++v) {
    const auto bytes = [](const auto& held) {
      return py::bytes(reinterpret_cast<const char*>(held.data()), held.size() * sizeof held[0]);
    };
    const Tensor& t = tensors[v];
    const ValueKind kind = p.values[v].kind;
    out.append(kind == ValueKind::U8    ? bytes(t.levels)
               : kind == ValueKind::F32 ? bytes(t.numbers)
                                        : bytes(t.ids));
  }
  return out;
}

void run(const Engine& e, const Addresses& in, const std::vector<bool>& nhwc, int64_t batch,
         const Addresses& out, int threads) {
  const Call call(e.program(), in, nhwc, out);
  const py::gil_scoped_release release;
  e.run(call.inputs, batch, call.outputs, threads);
}

py::list profile(const Engine& e, int64_t batch, int threads, int rounds) {
  std::vector<NodeProfile> profiles;
  {
    const py::gil_scoped_release release;
    profiles = e.profile(batch, threads, rounds);
  }
  py::list out;
  for (const NodeProfile& n : profiles)
    out.append(py::make_tuple(n.name, op_name(n.op), n.kernel, n.bits, n.macs, n.packed_bytes,
                              n.derived_bytes, n.microseconds, n.why));
  return out;
}

/// Sizes of the tensors at the boundary, (c, h, w) each.
py::list port_sizes(const Engine& e, const std::vector<int32_t>& ports) {
  py::list out;
  for (const int32_t v : ports) {
    const Value& value = e.program().values[v];
    out.append(py::make_tuple(value.c, value.h, value.w));
  }
  return out;
}

EngineOptions options_of(int64_t chunk, int64_t cache_bytes, const std::string& weights,
                         int64_t memory_bytes, const std::string& plan) {
  EngineOptions options;
  options.chunk = chunk;
  options.cache_bytes = cache_bytes;
  options.weights = weight_form(weights);
  options.memory_bytes = memory_bytes;
  options.plan = plan;
  return options;
}

py::dict cache_info(const engine::CacheInfo& info) {
  py::dict found;
  found["entries"] = info.entries;
  found["bytes"] = info.bytes;
  found["made"] = info.made;
  found["most_entries"] = info.limits.entries;
  found["most_bytes"] = info.limits.bytes;
  return found;
}

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("add_value", &add_value, py::arg("name"), py::arg("kind"), py::arg("c"),
           py::arg("h") = 1, py::arg("w") = 1, py::arg("scale") = 1.0f, py::arg("zero_point") = 0,
           py::arg("qmax") = 255)
      .def("add_constant_weights", &add_constant<ConstantKind::Weights, 1>)
      .def("add_constant_f32", &add_constant<ConstantKind::F32, 4>)
      .def("add_constant_i32", &add_constant<ConstantKind::I32, 4>)
      .def("add_constant_u8", &add_constant<ConstantKind::U8, 1>)
      .def("add_node", &add_node, py::arg("op"), py::arg("name"), py::arg("inputs"),
           py::arg("output"), py::arg("ints") = std::vector<int64_t>(),
           py::arg("floats") = std::vector<float>(), py::arg("constants") = std::vector<int32_t>())
      .def("set_inputs", [](Program& p, std::vector<int32_t> v) { p.inputs = std::move(v); })
      .def("set_outputs", [](Program& p, std::vector<int32_t> v) { p.outputs = std::move(v); })
      .def("inputs", [](const Program& p) { return p.inputs; })
      .def("outputs", [](const Program& p) { return p.outputs; })
      .def("metadata", [](const Program& p) { return p.metadata; })
      .def("set_metadata", [](Program& p, const std::string& key,
                              std::string text) { p.metadata[key] = std::move(text); })
      .def("values", &values)
      .def("nodes", &nodes)
      .def("constants", &constants)
      .def("constant_bytes", &constant_bytes)
      .def("validate", [](const Program& p) { engine::validate(p); })
      .def("at_size",
           [](const Program& p, const std::vector<int64_t>& sizes) {
             const py::gil_scoped_release release;
             return at_size(p, read_sizes(p), sizes);
           })
      .def("levels", [](const Program& p) { return p.levels.size() + 1; })
      .def("add_level", &add_level, py::call_guard<py::gil_scoped_release>())
      // With weights of its own: what a view is, Python need not know.
      .def("at_level",
           [](const Program& p, size_t level) {
             const py::gil_scoped_release release;
             return own_weights(at_level(p, level));
           })
      .def("to_bytes", &to_bytes)
      .def_static("from_bytes",
                  [](uintptr_t address, size_t size) {
                    const py::gil_scoped_release release;
                    return read_program({reinterpret_cast<const uint8_t*>(address), size});
                  })
      .def("save", &save_program, py::call_guard<py::gil_scoped_release>())
      .def_static("load", &load_program, py::arg("path"), py::arg("memory_bytes") = 0,
                  py::call_guard<py::gil_scoped_release>())
      .def("run_reference", &run_reference)
      .def("reference_values", &reference_values);
}

void bind_one_size(py::module_& m) {
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](const Program& program, int64_t chunk, int64_t cache_bytes,
                       const std::string& weights, int64_t memory_bytes, const std::string& plan) {
             const EngineOptions options =
                 options_of(chunk, cache_bytes, weights, memory_bytes, plan);
             const py::gil_scoped_release release;
             return Engine(Program(program), options);
           }),
           py::arg("program"), py::arg("chunk") = 0, py::arg("cache_bytes") = 0,
           py::arg("weights") = "measured", py::arg("memory_bytes") = 0, py::arg("plan") = "")
      .def("run", &run)
      .def("any_order",
           [](const Engine& engine) {
             std::vector<bool> any;
             for (size_t k = 0; k < engine.program().inputs.size(); ++k)
               any.push_back(engine.any_order(k));
             return any;
           })
      .def("profile", &profile)
      .def("forms", &Engine::forms)
      .def("plan", &Engine::plan)
      .def("weight_bytes", &Engine::weight_bytes)
      .def("workspace_bytes", &Engine::workspace_bytes)
      .def("own_bytes", &Engine::own_bytes)
      .def("input_sizes", [](const Engine& e) { return port_sizes(e, e.program().inputs); })
      .def("output_sizes", [](const Engine& e) { return port_sizes(e, e.program().outputs); })
      // A copy: the engine's own never changes.
      .def("program", [](const Engine& e) { return Program(e.program()); });
}

void bind_sizes(py::module_& m) {
  // pybind11 knows no pointers to const; every method of an Engine is.
  const auto shown = [](const std::shared_ptr<const Engine>& engine) {
    return std::const_pointer_cast<Engine>(engine);
  };
  py::class_<SizedEngine, std::shared_ptr<SizedEngine>>(m, "SizedEngine")
      .def(py::init([](const Program& program, const std::string& weights, int64_t memory_bytes,
                       const std::string& plan) {
             const EngineOptions options = options_of(0, 0, weights, memory_bytes, plan);
             const py::gil_scoped_release release;
             return std::make_shared<SizedEngine>(Program(program), options);
           }),
           py::arg("program"), py::arg("weights") = "measured", py::arg("memory_bytes") = 0,
           py::arg("plan") = "")
      .def("compiled", [shown](const SizedEngine& e) { return shown(e.compiled()); })
      .def("at",
           [shown](const SizedEngine& e, const std::vector<int64_t>& sizes) {
             const py::gil_scoped_release release;
             return shown(e.at(sizes));
           })
      .def("warm_up",
           [shown](const SizedEngine& e, const std::vector<int64_t>& sizes) {
             const py::gil_scoped_release release;
             return shown(e.warm_up(sizes));
           })
      .def("info", [](const SizedEngine& e) { return cache_info(e.info()); })
      .def("set_limits",
           [](SizedEngine& e, size_t entries, size_t bytes) { e.set_limits({entries, bytes}); });

  py::class_<LeveledEngine>(m, "LeveledEngine")
      .def(py::init([](const Program& program, const std::string& weights, int64_t memory_bytes,
                       const std::string& plan) {
             const EngineOptions options = options_of(0, 0, weights, memory_bytes, plan);
             const py::gil_scoped_release release;
             return std::make_unique<LeveledEngine>(Program(program), options);
           }),
           py::arg("program"), py::arg("weights") = "measured", py::arg("memory_bytes") = 0,
           py::arg("plan") = "")
      .def("levels", &LeveledEngine::levels)
      .def("at",
           [](const LeveledEngine& e, size_t level) {
             const py::gil_scoped_release release;
             return std::const_pointer_cast<SizedEngine>(e.at(level));
           })
      .def("info", [](const LeveledEngine& e) { return cache_info(e.info()); })
      .def("set_limits",
           [](LeveledEngine& e, size_t entries, size_t bytes) { e.set_limits({entries, bytes}); });
}

}  // namespace

void bind_engine(py::module_& m) {
  // OSError picks its subclass (FileNotFoundError, PermissionError ...) by the number.
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const FileError& e) {
      const auto type = py::reinterpret_borrow<py::object>(PyExc_OSError);
      const py::object error = type(e.code(), e.what());
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    }
  });

  m.def("operations", &operations);
  // What the length of a packed weight is counted with before it is packed.
  m.attr("HEADER_BYTES") = sizeof(formats::CanonicalHeader);
  m.attr("MOST_LEVELS") = engine::kMaxLevels;
  m.attr("FILE_BLOCK") = py::make_tuple(formats::kBlockOut, formats::kBlockIn);
  m.def("fields_bytes", &formats::fields_bytes);
  bind_program(m);
  bind_one_size(m);
  bind_sizes(m);
}

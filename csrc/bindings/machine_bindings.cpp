// Instruction sets, threads, policies and caches.
#include <pybind11/stl.h>

#include <chrono>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "core/cpu_features.hpp"
#include "core/host_openmp.hpp"
#include "core/thread_pool.hpp"
#include "cpu/conv/policy.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/layer/linear_layer.hpp"
#include "cpu/layer/recurrent_layer.hpp"
#include "cpu/layer/single_layer.hpp"
#include "cpu/probe.hpp"
#include "engine/planner.hpp"

namespace py = pybind11;
using namespace adalayer;

void bind_machine(py::module_& m) {
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const auto* row : cpu::kernel_rows())
      if (isa_supported(row->isa)) names.emplace_back(row->name);
    names.emplace_back("scalar");
    return names;
  });
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("force_isa", [](const std::string& name) { force_isa(name); });
  m.def("set_sparse_policy", [](const std::string& name) {
    cpu::set_sparse_policy(name);
    cpu::clear_weight_cache();  // what is derived already was derived under another policy
  });
  m.def("set_winograd_policy", [](const std::string& name) {
    cpu::set_winograd_policy(name);
    cpu::clear_weight_cache();
  });
  m.def("kernels_key", [] {
    // For keys of what was measured: the kernels of this build, and who chooses among them.
    std::ostringstream key;
    key << std::hex << engine::kernels_digest() << '-' << static_cast<int>(cpu::sparse_policy())
        << static_cast<int>(cpu::winograd_policy());
    return key.str();
  });
  m.def("fork_join_seconds", [](int threads, int rounds) {
    // The cost of an empty parallel loop, for bench/test_threads.py.
    const py::gil_scoped_release release;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < rounds; ++i)
      parallel_for(threads, threads, [](int64_t, int) {});
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / rounds;
  });
  m.def("probe_cores", [](int threads) {
    // How fast the cores are now, for the classes of bench/interleave.py.
    const py::gil_scoped_release release;
    const cpu::Probe probe = cpu::probe_cores(threads);
    return std::pair(probe.seconds, probe.operations);
  });
  m.def("threading_backend", [] { return std::string(threading_backend()); });
  m.def("cpu_features", [] { return describe_cpu_features(); });
  m.def("cache_info", [] {
    const auto info = cpu::weight_cache_info();
    return py::make_tuple(info.entries, info.bytes, info.limit);
  });
  m.def("set_cache_limit", &cpu::set_weight_cache_limit);
  m.def("clear_cache", [] {
    cpu::clear_weight_cache();
    cpu::clear_recurrent_cache();
    cpu::clear_linear_cache();
  });
}

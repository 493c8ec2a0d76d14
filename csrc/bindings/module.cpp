// The extension module adalayer_native._C: raw pointers and sizes in, no torch. Tensors are checked
// by python/adalayer_native/ops/ and engine/, the only callers; what arrives here is checked again
// only where a wrong value could read or write outside its buffer.
#include "bindings/bindings.hpp"
#include "core/status.hpp"

namespace py = pybind11;
using namespace adalayer;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of adalayer_native (raw pointers; use adalayer_native.ops).";

  // Translators run newest first, so the base class is registered first.
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& e) {
      py::set_error(PyExc_RuntimeError, e.what());
    }
  });
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const LimitExceeded& e) {
      py::set_error(PyExc_MemoryError, e.what());
    } catch (const InvalidArgument& e) {
      py::set_error(PyExc_ValueError, e.what());
    } catch (const CorruptData& e) {
      py::set_error(PyExc_ValueError, e.what());
    }
  });

  bind_engine(m);
  bind_layers(m);
  bind_machine(m);
}

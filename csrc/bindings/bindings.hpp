// What the parts of the extension module add to it.
#pragma once

#include <pybind11/pybind11.h>

/// _C.Program, _C.Engine and _C.SizedEngine.
void bind_engine(pybind11::module_& m);
/// _C.Layer, operations on floats, packed weights.
void bind_layers(pybind11::module_& m);
/// Instruction sets, threads, policies, caches.
void bind_machine(pybind11::module_& m);

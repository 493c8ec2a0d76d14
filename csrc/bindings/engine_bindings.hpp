#pragma once

#include <pybind11/pybind11.h>

/// Adds _C.Program and _C.Engine.
void bind_engine(pybind11::module_& m);

// The sources of the AMX kernels once more, over tiles in software. Linked into a test they define
// what the library's own row.cpp and probe.cpp would, which the linker then leaves out.
#include "amx_emulation.hpp"
//
#include "cpu/isa/amx/probe.cpp"
#include "cpu/isa/amx/row.cpp"

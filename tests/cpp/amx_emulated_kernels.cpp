// The sources of the AMX kernels once more, over tiles in software. Linked into a test they define
// what the library's own amx.cpp and probe_amx.cpp would, which the linker then leaves out.
#include "amx_emulation.hpp"
//
#include "cpu/amx.cpp"
#include "cpu/probe_amx.cpp"

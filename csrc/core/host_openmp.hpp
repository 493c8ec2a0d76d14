// The OpenMP team that the host process already runs, borrowed for our parallel loops.
//
// torch's operators leave their OpenMP worker spinning for milliseconds after each parallel region
// (libgomp's default is 300,000 pauses). A second pool beside it would share the cores with that
// spinner, and drop-in layers stand between torch operators all the time. Borrowing the very team
// that spins turns the fight into a warm start. Where no libgomp is loaded (a C++ server), after a
// fork (libgomp does not survive one), or with ADALAYER_THREADS=own, the own pool works.
#pragma once

#include "core/function_ref.hpp"

namespace adalayer {

enum class HostTeam {
  Absent,  // there is no team to borrow, or it has lost a core of late; nothing was run
  Busy,    // another call has it, maybe the caller's own outer one; nothing was run
  Done,
};

/// Runs fn() on every member of the host's team of `threads`, the caller included, and waits.
/// fn must not throw. Pass the same number every time: libgomp ends and starts threads when a team
/// changes its size.
HostTeam run_on_host_team(int threads, FunctionRef<void()> fn);

/// "openmp" or "own": what parallel loops of more than one thread use now.
const char* threading_backend();

}  // namespace adalayer

// The one threading entry of the library.
#pragma once

#include <cstdint>

#include "core/function_ref.hpp"

namespace adalayer {

// Upper limit for `threads`; more are treated as this many.
inline constexpr int kMaxThreads = 512;

// Calls fn(task, worker) once for every task in [0, n_tasks) and returns when all calls have
// returned. `worker` is in [0, threads), and two calls that run at the same time never share it,
// so that it can index per-worker scratch memory of this parallel_for; the caller is worker 0.
// A thread may have another worker number in the next parallel_for.
//
// threads: how many threads may take part, the caller included; <= 0 means default_threads().
// Tasks are handed out one by one, in order, to whoever is free: make a task at least a few
// microseconds long. Fewer threads than asked for may turn up (all of them is never a promise),
// and the caller alone then does everything.
//
// Safe from many threads at once and inside a task: while the pool serves one caller, every other
// call runs all of its tasks itself, as worker 0.
//
// If a call of fn throws, tasks that nobody has begun are dropped and the first exception is
// rethrown here, after every running call has returned.
//
// After fork() the child has no workers and starts its own when it needs them. A task must not
// fork unless the child calls exec at once.
void parallel_for(std::int64_t n_tasks, int threads,
                  FunctionRef<void(std::int64_t task, int worker)> fn);

// What threads <= 0 means. At first the number of CPUs that this process may use; Python sets it
// to torch.get_num_threads().
int default_threads();
void set_default_threads(int threads);  // throws InvalidArgument below 1

}  // namespace adalayer

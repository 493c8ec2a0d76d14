// A short fixed computation that tells how fast the cores are at this moment.
//
// On a shared machine a core may lose half of its throughput to a neighbour for seconds at a time.
// Benchmarks run the probe around every sample and compare samples of like state only.
#pragma once

#include <cstdint>

namespace adalayer::cpu {

struct Probe {
  double seconds;      // of the slowest core
  int64_t operations;  // multiplications and additions on each core
};

/// Runs the probe on the calling thread and on `threads - 1` other CPUs of the process, each by a
/// thread that ends with it: no thread pool is woken. It touches 16 KB of memory.
Probe probe_cores(int threads);

/// `products` int8 tile products; only on machines with AMX.
void probe_amx(int64_t products);

}  // namespace adalayer::cpu

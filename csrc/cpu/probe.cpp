#include "cpu/probe.hpp"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "core/cpu_features.hpp"

namespace adalayer::cpu {
namespace {

// About 30 microseconds of a fast core.
constexpr int64_t kProducts = 4096;
constexpr int64_t kOperationsPerProduct = int64_t{2} * 16 * 16 * 64;
constexpr int64_t kWords = 4096;
constexpr int64_t kPasses = 16;

bool has_amx() {
#ifdef ADALAYER_HAVE_AMX_PROBE
  return cpu_features().amx_int8;
#else
  return false;
#endif
}

// Where there is no AMX: additions to numbers in the first cache.
void probe_additions() {
  thread_local uint32_t words[kWords];
  for (int64_t pass = 0; pass < kPasses; ++pass) {
    for (int64_t i = 0; i < kWords; ++i)
      words[i] += 3;
    __asm__ volatile("" ::: "memory");  // every pass is computed
  }
}

double run_once() {
  const auto start = std::chrono::steady_clock::now();
#ifdef ADALAYER_HAVE_AMX_PROBE
  if (has_amx())
    probe_amx(kProducts);
  else
#endif
    probe_additions();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// CPUs that this process may use, the caller's left out.
std::vector<int> other_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &allowed) && cpu != sched_getcpu()) cpus.push_back(cpu);
#endif
  return cpus;
}

void pin_to([[maybe_unused]] int cpu) {
#if defined(__linux__)
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  // Where it is refused, the thread runs where the system puts it: the probe is less sharp.
  static_cast<void>(pthread_setaffinity_np(pthread_self(), sizeof one, &one));
#endif
}

}  // namespace

Probe probe_cores(int threads) {
  const std::vector<int> cpus = other_cpus();
  const size_t others =
      std::min<size_t>(cpus.size(), static_cast<size_t>(std::max(threads, 1)) - 1);
  std::vector<double> seconds(others + 1);
  {
    std::vector<std::jthread> workers;
    for (size_t i = 0; i < others; ++i)
      workers.emplace_back([&, i] {
        pin_to(cpus[i]);
        run_once();  // wakes the core up
        seconds[i] = run_once();
      });
    run_once();
    seconds[others] = run_once();
  }
  const int64_t operations = has_amx() ? kProducts * kOperationsPerProduct : kPasses * kWords;
  return {*std::max_element(seconds.begin(), seconds.end()), operations};
}

}  // namespace adalayer::cpu

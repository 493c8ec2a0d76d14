#include "core/host_openmp.hpp"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/status.hpp"

namespace adalayer {
namespace {

using GompParallel = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

using Clock = std::chrono::steady_clock;

// The team begins and ends a loop together. Where another process holds a core, its member there
// comes back after a time slice of milliseconds, and every loop waits for that; the pool of our own
// does not. So a loop whose caller waited longer than this, and longer than it worked, is a reason
// to do without the team for a while; for twice as long each time it happens again.
constexpr std::chrono::microseconds kPatience{200};
constexpr std::chrono::milliseconds kFirstAbsence{50}, kLongestAbsence{2000};
// Written by whoever holds g_busy.
std::atomic<Clock::rep> g_absent_until{0};
Clock::duration g_absence = kFirstAbsence;

// A process that forked has libgomp's data structures but none of its threads.
std::atomic<bool> g_forked{false};
// One call at a time: a second host thread would get a team of its own and overload the machine.
std::atomic<bool> g_busy{false};

// Registered when the library is loaded, not at first use: the host may fork before that.
[[maybe_unused]] const int g_at_fork = pthread_atfork(nullptr, nullptr, [] {
  g_forked.store(true);
  g_busy.store(false);
});

bool wanted() {
  const char* value = std::getenv("ADALAYER_THREADS");
  if (value == nullptr || *value == '\0' || std::strcmp(value, "auto") == 0) return true;
  if (std::strcmp(value, "own") == 0) return false;
  fail<InvalidArgument>("ADALAYER_THREADS: expected auto or own, got '", value, "'");
}

/// The libgomp that is loaded already, under whatever name a wheel gave it; never loads one.
GompParallel find() {
  if (!wanted()) return nullptr;
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        if (std::strstr(info->dlpi_name, "libgomp") == nullptr) return 0;
        *static_cast<std::string*>(found) = info->dlpi_name;
        return 1;
      },
      &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
}

GompParallel host_parallel() {
  static const GompParallel found = find();
  return g_forked.load(std::memory_order_relaxed) ? nullptr : found;
}

struct Loop {
  FunctionRef<void()> fn;
  pthread_t caller;
  Clock::duration worked{};  // by the caller

  void run() {
    if (pthread_equal(pthread_self(), caller) == 0) return fn();
    const Clock::time_point begin = Clock::now();
    fn();
    worked = Clock::now() - begin;
  }
};

/// Learns from a loop whether the team has its cores.
void judge(Clock::duration worked, Clock::duration waited, Clock::time_point now) {
  if (waited > std::max<Clock::duration>(kPatience, worked)) {
    g_absent_until.store((now + g_absence).time_since_epoch().count(), std::memory_order_relaxed);
    g_absence = std::min<Clock::duration>(2 * g_absence, kLongestAbsence);
  } else {
    g_absence = kFirstAbsence;
  }
}

}  // namespace

HostTeam run_on_host_team(int threads, FunctionRef<void()> fn) {
  const GompParallel parallel = host_parallel();
  if (parallel == nullptr) return HostTeam::Absent;
  const Clock::time_point begin = Clock::now();
  if (begin.time_since_epoch().count() < g_absent_until.load(std::memory_order_relaxed))
    return HostTeam::Absent;
  if (g_busy.exchange(true, std::memory_order_acquire)) return HostTeam::Busy;
  Loop loop{fn, pthread_self()};
  parallel([](void* data) { static_cast<Loop*>(data)->run(); }, &loop,
           static_cast<unsigned>(threads), 0);
  const Clock::time_point end = Clock::now();
  judge(loop.worked, end - begin - loop.worked, end);
  g_busy.store(false, std::memory_order_release);
  return HostTeam::Done;
}

const char* threading_backend() { return host_parallel() != nullptr ? "openmp" : "own"; }

}  // namespace adalayer

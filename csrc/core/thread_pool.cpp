// A fork-join pool for jobs of a few microseconds to a few milliseconds.
//
// Protocol
// --------
// There is at most one job at a time; whoever sets `busy` owns the pool. One 32-bit word, `gate`,
// decides who is inside the job:
//
//     bits  0..11  seats    how many workers may still join
//     bits 12..23  active   how many workers are inside
//     bit  24      waiting  the owner sleeps until `active` is 0
//
//   open    The owner writes `job`, stores gate = seats, bumps `epoch` and wakes sleepers.
//   join    A worker takes a seat and becomes active in ONE compare-and-swap. Its worker number
//           is the seat it took, so numbers are unique within a job. With no seat left there is
//           nothing to join: a worker that wakes late sees seats == 0 and touches nothing else.
//   claim   Inside, owner and workers take tasks from job.next until none is left.
//   close   The owner sets seats to 0. From here nobody can join.
//   leave   A worker decrements `active`; that is its last access to the job.
//   finish  The owner waits for active == 0, that is, for those workers only that did join. One
//           that never got a CPU holds nothing and delays nobody.
//
// The job lives on the owner's stack. That is safe because every access to it lies between a join
// and a leave, and the owner returns only after the last leave. A compare-and-swap that succeeds
// on a gate value read during an earlier job is harmless: it joins the job that is open now, whose
// seat nobody else can have.
//
// Memory order: the owner's store to `gate` (release) publishes `job`; a join (acquire) sees it.
// A leave (release) publishes what the task wrote; the owner's load of active == 0 (acquire) sees
// it; decrements of other workers in between continue the release sequence.
//
// Waiting
// -------
// A worker that finds no job first spins for kSpin, then sleeps in the kernel (futex). Spinning
// makes the next fork-join of a running network cheap (no system call, no wake-up); the bound and
// the sched_yield in every round are for the other inhabitants of the machine: torch's OpenMP
// threads, and other processes. Wake-ups cannot be lost: a worker reads `epoch` before it looks
// at `gate`, and the kernel refuses to put it to sleep if `epoch` has changed since. Even a worker
// that slept through a job would cost speed only.
//
// Placing
// -------
// The kernel likes to wake a thread on the CPU of the thread that woke it, where a worker of ours
// would wait until the owner has done all the work. Workers say where they are; an owner that finds
// one beside itself sends it to the other CPUs that the owner may use.
#include "core/thread_pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <system_error>
#include <thread>
#include <type_traits>

#include "core/host_openmp.hpp"
#include "core/relax.hpp"
#include "core/status.hpp"

#if defined(__linux__)
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace adalayer {
namespace {

// Long enough to bridge the serial code between two layers of a network (tens of microseconds),
// short enough to be invisible in the CPU time of an idle process.
constexpr std::chrono::microseconds kSpin{50};
// Pause instructions between two looks at the clock and a sched_yield. About 0.5 us on x86: the
// delay of noticing a job stays far below the 5 us that a fork-join may take.
constexpr int kPausesPerYield = 8;

constexpr std::uint32_t kSeatMask = 0xfff;
constexpr std::uint32_t kActiveOne = 1U << 12;
constexpr std::uint32_t kActiveMask = 0xfffU << 12;
constexpr std::uint32_t kWaiting = 1U << 24;
static_assert(kMaxThreads <= static_cast<int>(kSeatMask));

// Sleeps until woken, unless *word != expected. May return early; callers loop.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected) {
#if defined(__linux__)
  static_assert(sizeof(word) == sizeof(std::uint32_t));
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
#else
  word.wait(expected, std::memory_order_acquire);
#endif
}

void futex_wake(std::atomic<std::uint32_t>& word, int count) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
#else
  (void)count;
  word.notify_all();
#endif
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

/// Where a worker is. Owners look at the first few only.
struct alignas(64) Place {
  std::atomic<int> thread{0};  // as the kernel numbers it
  std::atomic<int> cpu{-1};
};
constexpr int kPlaces = 64;

/// Sends those of `count` workers that are on the caller's CPU to the caller's other CPUs.
void spread(Place* places, int count) {
#if defined(__linux__)
  const int here = sched_getcpu();
  for (int i = 0; i < count; ++i) {
    if (places[i].cpu.load(std::memory_order_relaxed) != here) continue;
    cpu_set_t others;
    if (sched_getaffinity(0, sizeof(others), &others) != 0) return;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) == 0) return;
    // Failing is no harm: the worker stays where it is.
    (void)sched_setaffinity(places[i].thread.load(std::memory_order_relaxed), sizeof(others),
                            &others);
    places[i].cpu.store(-1, std::memory_order_relaxed);
  }
#else
  (void)places;
  (void)count;
#endif
}

// Spins until done(), at most kSpin. Returns whether it is.
template <typename Done>
bool spin_until(Done done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerYield; ++i) {
      if (done()) return true;
      cpu_relax();
    }
    sched_yield();
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

struct Job {
  Job(std::int64_t tasks, FunctionRef<void(std::int64_t, int)> function)
      : n_tasks(tasks), fn(function) {}

  // Runs tasks until none is left. Never throws: the first exception is kept for the owner.
  void work(int worker) noexcept {
    for (;;) {
      // Relaxed: the counter only hands out numbers; data is ordered by the gate. It cannot
      // overflow, each participant adds at most one beyond n_tasks.
      const std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= n_tasks) return;
      try {
        fn(task, worker);
      } catch (...) {
        if (!failed.exchange(true, std::memory_order_relaxed)) error = std::current_exception();
        next.store(n_tasks, std::memory_order_relaxed);
      }
    }
  }

  const std::int64_t n_tasks;
  const FunctionRef<void(std::int64_t, int)> fn;
  std::exception_ptr error;  // written by the one that set `failed`; read after the finish
  std::atomic<bool> failed{false};
  // On its own cache line: every claim writes it, while n_tasks and fn are only read.
  alignas(64) std::atomic<std::int64_t> next{0};
};

class Pool {
 public:
  // Runs the job with up to `threads` threads, or returns false at once if the pool is taken.
  bool run(Job& job, int threads);

  // In the child of a fork only the forking thread exists. Whatever the parent's threads were
  // doing, their state is void here; the forking thread itself may be the owner of a job (it
  // called fork inside a task) and then goes on alone.
  void reset_after_fork() {
    gate_.store(0, std::memory_order_relaxed);
    sleepers_.store(0, std::memory_order_relaxed);
    spawned_ = 0;
    busy_.store(false, std::memory_order_release);
  }

 private:
  void grow(int workers);
  void worker_loop(int index);
  bool join_and_work();

  // Separate cache lines: `gate` is written by every join and leave, `epoch` is what idle workers
  // look at.
  alignas(64) std::atomic<std::uint32_t> gate_{0};
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<bool> busy_{false};
  Place places_[kPlaces];
  Job* job_ = nullptr;  // valid while the gate has seats or active workers
  int spawned_ = 0;     // touched only by the owner
};

bool Pool::run(Job& job, int threads) {
  // Test first: callers that find the pool taken do not steal the cache line from each other.
  if (busy_.load(std::memory_order_relaxed) || busy_.exchange(true, std::memory_order_acquire)) {
    return false;
  }
  const int workers = threads - 1;
  if (spawned_ < workers) grow(workers);
  spread(places_, std::min(workers, kPlaces));

  // open
  job_ = &job;
  gate_.store(static_cast<std::uint32_t>(workers), std::memory_order_release);
  // Sequentially consistent, as the sleeper count: either the worker going to sleep is counted
  // here, or the kernel shows it the new epoch.
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) futex_wake(epoch_, workers);

  job.work(0);

  // close and finish
  std::uint32_t gate = gate_.fetch_and(~kSeatMask, std::memory_order_acq_rel);
  if ((gate & kActiveMask) != 0) {
    const auto done = [this] { return (gate_.load(std::memory_order_acquire) & kActiveMask) == 0; };
    if (!spin_until(done)) {
      gate = gate_.fetch_or(kWaiting, std::memory_order_acq_rel) | kWaiting;
      while ((gate & kActiveMask) != 0) {
        futex_wait(gate_, gate);
        gate = gate_.load(std::memory_order_acquire);
      }
    }
  }
  busy_.store(false, std::memory_order_release);
  return true;
}

bool Pool::join_and_work() {
  std::uint32_t gate = gate_.load(std::memory_order_acquire);
  do {
    if ((gate & kSeatMask) == 0) return false;
  } while (!gate_.compare_exchange_weak(gate, gate - 1 + kActiveOne, std::memory_order_acq_rel,
                                        std::memory_order_acquire));
  job_->work(static_cast<int>(gate & kSeatMask));
  // leave. If the owner goes on between the two calls below, the wake-up is a spurious one for
  // its next job; the pool itself is never freed.
  gate = gate_.fetch_sub(kActiveOne, std::memory_order_acq_rel);
  if ((gate & kWaiting) != 0 && (gate & kActiveMask) == kActiveOne) futex_wake(gate_, 1);
  return true;
}

void Pool::worker_loop(int index) {
  Place* place = index < kPlaces ? &places_[index] : nullptr;
#if defined(__linux__)
  if (place != nullptr) place->thread.store(static_cast<int>(syscall(SYS_gettid)));
#endif
  for (;;) {
    const std::uint32_t seen = epoch_.load(std::memory_order_seq_cst);
    if (place != nullptr) place->cpu.store(current_cpu(), std::memory_order_relaxed);
    join_and_work();
    const auto changed = [this, seen] { return epoch_.load(std::memory_order_seq_cst) != seen; };
    if (spin_until(changed)) continue;
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (!changed())
      futex_wait(epoch_, seen);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

void Pool::grow(int workers) {
#if defined(__linux__)
  // Workers inherit the signal mask: block everything, so that Ctrl-C and timers reach the
  // threads of the host program.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
  while (spawned_ < workers) {
    try {
      // Detached, and the pool is never torn down: at process exit the kernel ends the workers
      // wherever they are. Joining them from a static destructor could hang (the process may hold
      // locks, or have forked) and could run after what they use is gone.
      std::thread thread([this, index = spawned_] { worker_loop(index); });
#if defined(__linux__)
      char name[16];
      std::snprintf(name, sizeof(name), "adalayer-%d", (spawned_ + 1) % 1000);
      pthread_setname_np(thread.native_handle(), name);
#endif
      thread.detach();
    } catch (const std::system_error&) {
      break;  // the system gives no more threads: the job runs with those there are
    }
    ++spawned_;
  }
#if defined(__linux__)
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
}

// Constant-initialised and trivially destructible: usable from any static constructor, alive until
// the last worker is gone, and no initialisation guard that a fork could catch half-way.
constinit Pool g_pool;
static_assert(std::is_trivially_destructible_v<Pool>);

// Registered when the library is loaded. No lock of the pool can be inherited in a locked state,
// because it has none; the child only resets the state words.
[[maybe_unused]] const int g_at_fork =
    pthread_atfork(nullptr, nullptr, [] { g_pool.reset_after_fork(); });

int available_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count);
}

std::atomic<int> g_default_threads{0};  // 0: not set, ask the system

}  // namespace

void parallel_for(std::int64_t n_tasks, int threads, FunctionRef<void(std::int64_t, int)> fn) {
  if (n_tasks <= 0) return;
  if (threads <= 0) threads = default_threads();
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads > 1 && n_tasks > 1) {
    Job job(n_tasks, fn);
    std::atomic<int> members{0};
    // The whole team even for fewer tasks, so that its size does not change from loop to loop.
    const HostTeam team = run_on_host_team(
        threads, [&] { job.work(members.fetch_add(1, std::memory_order_relaxed)); });
    const int needed = static_cast<int>(std::min<std::int64_t>(threads, n_tasks));
    if (team == HostTeam::Done || (team == HostTeam::Absent && g_pool.run(job, needed))) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (std::int64_t task = 0; task < n_tasks; ++task) {
    fn(task, 0);
  }
}

int default_threads() {
  const int set = g_default_threads.load(std::memory_order_relaxed);
  if (set > 0) return set;
  static const int detected = available_cpus();
  return detected;
}

void set_default_threads(int threads) {
  if (threads < 1) {
    fail<InvalidArgument>("number of threads: expected at least 1, got ", threads);
  }
  g_default_threads.store(threads > kMaxThreads ? kMaxThreads : threads, std::memory_order_relaxed);
}

}  // namespace adalayer

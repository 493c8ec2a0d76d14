// Tests of csrc/core: errors, CPU features and forcing, buffers, the thread pool.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "core/aligned_buffer.hpp"
#include "core/arm_cores.hpp"
#include "core/cpu_features.hpp"
#include "core/status.hpp"
#include "core/thread_pool.hpp"

using namespace adalayer;

namespace {

// Sets ADALAYER_FORCE_ISA for one scope, and makes the library read it again.
class ForcedEnvironment {
 public:
  explicit ForcedEnvironment(const char* value) {
    const char* before = std::getenv("ADALAYER_FORCE_ISA");
    had_ = before != nullptr;
    if (had_) before_ = before;
    set(value);
  }
  ~ForcedEnvironment() { set(had_ ? before_.c_str() : nullptr); }

 private:
  static void set(const char* value) {
    if (value == nullptr) {
      unsetenv("ADALAYER_FORCE_ISA");
    } else {
      setenv("ADALAYER_FORCE_ISA", value, 1);
    }
    force_isa("auto");
  }
  bool had_ = false;
  std::string before_;
};

// Runs n tasks and checks that each ran once, with a worker number in range and never shared.
void check_each_once(std::int64_t n, int threads) {
  std::vector<std::atomic<int>> count(static_cast<std::size_t>(n));
  std::vector<std::atomic<int>> inside(static_cast<std::size_t>(threads));
  std::atomic<bool> in_range{true};
  std::atomic<bool> alone{true};
  parallel_for(n, threads, [&](std::int64_t task, int worker) {
    if (task < 0 || task >= n || worker < 0 || worker >= threads) {
      in_range = false;
      return;
    }
    if (inside[static_cast<std::size_t>(worker)].fetch_add(1) != 0) alone = false;
    count[static_cast<std::size_t>(task)].fetch_add(1, std::memory_order_relaxed);
    inside[static_cast<std::size_t>(worker)].fetch_sub(1);
  });
  bool once = true;
  for (const auto& c : count) {
    once = once && c.load() == 1;
  }
  CHECK_MSG(once, "n=" + std::to_string(n) + " threads=" + std::to_string(threads));
  CHECK(in_range.load());
  CHECK(alone.load());
}

}  // namespace

TEST(fail_joins_its_pieces) {
  CHECK_THROWS(fail("a ", 1, ' ', std::string("b"), ' ', 1.5F, ' ', true), Error, "a 1 b 1.5 true");
  CHECK_THROWS(fail<InvalidArgument>("u8 ", std::uint8_t{200}, " s8 ", std::int8_t{-3}),
               InvalidArgument, "u8 200 s8 -3");
  CHECK_THROWS(fail<CorruptData>("size ", ~std::uint64_t{0}), CorruptData, "18446744073709551615");
}

TEST(scalar_is_always_supported) {
  CHECK(isa_supported(Isa::Scalar));
  CHECK_EQ(supported_isas().front(), Isa::Scalar);
  CHECK_EQ(supported_isas().back(), best_isa());
  std::printf("  machine: %s; build and machine:", describe_cpu_features().c_str());
  for (const Isa isa : supported_isas()) {
    std::printf(" %s", std::string(isa_name(isa)).c_str());
  }
  std::printf("\n");
}

TEST(cpu_features_imply_each_other) {
  const CpuFeatures& f = cpu_features();
  CHECK(!f.avx512 || f.avx2);
  CHECK(!f.avx512vnni || f.avx512);
  CHECK(!f.gfni || f.avx2);
  CHECK(!f.avx512vbmi2 || f.avx2);
  CHECK(!f.avxvnni || f.avx2);
  CHECK(!f.i8mm || f.dotprod);
  CHECK(!f.dotprod || f.neon);
  CHECK(!f.neon || !f.avx2);
#if defined(__aarch64__) && defined(__linux__)
  CHECK(f.neon);
  CHECK(cpu_brand().empty() || cpu_brand().starts_with("arm "));
#endif
#if defined(__x86_64__) && defined(__GNUC__)
  // The compiler's run-time support is a second opinion on CPUID and operating-system state.
  __builtin_cpu_init();
  CHECK_EQ(f.avx2,
           static_cast<bool>(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
  CHECK_EQ(f.avx512, static_cast<bool>(__builtin_cpu_supports("avx512bw") &&
                                       __builtin_cpu_supports("avx512vl") &&
                                       __builtin_cpu_supports("avx512dq")));
  CHECK_EQ(f.avx512vnni, f.avx512 && __builtin_cpu_supports("avx512vnni"));
#endif
}

/// The kinds of cores, in any order of the cores themselves, of which some sleep.
TEST(arm_cores_of_a_phone) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::temp_directory_path() / ("arm_cores-" + std::to_string(getpid()));
  const auto core = [&](int number, const char* midr) {
    const fs::path at = folder / ("cpu" + std::to_string(number)) / "regs" / "identification";
    fs::create_directories(midr == nullptr ? at.parent_path().parent_path() : at);
    if (midr != nullptr) std::ofstream(at / "midr_el1") << midr << '\n';
  };
  CHECK_EQ(arm_cores(folder), "");
  core(0, nullptr);
  CHECK_EQ(arm_cores(folder), "");
  core(1, "0x00000000414fd0b1");
  CHECK_EQ(arm_cores(folder), "arm 41:d0b r4p1");
  core(2, "0x00000000411fd050");
  core(3, "0x00000000414fd0b1");
  core(5, "0x00000000410fd034");  // behind a gap, in which there is no core
  CHECK_EQ(arm_cores(folder), "arm 41:d05 r1p0 41:d0b r4p1");
  fs::remove_all(folder);
}

TEST(forcing_by_name) {
  const ForcedEnvironment clean(nullptr);
  CHECK_EQ(active_isa(), best_isa());
  for (const Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    CHECK_EQ(active_isa(), isa);
  }
  force_isa("scalar");
  // An unknown name is an error that lists the valid ones, and changes nothing.
  CHECK_THROWS(force_isa("avx1024"), InvalidArgument,
               "valid: auto, scalar, avx2, avxvnni, avx512, avx512vnni, amx, neon, dotprod, i8mm");
  CHECK_THROWS(force_isa("avx1024"), InvalidArgument, "'avx1024'");
  CHECK_THROWS(force_isa("AVX2"), InvalidArgument, "unknown");
  CHECK_THROWS(force_isa("avx2 "), InvalidArgument, "unknown");
  CHECK_EQ(active_isa(), Isa::Scalar);
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_supported(isa)) CHECK_THROWS(force_isa(isa_name(isa)), Error, "supported: scalar");
  }
  force_isa("auto");
  CHECK_EQ(active_isa(), best_isa());
}

TEST(forcing_by_environment) {
  {
    const ForcedEnvironment forced("scalar");
    CHECK_EQ(active_isa(), Isa::Scalar);
  }
  {
    const ForcedEnvironment forced("");
    CHECK_EQ(active_isa(), best_isa());
  }
  {
    const ForcedEnvironment forced("sse9");
    CHECK_THROWS(active_isa(), InvalidArgument, "ADALAYER_FORCE_ISA: unknown instruction set");
    // Not only the first time.
    CHECK_THROWS(active_isa(), InvalidArgument, "'sse9'");
    // A name given in the program is stronger than the environment.
    force_isa("scalar");
    CHECK_EQ(active_isa(), Isa::Scalar);
  }
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    const std::string name(isa_name(isa));
    const ForcedEnvironment forced(name.c_str());
    if (isa_supported(isa)) {
      CHECK_EQ(active_isa(), isa);
    } else {
      CHECK_THROWS(active_isa(), Error, name);
    }
  }
}

TEST(buffer_alignment_and_growth) {
  for (const std::size_t size : {std::size_t{1}, std::size_t{63}, std::size_t{64}, std::size_t{65},
                                 std::size_t{100000}, kHugePage - 1, kHugePage, kHugePage + 1}) {
    AlignedBuffer buffer(size);
    CHECK_EQ(buffer.size(), size);
    const std::size_t alignment = size >= kHugePage ? kHugePage : kBufferAlignment;
    CHECK_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % alignment, std::uintptr_t{0});
    std::memset(buffer.data(), 0xab, size);  // the sanitizer checks that it is all ours
    CHECK_EQ(buffer.data()[size - 1], std::uint8_t{0xab});
  }
  AlignedBuffer buffer;
  CHECK(buffer.empty());
  CHECK(buffer.data() == nullptr);
  buffer.clear();
  buffer.resize(10);
  std::iota(buffer.data(), buffer.data() + 10, std::uint8_t{1});
  buffer.resize(3 * kHugePage);
  CHECK_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % kHugePage, std::uintptr_t{0});
  for (int i = 0; i < 10; ++i) {
    CHECK_EQ(buffer.data()[i], i + 1);
  }
  const std::uint8_t* const where = buffer.data();
  buffer.resize(5);
  buffer.reset(kHugePage);
  CHECK_EQ(buffer.size(), kHugePage);
  CHECK(buffer.data() == where);
  buffer.clear();
  CHECK_EQ(buffer.as<std::int32_t>()[7], 0);

  AlignedBuffer moved(std::move(buffer));
  CHECK(moved.data() == where);
  CHECK_EQ(moved.size(), kHugePage);
  AlignedBuffer other(7);
  other = std::move(moved);
  CHECK(other.data() == where);
}

TEST(buffer_failure_names_the_size) {
  CHECK_THROWS(AlignedBuffer(~std::size_t{0}), Error, "18446744073709551615 bytes");
  AlignedBuffer buffer(8);
  buffer.data()[7] = 42;
  CHECK_THROWS(buffer.resize(~std::size_t{0} / 2), Error, "9223372036854775807 bytes");
  CHECK_EQ(buffer.size(), std::size_t{8});
  CHECK_EQ(buffer.data()[7], std::uint8_t{42});
}

TEST(pool_runs_every_task_once) {
  for (const int threads : {1, 2, 3, 8}) {
    for (const std::int64_t n : {0, 1, 2, 3, 7, 8, 9, 64, 1000}) {
      check_each_once(n, threads);
    }
  }
  int ran = 0;
  parallel_for(-5, 4, [&](std::int64_t, int) { ++ran; });
  CHECK_EQ(ran, 0);
  check_each_once(3000, kMaxThreads / 8);
}

TEST(pool_results_are_visible_to_the_caller) {
  // Plain memory, written by workers, read by the caller: the join orders it.
  std::vector<std::int64_t> out(777);
  for (int round = 0; round < 200; ++round) {
    parallel_for(777, 4, [&](std::int64_t task, int) {
      out[static_cast<std::size_t>(task)] = task * round;
    });
    std::int64_t sum = 0;
    for (const std::int64_t value : out) {
      sum += value;
    }
    CHECK_EQ(sum, std::int64_t{776} * 777 / 2 * round);
  }
}

TEST(pool_workers_do_take_part) {
  // Two tasks that wait for each other: possible only on two threads. The pool never promises
  // them, so try repeatedly, with a limit on every wait.
  bool together = false;
  for (int attempt = 0; attempt < 50 && !together; ++attempt) {
    std::atomic<int> arrived{0};
    std::atomic<int> met{0};
    parallel_for(2, 2, [&](std::int64_t, int) {
      arrived.fetch_add(1);
      const auto limit = std::chrono::steady_clock::now() + std::chrono::milliseconds(200);
      while (arrived.load() < 2 && std::chrono::steady_clock::now() < limit) {
        std::this_thread::yield();
      }
      if (arrived.load() == 2) met.fetch_add(1);
    });
    together = met.load() == 2;
  }
  CHECK(together);
}

TEST(pool_100k_tiny_jobs) {
  std::int64_t total = 0;
  for (int job = 0; job < 100000; ++job) {
    std::atomic<std::int64_t> sum{0};
    parallel_for(
        3, 3, [&](std::int64_t task, int) { sum.fetch_add(task + 1, std::memory_order_relaxed); });
    total += sum.load();
  }
  CHECK_EQ(total, std::int64_t{600000});
}

TEST(pool_wakes_sleeping_workers) {
  for (int round = 0; round < 20; ++round) {
    // Longer than the spin window: the workers are asleep in the kernel.
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    check_each_once(50, 4);
  }
}

TEST(pool_changing_thread_counts) {
  for (int round = 0; round < 3000; ++round) {
    const int threads = 1 + round % 5;
    std::atomic<int> sum{0};
    std::atomic<int> highest{0};
    parallel_for(6, threads, [&](std::int64_t, int worker) {
      sum.fetch_add(1);
      int seen = highest.load();
      while (worker > seen && !highest.compare_exchange_weak(seen, worker)) {
      }
    });
    CHECK_EQ(sum.load(), 6);
    CHECK(highest.load() < threads);
  }
}

TEST(pool_nested_calls_run_in_the_caller) {
  std::atomic<int> inner{0};
  std::atomic<bool> same_thread{true};
  parallel_for(8, 4, [&](std::int64_t, int) {
    const auto outer_thread = std::this_thread::get_id();
    parallel_for(5, 4, [&](std::int64_t, int worker) {
      if (worker != 0 || std::this_thread::get_id() != outer_thread) same_thread = false;
      parallel_for(2, 2, [&](std::int64_t, int) { inner.fetch_add(1); });
    });
  });
  CHECK_EQ(inner.load(), 80);
  CHECK(same_thread.load());
}

TEST(pool_concurrent_callers) {
  std::atomic<std::int64_t> total{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int job = 0; job < 2000; ++job) {
        std::int64_t slots[5] = {};
        parallel_for(5, 3, [&](std::int64_t task, int) { slots[task] = task + 1; });
        total.fetch_add(slots[0] + slots[1] + slots[2] + slots[3] + slots[4]);
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
  CHECK_EQ(total.load(), std::int64_t{4} * 2000 * 15);
}

TEST(pool_exceptions_reach_the_caller) {
  for (const int threads : {1, 4}) {
    for (int round = 0; round < 300; ++round) {
      std::atomic<int> ran{0};
      CHECK_THROWS(parallel_for(100, threads,
                                [&](std::int64_t task, int) {
                                  ran.fetch_add(1);
                                  if (task == 3) fail<InvalidArgument>("task ", task);
                                }),
                   InvalidArgument, "task 3");
      CHECK(ran.load() >= 1 && ran.load() <= 100);
    }
    // All tasks throw; one exception arrives.
    CHECK_THROWS(
        parallel_for(50, threads, [](std::int64_t, int) { throw std::runtime_error("boom"); }),
        std::runtime_error, "boom");
    check_each_once(100, threads);  // and the pool works on
  }
}

TEST(pool_survives_fork) {
  check_each_once(100, 3);  // the parent has workers
  std::atomic<bool> stop{false};
  // Jobs are running in the parent while it forks: the child must not inherit a busy pool.
  std::thread background([&] {
    while (!stop) {
      parallel_for(16, 3, [](std::int64_t, int) {});
    }
  });
  for (int round = 0; round < 5; ++round) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
#if defined(__SANITIZE_THREAD__)
      // The thread sanitizer cannot start threads in a child of a multi-threaded process.
      constexpr int kThreads = 1;
#else
      constexpr int kThreads = 3;
#endif
      // Waits for a worker's share: if the pool were still busy, the caller would do it all.
      std::atomic<int> sum{0};
      std::atomic<bool> helped{false};
      for (int job = 0; job < 2000 && !helped; ++job) {
        if (kThreads == 1) helped = true;
        parallel_for(3, kThreads, [&](std::int64_t, int worker) {
          sum.fetch_add(1);
          if (worker != 0) helped = true;
          if (worker == 0 && !helped) usleep(100);
        });
      }
      _exit(helped && sum.load() % 3 == 0 ? 0 : 1);
    }
    CHECK(child > 0);
    int status = -1;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  stop = true;
  background.join();
  check_each_once(100, 3);  // the parent goes on
}

TEST(default_thread_count) {
  const int before = default_threads();
  CHECK(before >= 1);
  set_default_threads(3);
  CHECK_EQ(default_threads(), 3);
  std::atomic<int> highest{0};
  parallel_for(100, 0, [&](std::int64_t, int worker) {
    int seen = highest.load();
    while (worker > seen && !highest.compare_exchange_weak(seen, worker)) {
    }
  });
  CHECK(highest.load() < 3);
  CHECK_THROWS(set_default_threads(0), InvalidArgument, "at least 1, got 0");
  CHECK_THROWS(set_default_threads(-2), InvalidArgument, "got -2");
  CHECK_EQ(default_threads(), 3);
  set_default_threads(before);
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

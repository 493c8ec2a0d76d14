// The host's OpenMP team. In a process of its own: the library looks for a team once.
#include <dlfcn.h>

#include <chrono>
#include <thread>

#include "check.hpp"
#include "core/host_openmp.hpp"

using namespace adalayer;
using namespace std::chrono_literals;

TEST(a_team_without_its_core_is_left_alone) {
  if (dlopen("libgomp.so.1", RTLD_NOW) == nullptr) {
    CHECK(run_on_host_team(2, [] {}) == HostTeam::Absent);
    return;
  }
  const auto loop = [](std::chrono::milliseconds late) {
    const auto caller = std::this_thread::get_id();
    return run_on_host_team(2, [&] {
      if (std::this_thread::get_id() != caller) std::this_thread::sleep_for(late);
    });
  };
  // Other processes may hold the cores during the test, too: what must happen at some time.
  const auto comes = [&](HostTeam wanted, std::chrono::milliseconds late) {
    for (int i = 0; i < 300; ++i) {
      if (loop(late) == wanted) return true;
      std::this_thread::sleep_for(10ms);
    }
    return false;
  };
  CHECK(comes(HostTeam::Done, 0ms));
  CHECK(comes(HostTeam::Done, 20ms));
  CHECK(loop(0ms) == HostTeam::Absent);
  CHECK(comes(HostTeam::Done, 0ms));
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

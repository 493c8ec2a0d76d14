#include "core/arm_cores.hpp"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>

namespace adalayer {

std::string arm_core(std::uint64_t midr) {
  char text[32];
  std::snprintf(text, sizeof text, "%02x:%03x r%up%u", static_cast<unsigned>(midr >> 24 & 0xFF),
                static_cast<unsigned>(midr >> 4 & 0xFFF), static_cast<unsigned>(midr >> 20 & 0xF),
                static_cast<unsigned>(midr & 0xF));
  return text;
}

std::string arm_cores(const std::string& folder) {
  constexpr int kMostCores = 4096;
  std::set<std::uint64_t> kinds;
  for (int core = 0; core < kMostCores; ++core) {
    const std::string at = folder + "/cpu" + std::to_string(core);
    std::ifstream file(at + "/regs/identification/midr_el1");
    std::uint64_t midr = 0;
    if (file >> std::hex >> midr)
      kinds.insert(midr);
    else if (!std::filesystem::is_directory(at))  // one that sleeps has a folder
      break;
  }
  std::string names = kinds.empty() ? "" : "arm";
  for (const std::uint64_t midr : kinds)
    names += ' ' + arm_core(midr);
  return names;
}

}  // namespace adalayer

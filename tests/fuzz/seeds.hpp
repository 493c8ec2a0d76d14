// The programs that the fuzzer begins with, and that other architectures have to read.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "engine_programs.hpp"

namespace programs {

/// With the texts that the Python package writes.
inline Program described() {
  Program p = small_program();
  p.metadata["adalayer.inputs"] = R"([["x", [2]]])";
  p.metadata["adalayer.order"] = "[0]";
  p.metadata["adalayer.outputs"] = "[[0, [2], [[2, 1]]]]";
  p.metadata["adalayer.leaves"] = R"([{"tensor": 0}])";
  p.metadata["adalayer.structure"] = R"({"dict": {"scores": 0}})";
  p.metadata["preprocessing"] = R"({"mean": [0.5, 0.25], "std": [0.2, 0.3]})";
  return p;
}

/// Names, and what is in them.
inline std::vector<std::pair<std::string, Program>> seeds() {
  std::vector<std::pair<std::string, Program>> all;
  all.emplace_back("small", small_program());
  all.emplace_back("every_operation", every_operation());
  all.emplace_back("tokens", token_program());
  all.emplace_back("floats", float_program());
  all.emplace_back("recurrent", recurrent_program());
  all.emplace_back("reduced", reduced_program());
  all.emplace_back("groups", grouped_program());
  all.emplace_back("convolutions", convolutions());
  all.emplace_back("described", described());
  all.emplace_back("sizes", ranged());
  all.emplace_back("levels", leveled());
  return all;
}

}  // namespace programs

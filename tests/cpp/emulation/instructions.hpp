// Every instruction that immintrin.h emulates, as a function of 256 bytes. instructions.cpp is
// compiled twice, against that header and for the processor.
#pragma once

#include <cstdint>

namespace emulation_test {

enum class Needs { Avx512, Vnni, Vbmi, Vbmi2, Gfni, AvxVnni };

struct Instruction {
  const char* name;
  Needs needs;
  /// From 256 aligned bytes, of which the last vector is a mask and indices are made of the others,
  /// to 64 aligned bytes, which hold something already.
  void (*run)(const uint8_t* in, uint8_t* out);
};
struct Instructions {
  const Instruction* begin;
  int count;
};

Instructions emulated_instructions();
Instructions native_instructions();

}  // namespace emulation_test

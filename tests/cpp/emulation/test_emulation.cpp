// The emulated instructions beside the processor's, as far as it has them.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "instructions.hpp"

using namespace adalayer;
using namespace emulation_test;

namespace {

bool on_machine(Needs needs) {
  const CpuFeatures& f = cpu_features();
  switch (needs) {
    case Needs::Avx512:
      return f.avx512;
    case Needs::Vnni:
      return f.avx512vnni;
    case Needs::Vbmi:
      return f.avx512vbmi;
    case Needs::Vbmi2:
      return f.avx512vbmi2;
    case Needs::Gfni:
      return f.gfni;
    case Needs::AvxVnni:
      return f.avxvnni;
  }
  return false;
}

/// Which NaN a sum of two has is for compilers to say, who exchange operands.
bool same(const uint8_t* a, const uint8_t* b, bool floats) {
  if (!floats) return std::memcmp(a, b, 64) == 0;
  float x[16], y[16];
  std::memcpy(x, a, sizeof x);
  std::memcpy(y, b, sizeof y);
  for (int i = 0; i < 16; ++i)
    if (std::memcmp(x + i, y + i, 4) != 0 && !(std::isnan(x[i]) && std::isnan(y[i]))) return false;
  return true;
}

struct alignas(64) Memory {
  uint8_t in[256], emulated[64], native[64];
};

}  // namespace

TEST(every_instruction) {
  const Instructions emulated = emulated_instructions(), native = native_instructions();
  CHECK_EQ(emulated.count, native.count);
  std::mt19937 random(7);
  for (int i = 0; i < emulated.count; ++i) {
    const Instruction& ours = emulated.begin[i];
    CHECK_EQ(std::strcmp(ours.name, native.begin[i].name), 0);
    if (!on_machine(ours.needs)) continue;
    const bool floats =
        std::strstr(ours.name, "_ps") != nullptr || std::strstr(ours.name, "_pd") != nullptr;
    int wrong = 0;
    for (int round = 0; round < 500; ++round) {
      Memory m;
      for (uint8_t& byte : m.in)
        byte = static_cast<uint8_t>(random());
      // Extremes of bytes and words, and floats of ordinary size, are rare among random bits.
      if (round % 4 == 1)
        for (uint8_t& byte : m.in)
          byte = static_cast<uint8_t>((byte & 1) != 0 ? (byte & 2) != 0 ? 127 : 128 : byte & 255);
      if (round % 4 == 2)
        for (int k = 0; k < 48; ++k) {
          const float v = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 8;
          std::memcpy(m.in + 4 * k, &v, sizeof v);
        }
      std::memset(m.emulated, round, sizeof m.emulated);
      std::memset(m.native, round, sizeof m.native);
      ours.run(m.in, m.emulated);
      native.begin[i].run(m.in, m.native);
      wrong += !same(m.emulated, m.native, floats);
    }
    CHECK_MSG(wrong == 0, ours.name);
  }
}

int main(int argc, char** argv) {
  if (!cpu_features().avx512) {
    std::printf("skipped: there is no AVX-512 to compare with\n");
    return 77;
  }
  return check::run_all(argc, argv);
}

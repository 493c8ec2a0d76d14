// One instruction that only some processors have: sdot, or usmmla with an argument. Whether a
// machine, or an emulator that plays one, refuses it, is what tests of other programs there are
// worth.
#include <arm_neon.h>

#include <cstdio>
#include <cstring>

int main(int argc, char** argv) {
  volatile int8_t byte = 3;
  const int8x16_t v = vdupq_n_s8(byte);
  int32x4_t sum = vdupq_n_s32(1);
  const bool matrix = argc > 1 && std::strcmp(argv[1], "usmmla") == 0;
  if (matrix)
    sum = vusmmlaq_s32(sum, vreinterpretq_u8_s8(v), v);
  else
    sum = vdotq_s32(sum, v, v);
  const int expected = 1 + (matrix ? 8 : 4) * 9;
  std::printf("%d\n", vgetq_lane_s32(sum, 3));
  return vgetq_lane_s32(sum, 3) == expected ? 0 : 1;
}

// What a thread does between two looks at a word that another one will write.
#pragma once

namespace adalayer {

/// Leaves the core to its other hardware thread, where it has one, and saves power.
inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace adalayer

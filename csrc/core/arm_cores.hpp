// Names of ARM's processors, which have numbers.
#pragma once

#include <cstdint>
#include <string>

namespace adalayer {

/// "41:d0b r4p1": implementer, part, variant and revision of MIDR_EL1.
std::string arm_core(std::uint64_t midr);

/// "arm 41:d05 r1p0 41:d0b r4p1": every kind of core that a machine has, whichever the caller is
/// on, where a phone has small ones and large ones. "" where the kernel does not say. `folder` has
/// its cpu0, cpu1, ...
std::string arm_cores(const std::string& folder = "/sys/devices/system/cpu");

}  // namespace adalayer

# Writes a header with a digest of the kernels' sources: cmake -DROOT=csrc -DOUT=header -P this.
file(GLOB_RECURSE sources "${ROOT}/cpu/*.cpp" "${ROOT}/cpu/*.hpp" "${ROOT}/cpu/*.inl")
list(SORT sources)
set(digests "")
foreach(source IN LISTS sources)
  file(SHA256 "${source}" digest)
  string(APPEND digests "${digest}")
endforeach()
string(SHA256 digest "${digests}")
string(SUBSTRING "${digest}" 0 16 digest)
file(WRITE "${OUT}" "#pragma once
#include <cstdint>
namespace adalayer::engine {
inline constexpr std::uint64_t kKernelsDigest = 0x${digest};
}
")

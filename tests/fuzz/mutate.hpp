// Changes .ada files so that many of them get far: behind the checksums, and behind validate().
#pragma once

#include <cstddef>
#include <cstdint>

/// The bytes of a buffer changed at random, given by the fuzzer; returns the new size.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace fuzz {

/// Changes the file in place and returns its new size. The same seed makes the same change.
size_t mutate_file(uint8_t* data, size_t size, size_t max_size, unsigned seed);

}  // namespace fuzz

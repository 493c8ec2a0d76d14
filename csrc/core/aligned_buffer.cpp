#include "core/aligned_buffer.hpp"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#include "core/status.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace adalayer {
namespace {

struct Allocation {
  std::uint8_t* data;
  std::size_t capacity;
};

Allocation allocate(std::size_t bytes) {
  if (bytes == 0) return {nullptr, 0};
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : kBufferAlignment;
  // Beyond PTRDIFF_MAX, pointer differences overflow (and so would the rounding below).
  if (bytes > static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max()) - alignment) {
    fail<OutOfMemory>("cannot allocate ", bytes, " bytes: more than the address space");
  }
  const std::size_t capacity = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, capacity);
  if (memory == nullptr) fail<OutOfMemory>("cannot allocate ", bytes, " bytes: out of memory");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Advice only: without huge pages the buffer works the same, so the result is ignored.
  if (alignment == kHugePage) (void)madvise(memory, capacity, MADV_HUGEPAGE);
#endif
  return {static_cast<std::uint8_t*>(memory), capacity};
}

}  // namespace

AlignedBuffer::AlignedBuffer(std::size_t bytes) {
  const Allocation allocation = allocate(bytes);
  data_ = allocation.data;
  capacity_ = allocation.capacity;
  size_ = bytes;
}

AlignedBuffer::~AlignedBuffer() { std::free(data_); }

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      capacity_(std::exchange(other.capacity_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  if (this != &other) {
    std::free(data_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    capacity_ = std::exchange(other.capacity_, 0);
  }
  return *this;
}

void AlignedBuffer::resize(std::size_t bytes) {
  if (bytes > capacity_) {
    const Allocation grown = allocate(bytes);
    if (size_ > 0) std::memcpy(grown.data, data_, size_);
    std::free(data_);
    data_ = grown.data;
    capacity_ = grown.capacity;
  }
  size_ = bytes;
}

void AlignedBuffer::reset(std::size_t bytes) {
  if (bytes > capacity_) {
    const Allocation grown = allocate(bytes);
    std::free(data_);
    data_ = grown.data;
    capacity_ = grown.capacity;
  }
  size_ = bytes;
}

void AlignedBuffer::clear() noexcept {
  if (size_ > 0) std::memset(data_, 0, size_);
}

}  // namespace adalayer

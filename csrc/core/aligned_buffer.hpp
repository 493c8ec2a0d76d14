// Memory for packed weights and workspaces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adalayer {

// One cache line, and the widest vector register (512 bits).
inline constexpr std::size_t kBufferAlignment = 64;
// The x86-64 huge page. Buffers of at least this size start on such a boundary and ask for huge
// pages: panels of a few MiB then take a handful of TLB entries instead of thousands.
inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

// A move-only byte buffer, 64-byte aligned (2 MiB aligned from 2 MiB on). New bytes are
// uninitialised. size() is what was asked for; the allocation is rounded up to the alignment,
// so that a full vector may be read (never written) at the last valid address rounded down.
// Throws Error naming the size when memory cannot be had.
class AlignedBuffer {
 public:
  AlignedBuffer() noexcept = default;
  explicit AlignedBuffer(std::size_t bytes);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  // Makes size() == bytes and keeps the contents up to the smaller of both sizes.
  // Never shrinks the allocation. On failure the buffer is unchanged.
  void resize(std::size_t bytes);

  // Makes size() == bytes; the contents are lost when the buffer has to grow. For workspaces.
  void reset(std::size_t bytes);

  // Sets every byte to zero.
  void clear() noexcept;

  std::uint8_t* data() noexcept { return data_; }
  const std::uint8_t* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  std::size_t capacity() const noexcept { return capacity_; }
  bool empty() const noexcept { return size_ == 0; }

  template <typename T>
  T* as() noexcept {
    return reinterpret_cast<T*>(data_);
  }
  template <typename T>
  const T* as() const noexcept {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

/// Room for `count` elements in a buffer of one thread, which grows to the largest layer and stays,
/// so that a warm call allocates nothing. Its contents are lost when it grows.
template <typename T>
T* grown(AlignedBuffer& buffer, std::int64_t count) {
  const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
  if (buffer.size() < bytes) buffer.reset(bytes);
  return buffer.as<T>();
}

}  // namespace adalayer

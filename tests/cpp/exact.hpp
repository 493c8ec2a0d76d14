// Memory that notices stray reads and writes.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "core/status.hpp"

namespace adalayer {

/// Memory of exactly `count` elements with an unreadable page behind it (or, for every second
/// buffer, in front of it): vector instructions, which the sanitizers do not see, fault there too.
template <class T>
class Exact {
 public:
  explicit Exact(size_t count) : count_(count), page_(static_cast<size_t>(getpagesize())) {
    const size_t bytes = count * sizeof(T);
    span_ = (bytes + page_ - 1) / page_ * page_ + 2 * page_;
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, span_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw Error("mmap failed");
    mprotect(base_, page_, PROT_NONE);
    mprotect(base_ + span_ - page_, page_, PROT_NONE);
    thread_local bool at_front = false;
    at_front = !at_front;
    data_ = reinterpret_cast<T*>(at_front ? base_ + page_ : base_ + span_ - page_ - bytes);
  }
  template <class Range>
  static Exact of(const Range& values) {
    Exact copy(values.size());
    std::copy(values.begin(), values.end(), copy.data());
    return copy;
  }
  Exact(Exact&& other) noexcept
      : count_(other.count_),
        page_(other.page_),
        span_(other.span_),
        base_(std::exchange(other.base_, nullptr)),
        data_(other.data_) {}
  Exact& operator=(Exact&&) = delete;
  ~Exact() {
    if (base_ != nullptr) munmap(base_, span_);
  }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  size_t count_, page_, span_ = 0;
  uint8_t* base_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace adalayer

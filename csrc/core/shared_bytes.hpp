// Bytes that copies share until one of them is written to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

namespace adalayer {

/// As a std::vector<uint8_t>, but a copy costs nothing: programs of one network for several image
/// sizes hold the same weights. Whoever may write (a member function that is not const) gets bytes
/// of its own first, unless nobody else has these.
class SharedBytes {
 public:
  SharedBytes() : held_(std::make_shared<std::vector<uint8_t>>()) {}
  SharedBytes(std::vector<uint8_t> bytes)  // NOLINT: as good as the vector
      : held_(std::make_shared<std::vector<uint8_t>>(std::move(bytes))) {}
  SharedBytes(std::initializer_list<uint8_t> bytes) : SharedBytes(std::vector<uint8_t>(bytes)) {}
  template <class Iterator>
  SharedBytes(Iterator first, Iterator last) : SharedBytes(std::vector<uint8_t>(first, last)) {}

  operator const std::vector<uint8_t>&() const { return *held_; }  // NOLINT
  operator std::vector<uint8_t>&() { return own(); }               // NOLINT

  size_t size() const { return held_->size(); }
  bool empty() const { return held_->empty(); }
  const uint8_t* data() const { return held_->data(); }
  auto begin() const { return std::as_const(*held_).begin(); }
  auto end() const { return std::as_const(*held_).end(); }
  uint8_t operator[](size_t k) const { return std::as_const(*held_)[k]; }

  uint8_t* data() { return own().data(); }
  uint8_t& operator[](size_t k) { return own()[k]; }
  void resize(size_t size) { own().resize(size); }
  void pop_back() { own().pop_back(); }

  /// Whether both are one and the same memory.
  bool is(const SharedBytes& other) const { return held_ == other.held_; }
  bool operator==(const SharedBytes& other) const { return is(other) || *held_ == *other.held_; }

 private:
  std::vector<uint8_t>& own() {
    if (held_.use_count() > 1) held_ = std::make_shared<std::vector<uint8_t>>(*held_);
    return *held_;
  }

  std::shared_ptr<std::vector<uint8_t>> held_;
};

}  // namespace adalayer

// Errors of the C++ side. Every failure is an exception with a full sentence; nothing aborts.
//
// Files compiled with instruction-set flags must not call fail(): they hold kernels only, and
// arguments are checked before a kernel is called. (An inline function instantiated there could
// be the copy that the linker keeps for every machine.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace adalayer {

// Base of all errors: something the library cannot do (out of memory, unsupported machine).
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller passed something wrong: shape, range, name. Python sees ValueError.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// Stored data is damaged or of another format: bad magic, version, size or checksum.
class CorruptData : public Error {
 public:
  using Error::Error;
};

// The operating system has no memory left. Python sees RuntimeError.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

// What was asked for would take more memory than the caller allows. Python sees MemoryError.
class LimitExceeded : public Error {
 public:
  using Error::Error;
};

namespace detail {

void append_piece(std::string& out, std::string_view text);
void append_piece(std::string& out, char c);
void append_piece(std::string& out, bool value);
void append_signed(std::string& out, long long value);
void append_unsigned(std::string& out, unsigned long long value);
void append_double(std::string& out, double value);

template <typename T>
void append_any(std::string& out, const T& value) {
  if constexpr (std::is_convertible_v<const T&, std::string_view>) {
    append_piece(out, std::string_view(value));
  } else if constexpr (std::is_same_v<T, char> || std::is_same_v<T, bool>) {
    append_piece(out, value);
  } else if constexpr (std::is_floating_point_v<T>) {
    append_double(out, static_cast<double>(value));
  } else if constexpr (std::is_signed_v<T>) {
    append_signed(out, value);
  } else {
    static_assert(std::is_unsigned_v<T>, "fail(): pieces are text, numbers, char or bool");
    append_unsigned(out, value);
  }
}

}  // namespace detail

// Throws E with the pieces (text and numbers; uint8_t prints as a number) joined together:
//   fail<InvalidArgument>("conv2d: expected ", c, " input channels, got ", got);
template <typename E = Error, typename... Pieces>
[[noreturn]] void fail(const Pieces&... pieces) {
  static_assert(std::is_base_of_v<Error, E>);
  std::string message;
  (detail::append_any(message, pieces), ...);
  throw E(message);
}

}  // namespace adalayer

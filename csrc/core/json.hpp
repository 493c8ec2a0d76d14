// Reads JSON texts (RFC 8259) from model files, which may be hostile: depth, number of values and
// numbers are bounded, and nothing recurses deeper than kMaxJsonDepth.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace adalayer {

constexpr int kMaxJsonDepth = 64;
constexpr size_t kMaxJsonValues = size_t{1} << 18;

struct Json {
  enum class Kind : uint8_t { Null, Bool, Number, Text, List, Object };
  Kind kind = Kind::Null;
  bool truth = false;
  double number = 0.0;
  std::string text;
  std::vector<Json> items;         // of a list, and the values of an object
  std::vector<std::string> names;  // of an object, one per item; the last of equal ones counts

  /// A member of an object, or null if there is none or this is no object.
  const Json* find(std::string_view name) const;
  // Each throws CorruptData, naming `what`, if this is something else.
  const std::string& as_text(const char* what) const;
  const std::vector<Json>& as_list(const char* what) const;
  /// A whole number of at least 0 and at most `limit`, which is at most 2^53.
  int64_t as_index(const char* what, int64_t limit) const;
  /// A finite number that float32 holds.
  float as_float(const char* what) const;
};

/// Throws CorruptData saying what is wrong and at which byte.
Json parse_json(std::string_view text);

}  // namespace adalayer

#include "core/status.hpp"

#include <cstdio>

namespace adalayer::detail {

void append_piece(std::string& out, std::string_view text) { out.append(text); }

void append_piece(std::string& out, char c) { out.push_back(c); }

void append_piece(std::string& out, bool value) { out.append(value ? "true" : "false"); }

void append_signed(std::string& out, long long value) { out.append(std::to_string(value)); }

void append_unsigned(std::string& out, unsigned long long value) {
  out.append(std::to_string(value));
}

void append_double(std::string& out, double value) {
  // 9 significant digits identify every float32, the type of all scales here.
  char text[40];
  std::snprintf(text, sizeof(text), "%.9g", value);
  out.append(text);
}

}  // namespace adalayer::detail

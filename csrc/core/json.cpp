#include "core/json.hpp"

#include <charconv>
#include <cmath>

#include "core/status.hpp"

namespace adalayer {
namespace {

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json whole() {
    Json value = parse(0);
    skip_space();
    if (at_ != text_.size()) bad("expected the end of the text");
    return value;
  }

 private:
  template <typename... Pieces>
  [[noreturn]] void bad(const Pieces&... pieces) const {
    fail<CorruptData>("JSON, byte ", at_, ": ", pieces...);
  }

  bool more() const { return at_ < text_.size(); }
  char peek() const { return more() ? text_[at_] : '\0'; }
  void skip_space() {
    while (more() && std::string_view(" \t\n\r").find(text_[at_]) != std::string_view::npos)
      ++at_;
  }
  bool accept(char c) {
    skip_space();
    if (!more() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) bad("expected '", c, "'");
  }
  void word(std::string_view w) {
    if (text_.substr(at_, w.size()) != w) bad("expected a value");
    at_ += w.size();
  }

  Json parse(int depth) {
    if (depth > kMaxJsonDepth) bad("nested more than ", kMaxJsonDepth, " deep");
    if (++values_ > kMaxJsonValues) bad("more than ", kMaxJsonValues, " values");
    skip_space();
    Json v;
    switch (peek()) {
      case '{':
        object(v, depth);
        break;
      case '[':
        list(v, depth);
        break;
      case '"':
        v.kind = Json::Kind::Text;
        v.text = string();
        break;
      case 't':
        word("true");
        v.kind = Json::Kind::Bool;
        v.truth = true;
        break;
      case 'f':
        word("false");
        v.kind = Json::Kind::Bool;
        break;
      case 'n':
        word("null");
        break;
      default:
        number(v);
    }
    return v;
  }

  void list(Json& v, int depth) {
    v.kind = Json::Kind::List;
    expect('[');
    if (accept(']')) return;
    do {
      v.items.push_back(parse(depth + 1));
    } while (accept(','));
    expect(']');
  }

  void object(Json& v, int depth) {
    v.kind = Json::Kind::Object;
    expect('{');
    if (accept('}')) return;
    do {
      skip_space();
      v.names.push_back(string());
      expect(':');
      v.items.push_back(parse(depth + 1));
    } while (accept(','));
    expect('}');
  }

  void number(Json& v) {
    v.kind = Json::Kind::Number;
    // from_chars also knows inf, nan, and numbers that begin with a point.
    const size_t first = at_ + (peek() == '-' ? 1 : 0);
    if (first >= text_.size() || text_[first] < '0' || text_[first] > '9') bad("expected a value");
    const char* end = text_.data() + text_.size();
    const auto [stop, error] = std::from_chars(text_.data() + at_, end, v.number);
    // Too large is infinite, as Python reads it; whoever uses the number refuses that.
    if (error == std::errc::result_out_of_range)
      v.number = HUGE_VAL;
    else if (error != std::errc())
      bad("expected a number");
    at_ = static_cast<size_t>(stop - text_.data());
  }

  uint32_t hex4() {
    if (text_.size() - at_ < 4) bad("expected four hexadecimal digits");
    uint32_t code = 0;
    const char* begin = text_.data() + at_;
    const auto [stop, error] = std::from_chars(begin, begin + 4, code, 16);
    if (error != std::errc() || stop != begin + 4) bad("expected four hexadecimal digits");
    at_ += 4;
    return code;
  }

  void append_code(std::string& out, uint32_t code) {
    const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
    if (code < 0x80) {
      put(code);
    } else if (code < 0x800) {
      put(0xC0 | code >> 6);
      put(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      put(0xE0 | code >> 12);
      put(0x80 | (code >> 6 & 0x3F));
      put(0x80 | (code & 0x3F));
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3F));
      put(0x80 | (code >> 6 & 0x3F));
      put(0x80 | (code & 0x3F));
    }
  }

  void escape(std::string& out) {
    if (!more()) bad("the text ends inside a string");
    switch (const char c = text_[at_++]; c) {
      case '"':
      case '\\':
      case '/':
        out += c;
        return;
      case 'b':
        out += '\b';
        return;
      case 'f':
        out += '\f';
        return;
      case 'n':
        out += '\n';
        return;
      case 'r':
        out += '\r';
        return;
      case 't':
        out += '\t';
        return;
      case 'u':
        break;
      default:
        bad("unknown escape");
    }
    uint32_t code = hex4();
    if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const uint32_t low = hex4();
      if (low < 0xDC00 || low > 0xDFFF) bad("half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code >= 0xD800 && code < 0xE000) bad("half of a surrogate pair");
    append_code(out, code);
  }

  std::string string() {
    if (!accept('"')) bad("expected a string");
    std::string out;
    while (true) {
      if (!more()) bad("the text ends inside a string");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) bad("a control character inside a string");
      if (c == '\\')
        escape(out);
      else
        out += c;
    }
  }

  std::string_view text_;
  size_t at_ = 0;
  size_t values_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view name) const {
  for (size_t k = names.size(); k-- > 0;)
    if (names[k] == name) return &items[k];
  return nullptr;
}

const std::string& Json::as_text(const char* what) const {
  if (kind != Kind::Text) fail<CorruptData>(what, ": expected a text");
  return text;
}

const std::vector<Json>& Json::as_list(const char* what) const {
  if (kind != Kind::List) fail<CorruptData>(what, ": expected a list");
  return items;
}

int64_t Json::as_index(const char* what, int64_t limit) const {
  // Written so that a NaN fails.
  if (kind != Kind::Number || !(number >= 0.0 && number <= static_cast<double>(limit)) ||
      std::floor(number) != number)
    fail<CorruptData>(what, ": expected a whole number from 0 to ", limit);
  return static_cast<int64_t>(number);
}

float Json::as_float(const char* what) const {
  const auto value = static_cast<float>(kind == Kind::Number ? number : HUGE_VAL);
  if (!std::isfinite(value)) fail<CorruptData>(what, ": expected a finite number");
  return value;
}

Json parse_json(std::string_view text) { return Parser(text).whole(); }

}  // namespace adalayer

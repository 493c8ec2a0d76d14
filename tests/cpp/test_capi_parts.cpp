// The JSON reader of libadalayer, which reads texts of hostile files.
#include <string>

#include "check.hpp"
#include "core/json.hpp"
#include "core/status.hpp"

using namespace adalayer;

namespace {

bool refused(const std::string& text) {
  try {
    parse_json(text);
  } catch (const CorruptData&) {
    return true;
  }
  return false;
}

}  // namespace

TEST(values) {
  const Json v = parse_json(R"( {"a": [1, -2.5e1, true, false, null], "b": {}, "a2": "x"} )");
  CHECK(v.find("a") != nullptr && v.find("c") == nullptr);
  const auto& list = v.find("a")->as_list("a");
  CHECK_EQ(list.size(), size_t{5});
  CHECK_EQ(list[0].as_index("a", 1), 1);
  CHECK_EQ(list[1].as_float("a"), -25.0f);
  CHECK(list[2].truth && !list[3].truth);
  CHECK(list[4].kind == Json::Kind::Null);
  CHECK(v.find("b")->items.empty());
  CHECK_EQ(parse_json(R"({"k": 1, "k": 2})").find("k")->number, 2.0);
}

TEST(strings) {
  CHECK_EQ(parse_json(R"("caf\u00e9 \ud83d\ude00 \"\\\/\n\t")").as_text("t"),
           "caf\xC3\xA9 \xF0\x9F\x98\x80 \"\\/\n\t");
  CHECK_EQ(parse_json("\"\xC3\xA9\"").as_text("t"), "\xC3\xA9");
}

TEST(what_is_no_json) {
  for (const char* text : {"",
                           " ",
                           "[",
                           "]",
                           "[1",
                           "[1,]",
                           "{",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{a:1}",
                           "{\"a\":1,}",
                           "1 2",
                           "tru",
                           "nul",
                           "+1",
                           ".5",
                           "-",
                           "-a",
                           "inf",
                           "nan",
                           "-inf",
                           "\"",
                           "\"\\",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\\u-123\"",
                           "\"\\ud800\"",
                           "\"\\ud800\\u0041\"",
                           "\"\\udc00\"",
                           "\"\n\"",
                           "'a'"})
    CHECK_MSG(refused(text), text);
}

TEST(limits) {
  const auto nested = [](int depth) {
    return std::string(static_cast<size_t>(depth), '[') +
           std::string(static_cast<size_t>(depth), ']');
  };
  CHECK(!refused(nested(kMaxJsonDepth)));
  CHECK(refused(nested(kMaxJsonDepth + 2)));
  CHECK(refused(nested(1'000'000)));
  std::string many = "[0";
  for (size_t k = 0; k < kMaxJsonValues; ++k)
    many += ",0";
  CHECK(refused(many + "]"));
}

TEST(numbers_that_do_not_fit) {
  for (const char* text : {"-1", "1.5", "11", "1e999", "-1e999", "\"1\"", "null"}) {
    bool threw = false;
    try {
      parse_json(text).as_index("n", 10);
    } catch (const CorruptData&) {
      threw = true;
    }
    CHECK_MSG(threw, text);
  }
  bool threw = false;
  try {
    parse_json("1e39").as_float("n");
  } catch (const CorruptData&) {
    threw = true;
  }
  CHECK(threw);
}

int main(int argc, char** argv) { return check::run_all(argc, argv); }

// The whole test framework of the C++ tests: named tests, checks that go on after a failure,
// a count at the end. A run without a single check fails, so that nothing passes by doing nothing.
//
//   #include "check.hpp"
//   TEST(addition) { CHECK_EQ(1 + 1, 2); }
//   int main(int argc, char** argv) { return check::run_all(argc, argv); }
//
// Arguments select tests whose name contains one of them. An About says what the checks of a block
// are about (a shape, an instruction set), and is asked only when one of them fails:
//
//   const check::About about([&] { return "bits " + std::to_string(bits); });
//
// A Family says which kernels the checks of a block judge: a failure names them, and how many
// checks each had is printed at the end, so that a family that was never compared with anything is
// seen.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

// Atomic: checks may run inside parallel_for.
inline std::atomic<long long> g_checks{0};
inline std::atomic<long long> g_failures{0};

struct Registrar {
  Registrar(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

/// What the checks of this thread are about, until the end of the block.
class About {
 public:
  explicit About(std::function<std::string()> text) : text_(std::move(text)), outer_(innermost()) {
    innermost() = this;
  }
  ~About() { innermost() = outer_; }
  About(const About&) = delete;
  About& operator=(const About&) = delete;

  /// From the outermost block inwards, each with a comma in front.
  static std::string all() { return innermost() == nullptr ? "" : innermost()->chain(); }

 private:
  static const About*& innermost() {
    thread_local const About* about = nullptr;
    return about;
  }
  std::string chain() const { return (outer_ == nullptr ? "" : outer_->chain()) + ", " + text_(); }

  std::function<std::string()> text_;
  const About* outer_;
};

/// The kernels, such as "neon", that the checks of this thread judge, until the end of the block.
class Family {
 public:
  explicit Family(std::string_view name)
      : about_([text = std::string(name)] { return text; }), outer_(counter()) {
    const std::lock_guard lock(mutex());
    counter() = &counts()[std::string(name)];
  }
  ~Family() { counter() = outer_; }
  Family(const Family&) = delete;
  Family& operator=(const Family&) = delete;

  static void count() {
    if (counter() != nullptr) counter()->fetch_add(1, std::memory_order_relaxed);
  }
  static void print() {
    for (const auto& [name, checks] : counts())
      std::printf("family %s: %lld checks\n", name.c_str(), checks.load());
  }

 private:
  using Counter = std::atomic<long long>;
  static std::map<std::string, Counter>& counts() {
    static std::map<std::string, Counter> all;
    return all;
  }
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static Counter*& counter() {
    thread_local Counter* current = nullptr;
    return current;
  }

  const About about_;
  Counter* outer_;
};

inline void report(bool passed, const char* file, int line, const std::string& what) {
  g_checks.fetch_add(1, std::memory_order_relaxed);
  Family::count();
  if (passed) return;
  // The first failures explain the rest; thousands of lines explain nothing.
  const long long earlier = g_failures.fetch_add(1, std::memory_order_relaxed);
  if (earlier < 50)
    std::fprintf(stderr, "%s:%d: FAILED: %s%s\n", file, line, what.c_str(), About::all().c_str());
}

template <typename T>
std::string show(const T& value) {
  std::ostringstream out;
  if constexpr (std::is_enum_v<T>) {
    out << static_cast<long long>(value);
  } else if constexpr (sizeof(T) == 1 && std::is_integral_v<T>) {
    out << static_cast<int>(value);
  } else {
    out.precision(9);
    out << value;
  }
  return out.str();
}

inline int run_all(int argc, char** argv) {
  int ran = 0;
  for (const Test& test : tests()) {
    bool selected = argc <= 1;
    for (int i = 1; i < argc; ++i) {
      selected = selected || std::string_view(test.name).find(argv[i]) != std::string_view::npos;
    }
    if (!selected) continue;
    ++ran;
    const long long before = g_checks;
    const long long failed_before = g_failures;
    const auto begin = std::chrono::steady_clock::now();
    try {
      test.body();
    } catch (const std::exception& error) {
      report(false, test.name, 0, std::string("unexpected exception: ") + error.what());
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::printf("%-44s %9lld checks %7.2f s%s\n", test.name, g_checks - before, seconds.count(),
                g_failures == failed_before ? "" : "  FAILED");
    std::fflush(stdout);
  }
  Family::print();
  std::printf("%d tests, %lld checks, %lld failures\n", ran, g_checks.load(), g_failures.load());
  if (ran == 0 || g_checks == 0) {
    std::fprintf(stderr, "nothing was checked: that is a failure\n");
    return 1;
  }
  return g_failures == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                                 \
  static void check_test_##name();                                                 \
  static const check::Registrar check_registrar_##name{#name, &check_test_##name}; \
  static void check_test_##name()

#define CHECK(condition) check::report(static_cast<bool>(condition), __FILE__, __LINE__, #condition)

// Extra text (a seed, a shape) is built only when the check fails.
#define CHECK_MSG(condition, message)                                                          \
  do {                                                                                         \
    const bool check_passed = static_cast<bool>(condition);                                    \
    check::report(check_passed, __FILE__, __LINE__,                                            \
                  check_passed ? std::string()                                                 \
                               : std::string(#condition) + " [" + std::string(message) + "]"); \
  } while (false)

#define CHECK_EQ(actual, expected)                                                              \
  do {                                                                                          \
    const auto check_actual = (actual); /* copies: (actual) may be part of a temporary */       \
    const auto check_expected = (expected);                                                     \
    const bool check_passed = check_actual == check_expected;                                   \
    check::report(check_passed, __FILE__, __LINE__,                                             \
                  check_passed                                                                  \
                      ? std::string()                                                           \
                      : std::string(#actual " == " #expected ", got ") +                        \
                            check::show(check_actual) + " and " + check::show(check_expected)); \
  } while (false)

// The expression throws Type, and its message contains `text`.
#define CHECK_THROWS(expression, Type, text)                                                    \
  do {                                                                                          \
    std::string check_got = "no exception";                                                     \
    bool check_passed = false;                                                                  \
    try {                                                                                       \
      (void)(expression);                                                                       \
    } catch (const Type& check_error) {                                                         \
      check_got = check_error.what();                                                           \
      check_passed = check_got.find(text) != std::string::npos;                                 \
    } catch (const std::exception& check_error) {                                               \
      check_got = std::string("another exception: ") + check_error.what();                      \
    }                                                                                           \
    check::report(                                                                              \
        check_passed, __FILE__, __LINE__,                                                       \
        std::string(#expression " throws " #Type " with '") + (text) + "', got: " + check_got); \
  } while (false)

// Random images, and the check of an operation between convolutions on every instruction set:
// values, and which bytes each part writes. Inputs lie between unreadable pages, with only the 3
// bytes of slack behind them that the kernels may read.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "cpu/image/ops.hpp"
#include "exact.hpp"
#include "seed.hpp"

namespace adalayer::cpu {

inline std::mt19937 rng(check::seed(20240711));

inline int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

template <class T>
T pick(const std::vector<T>& values) {
  return values[static_cast<size_t>(uniform(0, static_cast<int>(values.size()) - 1))];
}

inline const std::vector<int64_t>& channel_counts() {
  static const std::vector<int64_t> counts = [] {
    std::vector<int64_t> c;
    for (int64_t i = 1; i <= 70; ++i)
      c.push_back(i);
    for (const int64_t i : {127, 128, 129, 255, 256, 257, 1024})
      c.push_back(i);
    return c;
  }();
  return counts;
}

/// A layout with padding, phases and a pitch beyond what the channels need, now and then.
inline ImageLayout random_layout(int64_t c, int64_t h, int64_t w) {
  Padding padding;
  if (uniform(0, 1) == 1) padding = {uniform(0, 2), uniform(0, 2), uniform(0, 2), uniform(0, 2)};
  const int64_t phases = uniform(1, 2);
  ImageLayout l = image_layout(c, h, w, padding, phases, uniform(0, 3) == 0 ? 4 : 1);
  if (uniform(0, 2) == 0) {
    l.pitch += 16 * uniform(1, 4);
    l.row_bytes = l.columns * l.pitch;
    l.image_bytes = l.phases * l.phase_rows * l.row_bytes + 8 * l.pitch;
  }
  return l;
}

inline uint8_t random_level() {
  static int mode = 0;
  static int left = 0;
  if (left-- <= 0) {
    mode = uniform(0, 5);
    left = uniform(1, 4000);
  }
  if (mode == 0) return 0;
  if (mode == 1) return 255;
  if (mode == 2) return uniform(0, 1) == 1 ? 255 : 0;
  return static_cast<uint8_t>(rng());
}

/// An input image of random levels; everything around the pixels is random too.
struct Image {
  ImageLayout layout;
  Exact<uint8_t> memory;

  explicit Image(const ImageLayout& l) : layout(l), memory(static_cast<size_t>(l.image_bytes) + 3) {
    for (size_t i = 0; i < memory.size(); ++i)
      memory[i] = random_level();
  }
  Image(int64_t c, int64_t h, int64_t w) : Image(random_layout(c, h, w)) {}
  ConstImageView view() const { return {&layout, memory.data()}; }
  int operator()(int64_t c, int64_t y, int64_t x) const {
    return memory[static_cast<size_t>(layout.offset(y, x) + c)];
  }
};

inline std::string describe(const ImageLayout& l) {
  return std::to_string(l.channels) + "x" + std::to_string(l.h) + "x" + std::to_string(l.w) +
         " pitch " + std::to_string(l.pitch) + " phases " + std::to_string(l.phases);
}

using Level = std::function<int(int64_t c, int64_t y, int64_t x)>;
using Operation = std::function<void(ImageView out, Part part)>;

/// Runs the operation on every instruction set in 1, 2 and 3 parts. `first` and `count`: the
/// channels that it writes; `exact`: it leaves the bytes behind them alone.
inline void check_operation(const std::string& what, const ImageLayout& l, const Level& expected,
                            const Operation& run, int64_t first = 0, int64_t count = -1,
                            bool exact = false) {
  if (count < 0) count = l.channels;
  const auto size = static_cast<size_t>(l.image_bytes) + 3;
  // What each byte may be: outside, spare (between channels and pitch), or an expected level.
  constexpr int kOutside = -1, kSpare = -2;
  std::vector<int> want(size, kOutside);
  for (int64_t y = 0; y < l.h; ++y) {
    for (int64_t x = 0; x < l.w; ++x) {
      const int64_t at = l.offset(y, x);
      if (!exact)
        for (int64_t c = 0; c < l.pitch; ++c)
          want[static_cast<size_t>(at + c)] = kSpare;
      for (int64_t c = 0; c < count; ++c)
        want[static_cast<size_t>(at + first + c)] = expected(c, y, x);
    }
  }
  std::vector<uint8_t> canary(size);
  for (auto& byte : canary)
    byte = static_cast<uint8_t>(rng());
  for (const Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    const check::Family family(isa_name(isa));
    for (int64_t parts = 1; parts <= 3; ++parts) {
      // Two runs over opposite canaries show every byte that is written, whatever its value.
      Exact<uint8_t> a(size), b(size);
      std::vector<uint8_t> writer(size, 0);
      int64_t twice = 0, outside = 0, missing = 0, wrong = 0;
      for (int64_t part = 0; part < parts; ++part) {
        std::vector<uint8_t> before_a(canary), before_b(size);
        for (size_t i = 0; i < size; ++i)
          before_b[i] = static_cast<uint8_t>(~canary[i]);
        std::memcpy(a.data(), before_a.data(), size);
        std::memcpy(b.data(), before_b.data(), size);
        run({&l, a.data()}, {part, parts});
        run({&l, b.data()}, {part, parts});
        for (size_t i = 0; i < size; ++i) {
          const bool written = a[i] != before_a[i] || b[i] != before_b[i];
          if (!written) continue;
          outside += want[i] == kOutside;
          twice += writer[i] != 0;
          writer[i] = 1;
          if (want[i] >= 0) wrong += a[i] != want[i] || b[i] != want[i];
        }
      }
      for (size_t i = 0; i < size; ++i)
        missing += want[i] >= 0 && writer[i] == 0;
      CHECK_MSG(outside == 0 && twice == 0 && missing == 0 && wrong == 0,
                what + " " + describe(l) + " " + std::string(isa_name(isa)) + " parts " +
                    std::to_string(parts) + ": outside " + std::to_string(outside) + ", twice " +
                    std::to_string(twice) + ", missing " + std::to_string(missing) + ", wrong " +
                    std::to_string(wrong));
    }
  }
  force_isa("auto");
}

inline float random_scale() {
  // Ties (0.5), values that leave the int32 range, and overflows to infinity and NaN.
  static const std::vector<float> kSpecial = {0.5f, -0.5f, 1.0f, 0.25f, 1e9f, -3e8f, 3e38f, 0.0f};
  if (uniform(0, 3) == 0) return pick(kSpecial);
  return static_cast<float>(uniform(-2000, 2000)) * 1e-3f;
}
inline float random_offset() {
  return uniform(0, 5) == 0 ? pick<float>({3e38f, -3e38f, 0.5f, -1e9f})
                            : static_cast<float>(uniform(-30000, 30000)) * 0.01f;
}

struct RandomFinish {
  std::vector<uint8_t> table;
  U8Finish finish;
  RandomFinish() {
    finish.zero_point = uniform(0, 2) == 0 ? pick<int>({0, 255}) : uniform(0, 255);
    int low = 0, high = 255;
    if (uniform(0, 1) == 1) {
      low = uniform(0, 255);
      high = uniform(low, 255);
    }
    finish.lo = static_cast<float>(low - finish.zero_point);
    finish.hi = static_cast<float>(high - finish.zero_point);
    finish.inv_scale = pick<float>({1.0f, 0.37f, 1.9f});
    if (uniform(0, 2) == 0) {
      for (int i = 0; i < 256; ++i)
        table.push_back(static_cast<uint8_t>(rng()));
      finish.table = table.data();
    }
  }
};

inline std::vector<float> random_floats(int64_t n, float (*value)()) {
  std::vector<float> v;
  for (int64_t i = 0; i < n; ++i)
    v.push_back(value());
  return v;
}

inline std::vector<uint8_t> random_table() {
  std::vector<uint8_t> table(256);
  for (auto& v : table)
    v = static_cast<uint8_t>(rng());
  return table;
}

/// Sizes of an image with c channels, small where there are many.
struct Size {
  int64_t h, w;
  explicit Size(int64_t c) : h(uniform(1, c > 100 ? 3 : 6)), w(uniform(1, c > 100 ? 4 : 11)) {}
};

/// Runs `run(out, part)` over a float tensor on every instruction set in 1 to 3 parts; each element
/// must be written once, with the bits of `expected`.
inline void check_floats(const std::string& what, const std::vector<float>& expected,
                         const std::function<void(float*, Part)>& run) {
  const size_t n = expected.size();
  for (const Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    const check::Family family(isa_name(isa));
    for (int64_t parts = 1; parts <= 3; ++parts) {
      std::vector<int> writers(n, 0);
      int64_t wrong = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const Exact<float> out(n);
        for (size_t i = 0; i < n; ++i)
          out[i] = -12345.75f;
        run(out.data(), {part, parts});
        for (size_t i = 0; i < n; ++i) {
          if (out[i] == -12345.75f) continue;
          ++writers[i];
          wrong += std::memcmp(&out[i], &expected[i], sizeof(float)) != 0;
        }
      }
      const auto once = static_cast<size_t>(std::count(writers.begin(), writers.end(), 1));
      CHECK_MSG(wrong == 0 && once == n, what + " " + std::string(isa_name(isa)) + " parts " +
                                             std::to_string(parts) + ": wrong " +
                                             std::to_string(wrong) + ", written once " +
                                             std::to_string(once) + " of " + std::to_string(n));
    }
  }
  force_isa("auto");
}

}  // namespace adalayer::cpu

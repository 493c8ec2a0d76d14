// The steps of a Winograd convolution over vectors of any width. Included inside the unnamed
// namespace of one ISA file only, after its struct Vec (avx2/winograd256.inl,
// avx512/winograd512.inl) and cpu/isa/shared/unrolled.hpp.

using T = Vec::T;

/// The matrices of reference/winograd.hpp with what their rows have in common computed once.
template <int kTile>
struct Axis;

template <>
struct Axis<2> {
  static constexpr int kTaps = 4;
  // Powers of two that an output is still multiplied with, on this axis.
  static constexpr int kShift[] = {1, 1};
  static constexpr uint32_t kOddInverse = 1;

  [[gnu::always_inline]] static inline void input(const T (&d)[4], T (&v)[4]) {
    v[0] = Vec::sub16(d[0], d[2]);
    v[1] = Vec::add16(d[1], d[2]);
    v[2] = Vec::sub16(d[2], d[1]);
    v[3] = Vec::sub16(d[1], d[3]);
  }
  [[gnu::always_inline]] static inline void weight(const T (&g)[3], T (&u)[4]) {
    const T sum = Vec::add16(g[0], g[2]);
    u[0] = g[0];
    u[1] = Vec::add16(sum, g[1]);
    u[2] = Vec::sub16(sum, g[1]);
    u[3] = g[2];
  }
  [[gnu::always_inline]] static inline void output(const T (&m)[4], T (&y)[2]) {
    y[0] = Vec::add32(Vec::add32(m[0], m[0]), Vec::add32(m[1], m[2]));
    y[1] = Vec::sub32(Vec::sub32(m[1], m[2]), Vec::add32(m[3], m[3]));
  }
};

template <>
struct Axis<4> {
  static constexpr int kTaps = 6;
  static constexpr int kShift[] = {3, 2, 1, 1};
  static constexpr uint32_t kOddInverse = 954437177;

  [[gnu::always_inline]] static inline void input(const T (&d)[6], T (&v)[6]) {
    const T a = Vec::sub16(d[4], d[2]), b = Vec::sub16(d[3], d[1]);
    v[0] = Vec::add16(Vec::shl16<2>(Vec::sub16(d[0], d[2])), a);
    const T even = Vec::sub16(d[4], Vec::shl16<2>(d[2]));
    const T odd = Vec::sub16(d[3], Vec::shl16<2>(d[1]));
    v[1] = Vec::add16(even, odd);
    v[2] = Vec::sub16(even, odd);
    const T twice = Vec::add16(b, b);
    v[3] = Vec::add16(a, twice);
    v[4] = Vec::sub16(a, twice);
    v[5] = Vec::sub16(Vec::sub16(d[5], d[3]), Vec::add16(twice, twice));
  }
  [[gnu::always_inline]] static inline void weight(const T (&g)[3], T (&u)[6]) {
    const T sum = Vec::add16(g[0], g[2]), twice = Vec::add16(g[1], g[1]);
    const T even = Vec::add16(g[0], Vec::shl16<2>(g[2]));
    u[0] = g[0];
    u[1] = Vec::sub16(Vec::set32(0), Vec::add16(sum, g[1]));
    u[2] = Vec::sub16(g[1], sum);
    u[3] = Vec::add16(even, twice);
    u[4] = Vec::sub16(even, twice);
    u[5] = g[2];
  }
  /// Outputs 1, 2 and 3 without the factors 2, 4 and 4 of their rows.
  [[gnu::always_inline]] static inline void output(const T (&m)[6], T (&y)[4]) {
    const auto twice = [](T v) { return Vec::add32(v, v); };
    const T s1 = Vec::add32(m[1], m[2]), d1 = Vec::sub32(m[1], m[2]);
    const T s2 = Vec::add32(m[3], m[4]), d2 = Vec::sub32(m[3], m[4]);
    y[0] = Vec::add32(twice(Vec::add32(twice(Vec::add32(m[0], s1)), m[0])), s2);
    y[1] = Vec::add32(twice(d1), d2);
    y[2] = Vec::add32(s1, s2);
    const T thrice = Vec::add32(twice(m[5]), m[5]);
    y[3] = Vec::add32(twice(Vec::add32(thrice, d2)), d1);
  }
};

template <int kTile>
void transform_input(const WinogradInputArgs& a) {
  using A = Axis<kTile>;
  constexpr int n = A::kTaps;
  for (int64_t c = 0; c < a.channels; c += Vec::kLevels) {
    alignas(sizeof(T)) T half[n][n];
    unrolled<0, n>([&](auto x) __attribute__((always_inline)) {
      T d[n], v[n];
      unrolled<0, n>([&](auto y) __attribute__((always_inline)) {
        d[y.value] = Vec::load_levels(a.rows[y.value] + x.value * a.pitch + c);
      });
      A::input(d, v);
      unrolled<0, n>([&](auto i)
                         __attribute__((always_inline)) { half[i.value][x.value] = v[i.value]; });
    });
    int16_t* out = a.factors + c;
    unrolled<0, n>([&](auto i) __attribute__((always_inline)) {
      T v[n];
      A::input(half[i.value], v);
      unrolled<0, n>([&](auto j) __attribute__((always_inline)) {
        Vec::store(out, v[j.value]);
        out += a.tap_stride;
      });
    });
  }
}

template <int kTile>
void transform_taps(const WinogradTapsArgs& a) {
  using A = Axis<kTile>;
  constexpr int n = A::kTaps;
  for (int64_t at = 0; at < a.elements; at += Vec::kLevels) {
    T half[n][3];
    unrolled<0, 3>([&](auto x) __attribute__((always_inline)) {
      T g[3], u[n];
      unrolled<0, 3>([&](auto y) __attribute__((always_inline)) {
        const int8_t* weights = a.weights + (y.value * 3 + x.value) * a.elements + at;
        g[y.value] = Vec::load_narrow(reinterpret_cast<const uint8_t*>(weights));
      });
      A::weight(g, u);
      unrolled<0, n>([&](auto i)
                         __attribute__((always_inline)) { half[i.value][x.value] = u[i.value]; });
    });
    unrolled<0, n>([&](auto i) __attribute__((always_inline)) {
      T u[n];
      A::weight(half[i.value], u);
      unrolled<0, n>([&](auto j) __attribute__((always_inline)) {
        constexpr int k = i.value * n + j.value;
        if (a.narrow[k])
          Vec::store_narrow(a.taps + a.offset[k] + at, u[j.value]);
        else
          Vec::store(a.taps + a.offset[k] + 2 * at, u[j.value]);
      });
    });
  }
}

void multiply(const WinogradProductArgs& a);  // winograd_multiply.inl, or the file's own

/// The products are many times the registers: what is made of their columns goes through the
/// first-level cache.
template <int kTile>
void transform_output(const WinogradOutputArgs& a) {
  using A = Axis<kTile>;
  constexpr int n = A::kTaps;
  const T inverse = Vec::set32(static_cast<int32_t>(A::kOddInverse));
  for (int t = 0; t < a.tiles; ++t)
    for (int c = 0; c < a.width; c += Vec::kSums) {
      const int32_t* products = a.products + t * a.width + c;
      T half[kTile][n];
      unrolled<0, n>([&](auto x) __attribute__((always_inline)) {
        T m[n], y[kTile];
        unrolled<0, n>([&](auto i) __attribute__((always_inline)) {
          m[i.value] = Vec::load(products + (i.value * n + x.value) * a.tap_stride);
        });
        A::output(m, y);
        unrolled<0, kTile>(
            [&](auto i) __attribute__((always_inline)) { half[i.value][x.value] = y[i.value]; });
      });
      int32_t* sums = a.sums + t * a.tile_stride + c;
      unrolled<0, kTile>([&](auto i) __attribute__((always_inline)) {
        T y[kTile];
        A::output(half[i.value], y);
        unrolled<0, kTile>([&](auto j) __attribute__((always_inline)) {
          T sum = y[j.value];
          if constexpr (A::kOddInverse != 1) sum = Vec::mul32(sum, inverse);
          Vec::store(sums + i.value * a.row_stride + j.value * a.width,
                     Vec::template sra32<A::kShift[i.value] + A::kShift[j.value]>(sum));
        });
      });
    }
}

constexpr WinogradKernels kernels_named(const char* name) {
  return {.name = name,
          .groups = Vec::kGroups,
          .rows = Vec::kRows,
          .multiply = multiply,
          .input = {transform_input<2>, transform_input<4>},
          .output = {transform_output<2>, transform_output<4>},
          .taps = {transform_taps<2>, transform_taps<4>}};
}

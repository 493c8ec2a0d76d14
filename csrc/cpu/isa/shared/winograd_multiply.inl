// The products of a Winograd convolution over pairs of factors. Included behind winograd.inl, whose
// Vec also offers product(a, w), of pairs of int16 to int32, and dot(sum, a, w).

// Taps are asked for so many bytes before they are used: those of many channels come from beyond
// the second-level cache, and what the hardware fetches ahead ends with every page.
constexpr int64_t kAhead = 8192;

/// kRows tiles by all outputs of the groups, whose sums stay in registers.
template <int kRows, int kGroups, bool kNarrow>
void multiply_rows(const WinogradProductArgs& a, int row) {
  constexpr int kParts = kWinogradGroup / Vec::kSums, kVectors = kGroups * kParts;
  constexpr int64_t kPartBytes = Vec::kSums * 2 * (kNarrow ? 1 : 2);
  // Three rows to a pointer, which an instruction reaches with the stride once or twice: twelve
  // pointers are more than there are registers.
  constexpr int kPointers = (kRows + 2) / 3;
  const int64_t stride = a.factor_stride;
  const int16_t* factors[kPointers];
  unrolled<0, kPointers>([&](auto i) __attribute__((always_inline)) {
    factors[i.value] = a.factors + (row + 3 * i.value) * stride;
    __asm__("" : "+r"(factors[i.value]));  // or the compiler makes twelve of them
  });
  const uint8_t* taps = a.taps;
  T sums[kRows][kVectors];
  const auto step = [&](auto first) __attribute__((always_inline)) {
    T w[kVectors];
    unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
      const uint8_t* at = taps + v.value / kParts * a.group_bytes + v.value % kParts * kPartBytes;
      w[v.value] = kNarrow ? Vec::load_narrow(at) : Vec::load(at);
    });
    unrolled<0, kRows>([&](auto r) __attribute__((always_inline)) {
      const T pair = Vec::broadcast(factors[r.value / 3] + r.value % 3 * stride);
      unrolled<0, kVectors>([&](auto v) __attribute__((always_inline)) {
        T& sum = sums[r.value][v.value];
        if constexpr (first.value)
          sum = Vec::product(pair, w[v.value]);
        else
          sum = Vec::dot(sum, pair, w[v.value]);
      });
    });
    __builtin_prefetch(taps + kAhead);
    taps += kParts * kPartBytes;
    unrolled<0, kPointers>([&](auto i) __attribute__((always_inline)) {
      factors[i.value] += 2;
      __asm__("" : "+r"(factors[i.value]));
    });
  };
  step(std::true_type());
  for (int64_t p = 1; p < a.pairs; ++p)
    step(std::false_type());
  int32_t* products = a.products + row * kWinogradGroup * kGroups;
  unrolled<0, kRows * kVectors>([&](auto i) __attribute__((always_inline)) {
    Vec::store(products + i.value * Vec::kSums, sums[i.value / kVectors][i.value % kVectors]);
  });
}

/// All rows, in passes of nearly equal size.
template <int kGroups, bool kNarrow, int... kRow>
void multiply_all(const WinogradProductArgs& a, std::integer_sequence<int, kRow...>) {
  static constexpr void (*kPass[])(const WinogradProductArgs&,
                                   int) = {multiply_rows<kRow + 1, kGroups, kNarrow>...};
  const int passes = (a.rows + Vec::kRows - 1) / Vec::kRows;
  const int rows = a.rows / passes, more = a.rows % passes;  // the first `more` have one more
  for (int pass = 0, row = 0; pass < passes; ++pass) {
    kPass[rows - (pass < more ? 0 : 1)](a, row);
    row += rows + (pass < more ? 1 : 0);
  }
}

void multiply(const WinogradProductArgs& a) {
  constexpr auto kRows = std::make_integer_sequence<int, Vec::kRows>();
  if constexpr (Vec::kGroups > 1)
    if (a.groups > 1)
      return a.narrow ? multiply_all<2, true>(a, kRows) : multiply_all<2, false>(a, kRows);
  a.narrow ? multiply_all<1, true>(a, kRows) : multiply_all<1, false>(a, kRows);
}

// Parts of a linear layer's outputs, and the ranges of its rows, for any vector width. Included
// behind image.inl.

void add_group(const GroupSums& a) {
  const auto ints = [](const int32_t* p) {
    return V::load(reinterpret_cast<const uint8_t*>(p), Whole{});
  };
  for (int r = 0; r < a.rows; ++r) {
    const I zero = V::set32(a.zeros[r]);
    const F step = V::set(a.steps[r]);
    const int32_t* sums = a.sums + r * a.sum_row;
    float* reals = a.reals + r * a.real_row;
    for (int64_t j = 0; j < a.columns; j += kLanes) {
      const I sum = V::sub32(ints(sums + j), V::mul32(zero, ints(a.totals + j)));
      const F scale = V::mul(V::floats(a.scale + j, Whole{}), step);
      const F y = V::fma(V::to_float(sum), scale, V::floats(reals + j, Whole{}));
      V::store_floats(reals + j, y, Whole{});
    }
  }
}

void row_range(const float* x, int64_t n, float* low, float* high) {
  F lows = V::set(0.0f), highs = lows;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F v = V::floats(x + i, Whole{});
    lows = V::min(v, lows);
    highs = V::max(v, highs);
  }
  float ends[2][kLanes];
  V::store_floats(ends[0], lows, Whole{});
  V::store_floats(ends[1], highs, Whole{});
  float least = 0.0f, most = 0.0f;
  const auto take = [&](float a, float b) {
    least = a < least ? a : least;
    most = b > most ? b : most;
  };
  for (int64_t k = 0; k < kLanes; ++k)
    take(ends[0][k], ends[1][k]);
  for (; i < n; ++i)
    take(x[i], x[i]);
  *low = least;
  *high = most;
}

void finish_floats(const float* y, int64_t n, const U8Finish& finish, uint8_t* out) {
  emit(Finish<false>(finish), out, n, [&](int64_t i, auto left) { return V::floats(y + i, left); });
}

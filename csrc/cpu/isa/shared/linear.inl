// Parts of a linear layer's outputs, for any vector width. Included behind image.inl.

void add_group(const GroupSums& a) {
  const auto ints = [](const int32_t* p) {
    return V::load(reinterpret_cast<const uint8_t*>(p), Whole{});
  };
  const I zero = V::set32(a.zero);
  const F step = V::set(a.step);
  for (int r = 0; r < a.rows; ++r) {
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

void finish_floats(const float* y, int64_t n, const U8Finish& finish, uint8_t* out) {
  emit(Finish<false>(finish), out, n, [&](int64_t i, auto left) { return V::floats(y + i, left); });
}

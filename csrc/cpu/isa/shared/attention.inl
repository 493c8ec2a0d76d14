// What attention needs between its products, for any vector width. Included behind image.inl.

I load32(const int32_t* p) { return V::load(reinterpret_cast<const uint8_t*>(p), Whole{}); }

I load_sums(const BlockedSums& s, int64_t i) {
  static_assert(16 % kLanes == 0);
  return V::add32(load32(s.at(i)), V::set32(s.term));
}

int32_t softmax_levels(const SoftmaxLevels& row) {
  constexpr float kNothing = -__builtin_inff();
  const int64_t count = row.sums.count, whole = (count + 15) / 16 * 16;
  const F scale = V::set(row.scale);
  const auto score = [&](int64_t j, F mask) {
    return V::fma(V::to_float(V::add32(load_sums(row.sums, j), load32(row.terms + j))), scale,
                  mask);
  };
  if (row.mask == nullptr)
    for (int64_t j = 0; j < whole; j += kLanes)
      V::store_floats(row.scores + j, score(j, V::set(0.0f)), Whole{});
  else
    each_vector(count, [&](int64_t j, auto left) {
      V::store_floats(row.scores + j, score(j, V::floats(row.mask + j, left)), Whole{});
    });
  for (int64_t j = count; j < whole; ++j)
    row.scores[j] = kNothing;
  F most = V::set(kNothing);
  for (int64_t j = 0; j < whole; j += kLanes)
    most = V::max(V::floats(row.scores + j, Whole{}), most);
  float each[kLanes], top = kNothing;
  V::store_floats(each, most, Whole{});
  for (const float v : each)
    top = v > top ? v : top;
  const F tops = V::set(top), highest = V::set(255.0f);
  I total = V::zero();
  for (int64_t j = 0; j < whole; j += kLanes) {
    const F weight = exponential(V::sub(V::floats(row.scores + j, Whole{}), tops));
    const I level = V::round(V::mul(weight, highest));
    V::store_bytes(row.levels + j, level);
    total = V::add32(total, level);
  }
  return static_cast<int32_t>(V::total32(total));
}

void scale_sums(const BlockedSums& sums, float factor, bool bounded, const U8Finish& finish,
                uint8_t* out) {
  const F factors = V::set(factor);
  with_finish(finish, bounded, [&](const auto& f) {
    emit(f, out, sums.count,
         [&](int64_t i, auto) { return V::mul(V::to_float(load_sums(sums, i)), factors); });
  });
}

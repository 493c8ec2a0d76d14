// Products of floats for any vector width. Included behind image.inl.

inline Whole behind(Whole, int64_t) { return {}; }
inline int64_t behind(int64_t left, int64_t taken) { return left - taken; }

/// kRows rows by kVectors registers of columns, all in registers.
template <int kRows, int kVectors, class Left>
void product_of(const FloatProduct& p, const float* b, float* c, Left left) {
  F sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = V::set(0.0f);
  const float* a = p.a;
  for (int64_t k = 0; k < p.terms; ++k, a += p.a_term, b += p.b_term) {
    F columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      columns[v] = V::floats(b + v * kLanes, behind(left, v * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F factor = V::set(a[r * p.a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = V::fma(factor, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * p.c_row + v * kLanes;
      const auto rest = behind(left, v * kLanes);
      V::store_floats(to, V::add(V::floats(to, rest), sums[r][v]), rest);
    }
}

/// One block of columns, as many registers at a time as the rows leave room for.
template <int kRows>
void block_of(const FloatProduct& p, const float* b, float* c, int64_t columns) {
  constexpr int kMost = static_cast<int>(kFloatColumns / kLanes);
  constexpr int kVectors = kRows > 2 || kMost < 2 ? 2 : kMost;
  for (int64_t j = 0; j < columns; j += kVectors * kLanes) {
    const int64_t left = columns - j;
    if (left >= kVectors * kLanes)
      product_of<kRows, kVectors>(p, b + j, c + j, Whole{});
    else if (left <= kLanes)
      product_of<kRows, 1>(p, b + j, c + j, left);
    else
      product_of<kRows, kVectors>(p, b + j, c + j, left);
  }
}

void multiply_floats(const FloatProduct& p) {
  const float* b = p.b;
  for (int64_t j = 0; j < p.columns; j += kFloatColumns, b += p.b_block) {
    const int64_t columns = p.columns - j < kFloatColumns ? p.columns - j : kFloatColumns;
    float* c = p.c + j;
    switch (p.rows) {
      case 1:
        block_of<1>(p, b, c, columns);
        break;
      case 2:
        block_of<2>(p, b, c, columns);
        break;
      case 3:
        block_of<3>(p, b, c, columns);
        break;
      case 4:
        block_of<4>(p, b, c, columns);
        break;
      case 5:
        block_of<5>(p, b, c, columns);
        break;
      default:
        block_of<kFloatRows>(p, b, c, columns);
    }
  }
}

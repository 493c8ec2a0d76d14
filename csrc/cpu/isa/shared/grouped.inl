// Depthwise and grouped kernels, generic in the vector type; included inside an unnamed namespace
// of an instruction-set file. grouped_kernels.hpp explains the layouts.
//
// V has I (integers), F (floats) and the operations on them; `split` stands for load and store of a
// vector whose kSplit equal pieces belong to different rows. dot() multiplies what interleave() or
// half() made with what load_weights() read: whichever order these have within a vector, they have
// the same.

template <int k>
struct Number {
  static constexpr int value = k;
};

/// The sums of a convolution on their way to u8.
template <class V>
struct Finish {
  typename V::F residual_scale, inv_scale, lo, hi;
  typename V::I residual_zero, zero_words, lo_bytes, hi_bytes, zero_dwords, lo_dwords, hi_dwords;
  bool clamp_floats;

  explicit Finish(const GroupedTile& t)
      : residual_scale(V::set1(t.residual_scale)),
        inv_scale(V::set1(t.inv_scale)),
        lo(V::set1(t.lo)),
        hi(V::set1(t.hi)),
        residual_zero(V::set1_dwords(t.residual_zero)),
        zero_words(V::set1_words(t.zero_point)),
        lo_bytes(V::set1_bytes(static_cast<int>(t.lo) + t.zero_point)),
        hi_bytes(V::set1_bytes(static_cast<int>(t.hi) + t.zero_point)),
        zero_dwords(V::set1_dwords(t.zero_point)),
        lo_dwords(V::set1_dwords(static_cast<int>(t.lo))),
        hi_dwords(V::set1_dwords(static_cast<int>(t.hi))),
        clamp_floats(!t.bounded) {}

  /// The same constants, but left in memory: registers are for the sums.
  const Finish& in_memory() const {
    const Finish* self = this;
    __asm__("" : "+r"(self) : : "memory");
    return *self;
  }

  /// Adds the real values of a residual's levels, in dwords.
  typename V::F add(typename V::F y, typename V::I levels) const {
    const auto relative = V::to_floats(V::sub_dwords(levels, residual_zero));
    return V::add_floats(y, V::mul_floats(relative, residual_scale));
  }
  typename V::F clamp(typename V::F y) const { return V::min(V::max(y, lo), hi); }
  /// Eight-bit levels of four vectors: packing saturates, which changes nothing that the clamp
  /// would not; so a clamp of floats that was left out may follow here.
  typename V::I words(typename V::I a, typename V::I b) const {
    return V::add_words(V::pack_words(a, b), zero_words);
  }
  typename V::I bytes(typename V::I a, typename V::I b) const {
    return V::min_bytes(V::max_bytes(V::pack_bytes(a, b), lo_bytes), hi_bytes);
  }
  /// Natural order, no packing: levels in dwords.
  typename V::I dwords(typename V::I q) const {
    return V::add_dwords(V::min_dwords(V::max_dwords(q, lo_dwords), hi_dwords), zero_dwords);
  }
};

/// A block of 4 vectors of sums for kOuts outputs, from initial value to stored bytes. sum(v, acc)
/// adds the products of vector v; output n is column x + n % kColumns of output row n / kColumns.
/// Levels wait in memory for the other vectors that they are packed with: they have the time.
template <class V, int kRows, int kColumns, int kSplit, class Sum>
inline void block_of_four(const GroupedTile& t, const Finish<V>& finish, int64_t x,
                          const Sum& sum) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int kOuts = kRows * kColumns;
  alignas(V::kBytes) uint8_t levels[4][kOuts * V::kBytes];
#pragma GCC unroll 1
  for (int v = 0; v < 4; ++v) {
    I acc[kOuts];
    const I correction = V::load_constant(t.constants, v);
#pragma GCC unroll 16
    for (int n = 0; n < kOuts; ++n)
      acc[n] = correction;
    sum(v, acc);
    if (t.sums != nullptr) {
#pragma GCC unroll 16
      for (int n = 0; n < kOuts; ++n)
        V::template store_sums<kSplit>(t.sums + n / kColumns, kRows,
                                       (x + n % kColumns) * t.sums_pitch + 4 * v, acc[n]);
      continue;
    }
    const F scale = V::as_floats(V::load_constant(t.constants, 4 + v));
    const F bias = V::as_floats(V::load_constant(t.constants, 8 + v));
    F y[kOuts];
#pragma GCC unroll 16
    for (int n = 0; n < kOuts; ++n)
      y[n] = V::fma(V::to_floats(acc[n]), scale, bias);
    if (t.residual != nullptr) {
      const I widen = V::broadcast_granule(t.widen + 16 * v);
#pragma GCC unroll 16
      for (int n = 0; n < kOuts; ++n) {
        const I bytes = V::template load_split<kSplit>(t.residual + n / kColumns, kRows,
                                                       (x + n % kColumns) * t.residual_pitch);
        y[n] = finish.add(y[n], V::shuffle_bytes(bytes, widen));
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < kOuts; ++n)
      y[n] = V::mul_floats(y[n], finish.inv_scale);
    if (finish.clamp_floats) {
#pragma GCC unroll 16
      for (int n = 0; n < kOuts; ++n)
        y[n] = finish.clamp(y[n]);
    }
#pragma GCC unroll 16
    for (int n = 0; n < kOuts; ++n)
      V::store(levels[v] + n * V::kBytes, V::round(y[n]));
  }
  if (t.sums != nullptr) return;
#pragma GCC unroll 1
  for (int r = 0; r < kRows; ++r) {
    for (int n = r * kColumns; n < (r + 1) * kColumns; ++n) {
      const int64_t at = n * V::kBytes;
      I bytes = finish.bytes(finish.words(V::load(levels[0] + at), V::load(levels[1] + at)),
                             finish.words(V::load(levels[2] + at), V::load(levels[3] + at)));
      if (t.narrow != nullptr) bytes = V::shuffle_bytes(bytes, V::broadcast_granule(t.narrow));
      V::template store_split<kSplit>(t.out + r, kRows, (x + n - r * kColumns) * t.out_pitch, bytes,
                                      t.bytes);
    }
  }
}

// ------------------------------------------------------------------------------------- depthwise

/// Fills columns [from, to) of the scratch: [run][columns][t] vectors.
template <class V, int kSplit>
inline void interleave_columns(const GroupedTile& t, int64_t columns, int64_t from, int64_t to) {
  for (int64_t run = 0; run < t.row_count; run += V::kRows) {
    uint8_t* scratch = t.scratch + (run / V::kRows * columns + from) * 4 * V::kBytes;
    for (int64_t c = from; c < to; ++c, scratch += 4 * V::kBytes) {
      typename V::I row[V::kRows];
#pragma GCC unroll 4
      for (int k = 0; k < V::kRows; ++k)
        row[k] = V::template load_split<kSplit>(t.rows + run + k, t.row_count, c * t.pitch);
      if (t.expand != nullptr) {
        const auto expand = V::load(t.expand);
#pragma GCC unroll 4
        for (int k = 0; k < V::kRows; ++k)
          row[k] = V::shuffle_bytes(row[k], expand);
      }
      V::interleave(row, scratch);
    }
  }
}

/// kTaps and kStride: of the columns, where the compiler knows them and taps are neighbours; else
/// 0.
template <class V, int kRows, int kColumns, int kSplit, int kTaps, int kStride>
void depthwise_block(const GroupedTile& t, const Finish<V>& finish, int64_t columns, int64_t x) {
  constexpr int64_t kColumnBytes = 4 * V::kBytes;
  const int64_t runs = t.row_count / V::kRows, taps = kTaps > 0 ? kTaps : t.kernel_w;
  const int64_t step = (kTaps > 0 ? kStride : t.stride_w) * kColumnBytes;
  const int64_t dilation = (kTaps > 0 ? 1 : t.dilation_w) * kColumnBytes;
  const int64_t weight_step = (kTaps > 0 ? kRows : t.weight_rows) * V::kBytes;
  const uint8_t* first = t.scratch + x * step;
  block_of_four<V, kRows, kColumns, kSplit>(
      t, finish, x, [&](int v, typename V::I* acc) __attribute__((always_inline)) {
        const auto* weights =
            static_cast<const uint8_t*>(t.weights) + v * runs * taps * weight_step;
        const uint8_t* column = first + v * V::kBytes;
        for (int64_t run = 0; run < runs; ++run, column += columns * kColumnBytes) {
          const uint8_t* data = column;
          const auto tap = [&]() __attribute__((always_inline)) {
            typename V::I w[kRows];
#pragma GCC unroll 2
            for (int r = 0; r < kRows; ++r)
              w[r] = V::load_weights(weights + r * V::kBytes);
#pragma GCC unroll 16
            for (int n = 0; n < kColumns; ++n) {
              const auto d = V::load(data + n * step);
#pragma GCC unroll 2
              for (int r = 0; r < kRows; ++r)
                acc[r * kColumns + n] = V::dot_column(acc[r * kColumns + n], d, w[r]);
            }
            data += dilation;
            weights += weight_step;
          };
          if constexpr (kTaps > 0) {
#pragma GCC unroll 8
            for (int kx = 0; kx < kTaps; ++kx)
              tap();
          } else {
            for (int64_t kx = 0; kx < taps; ++kx)
              tap();
          }
        }
      });
}

/// Calls run<n>(x) for pieces of 1..kMost columns that add up to `count`, as equal as they can be.
template <int kMost, class Run>
inline void in_pieces(int64_t count, const Run& run) {
  int64_t x = 0;
  for (int64_t pieces = (count + kMost - 1) / kMost; pieces > 0; --pieces) {
    const int64_t n = (count - x + pieces - 1) / pieces;
    run(n, x);
    x += n;
  }
}

template <class V, int kRows, int kSplit, int kTaps, int kStride>
void depthwise_tile(const GroupedTile& t) {
  const Finish<V> constants(t);
  const Finish<V>& finish = constants.in_memory();
  const int64_t reach = (t.kernel_w - 1) * t.dilation_w + 1;
  const int64_t columns = (t.count - 1) * t.stride_w + reach;
  int64_t ready = 0;
  constexpr int kMost = V::kColumns;
  in_pieces<kMost>(t.count, [&](int64_t n, int64_t x) {
    // Shuffles and products use different ports: new columns are interleaved block by block, so
    // that the processor can do both at once.
    const int64_t needed = (x + n - 1) * t.stride_w + reach;
    interleave_columns<V, kSplit>(t, columns, ready, needed);
    ready = needed;
    if constexpr (kMost == 8) {
      switch (n) {
        case 5:
          return depthwise_block<V, kRows, 5, kSplit, kTaps, kStride>(t, finish, columns, x);
        case 6:
          return depthwise_block<V, kRows, 6, kSplit, kTaps, kStride>(t, finish, columns, x);
        case 7:
          return depthwise_block<V, kRows, 7, kSplit, kTaps, kStride>(t, finish, columns, x);
        case 8:
          return depthwise_block<V, kRows, 8, kSplit, kTaps, kStride>(t, finish, columns, x);
        default:
          break;
      }
    }
    switch (n) {
      case 1:
        return depthwise_block<V, kRows, 1, kSplit, kTaps, kStride>(t, finish, columns, x);
      case 2:
        return depthwise_block<V, kRows, 2, kSplit, kTaps, kStride>(t, finish, columns, x);
      case 3:
        return depthwise_block<V, kRows, 3, kSplit, kTaps, kStride>(t, finish, columns, x);
      default:
        return depthwise_block<V, kRows, 4, kSplit, kTaps, kStride>(t, finish, columns, x);
    }
  });
}

template <class V, int kSplit>
void depthwise_rows(const GroupedTile& t) {
  // One row of the output meets the weights of two at the end of an image.
  const bool known = t.kernel_w == V::kKnownTaps && t.dilation_w == 1 && t.stride_w <= 2 &&
                     t.out_rows == t.weight_rows;
  const auto strip = [&](auto rows) {
    if constexpr (V::kKnownTaps > 0) {
      if (known && t.stride_w == 1)
        return depthwise_tile<V, rows.value, kSplit, V::kKnownTaps, 1>(t);
      if (known) return depthwise_tile<V, rows.value, kSplit, V::kKnownTaps, 2>(t);
    }
    depthwise_tile<V, rows.value, kSplit, 0, 0>(t);
  };
  if (t.out_rows == 2)
    strip(Number<2>{});
  else
    strip(Number<1>{});
}

template <class V>
void depthwise(const GroupedTile& t) {
  if (t.splits == 1) return depthwise_rows<V, 1>(t);
  if constexpr (V::kLanes >= 2)
    if (t.splits == 2) return depthwise_rows<V, 2>(t);
  if constexpr (V::kLanes == 4) return depthwise_rows<V, 4>(t);
}

// --------------------------------------------------------------------------------------- in lane

/// fn(Number<0>), fn(Number<1>), ... up to kQuads of them.
template <int kQuads, class Fn>
inline void for_each_quad(const Fn& fn) {
  fn(Number<0>{});
  if constexpr (kQuads > 1) fn(Number<1>{});
  if constexpr (kQuads > 2) {
    fn(Number<2>{});
    fn(Number<3>{});
  }
}

template <class V, int kColumns, int kSplit, int kQuads>
void in_lane_block(const GroupedTile& t, const Finish<V>& finish, int64_t x) {
  using I = typename V::I;
  constexpr int kHalves = V::kHalves;
  // All four vectors meet the same data, so they are summed together and handed out after.
  I sums[4][kColumns];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v)
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n)
      sums[v][n] = V::zero();
  const auto* weights = static_cast<const uint8_t*>(t.weights);
  const int64_t step = t.stride_w * t.pitch;
  for (int64_t ky = 0; ky < t.row_count; ++ky) {
    int64_t at = x * step;
    for (int64_t kx = 0; kx < t.kernel_w; ++kx, at += t.dilation_w * t.pitch) {
      I pixel[kColumns];
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n)
        pixel[n] = V::template load_split<kSplit>(t.rows + ky, t.row_count, at + n * step);
      for_each_quad<kQuads>([&](auto quad) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half, weights += 4 * V::kBytes) {
          I data[kColumns];
#pragma GCC unroll 4
          for (int n = 0; n < kColumns; ++n)
            data[n] = V::half(V::template quad_of_group<kQuads, quad.value>(pixel[n]), half);
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            const I w = V::load_weights(weights + v * V::kBytes);
#pragma GCC unroll 4
            for (int n = 0; n < kColumns; ++n)
              sums[v][n] = V::dot(sums[v][n], data[n], w);
          }
        }
      });
    }
  }
  block_of_four<V, 1, kColumns, kSplit>(t, finish, x,
                                        [&](int v, I* acc) __attribute__((always_inline)) {
#pragma GCC unroll 4
                                          for (int n = 0; n < kColumns; ++n)
                                            acc[n] = V::add_dwords(acc[n], sums[v][n]);
                                        });
}

template <class V, int kSplit, int kQuads>
void in_lane_tile(const GroupedTile& t) {
  const Finish<V> constants(t);
  const Finish<V>& finish = constants.in_memory();
  in_pieces<V::kInLaneColumns>(t.count, [&](int64_t n, int64_t x) {
    switch (n) {
      case 1:
        return in_lane_block<V, 1, kSplit, kQuads>(t, finish, x);
      case 2:
        return in_lane_block<V, 2, kSplit, kQuads>(t, finish, x);
      default:
        break;
    }
    if constexpr (V::kInLaneColumns == 4) {
      if (n == 3) return in_lane_block<V, 3, kSplit, kQuads>(t, finish, x);
      return in_lane_block<V, 4, kSplit, kQuads>(t, finish, x);
    }
  });
}

template <class V, int kQuads>
void in_lane_splits(const GroupedTile& t) {
  if (t.splits == 1) return in_lane_tile<V, 1, kQuads>(t);
  if constexpr (V::kLanes >= 2)
    if (t.splits == 2) return in_lane_tile<V, 2, kQuads>(t);
  if constexpr (V::kLanes == 4) return in_lane_tile<V, 4, kQuads>(t);
}

template <class V>
void in_lane(const GroupedTile& t) {
  switch (t.quads) {
    case 1:
      return in_lane_splits<V, 1>(t);
    case 2:
      return in_lane_splits<V, 2>(t);
    default:
      return in_lane_splits<V, 4>(t);
  }
}

// ------------------------------------------------------------------------------------- broadcast

template <class V, int kTiles, int kColumns>
void broadcast_block(const GroupedTile& t, const Finish<V>& finish, int64_t x) {
  using I = typename V::I;
  I acc[kTiles][kColumns];
#pragma GCC unroll 2
  for (int v = 0; v < kTiles; ++v)
#pragma GCC unroll 16
    for (int n = 0; n < kColumns; ++n)
      acc[v][n] = V::load_constant(t.constants, v);
  const auto* weights = static_cast<const uint8_t*>(t.weights);
  const int64_t step = t.stride_w * t.pitch;
  for (int64_t ky = 0; ky < t.row_count; ++ky) {
    const uint8_t* tap = t.rows[ky] + x * step;
    for (int64_t kx = 0; kx < t.kernel_w; ++kx, tap += t.dilation_w * t.pitch) {
      for (int quad = 0; quad < t.quads; ++quad) {
        I four[kColumns];
#pragma GCC unroll 16
        for (int n = 0; n < kColumns; ++n)
          four[n] = V::broadcast_dword(tap + n * step + quad * 4);
#pragma GCC unroll 2
        for (int half = 0; half < V::kHalves; ++half, weights += kTiles * V::kBytes) {
          I w[kTiles];
#pragma GCC unroll 2
          for (int v = 0; v < kTiles; ++v)
            w[v] = V::load_weights(weights + v * V::kBytes);
#pragma GCC unroll 16
          for (int n = 0; n < kColumns; ++n) {
            const I data = V::half(four[n], half);
#pragma GCC unroll 2
            for (int v = 0; v < kTiles; ++v)
              acc[v][n] = V::dot(acc[v][n], data, w[v]);
          }
        }
      }
    }
  }
  if (t.sums != nullptr) {
#pragma GCC unroll 2
    for (int v = 0; v < kTiles; ++v)
#pragma GCC unroll 16
      for (int n = 0; n < kColumns; ++n)
        V::store_dwords(t.sums[0] + (x + n) * t.sums_pitch + v * V::kDwords, acc[v][n],
                        t.bytes - v * V::kDwords);
    return;
  }
#pragma GCC unroll 2
  for (int v = 0; v < kTiles; ++v) {
    const auto scale = V::as_floats(V::load_constant(t.constants, kTiles + v));
    const auto bias = V::as_floats(V::load_constant(t.constants, 2 * kTiles + v));
    const int64_t first = v * V::kDwords, left = t.bytes - first;
#pragma GCC unroll 16
    for (int n = 0; n < kColumns; ++n) {
      auto y = V::fma(V::to_floats(acc[v][n]), scale, bias);
      if (t.residual != nullptr) {
        const auto r = V::widen_bytes(t.residual[0] + (x + n) * t.residual_pitch + first);
        y = finish.add(y, r);
      }
      y = V::mul_floats(y, finish.inv_scale);
      if (finish.clamp_floats) y = finish.clamp(y);
      V::store_dwords_as_bytes(t.out[0] + (x + n) * t.out_pitch + first, finish.dwords(V::round(y)),
                               left);
    }
  }
}

template <class V, int kTiles>
void broadcast_tile(const GroupedTile& t) {
  constexpr int kMost = V::kBroadcastSums / kTiles < 8 ? V::kBroadcastSums / kTiles : 8;
  const Finish<V> constants(t);
  const Finish<V>& finish = constants.in_memory();
  in_pieces<kMost>(t.count, [&](int64_t n, int64_t x) {
    if constexpr (kMost == 8) {
      switch (n) {
        case 5:
          return broadcast_block<V, kTiles, 5>(t, finish, x);
        case 6:
          return broadcast_block<V, kTiles, 6>(t, finish, x);
        case 7:
          return broadcast_block<V, kTiles, 7>(t, finish, x);
        case 8:
          return broadcast_block<V, kTiles, 8>(t, finish, x);
        default:
          break;
      }
    }
    switch (n) {
      case 1:
        return broadcast_block<V, kTiles, 1>(t, finish, x);
      case 2:
        return broadcast_block<V, kTiles, 2>(t, finish, x);
      case 3:
        return broadcast_block<V, kTiles, 3>(t, finish, x);
      default:
        return broadcast_block<V, kTiles, 4>(t, finish, x);
    }
  });
}

template <class V>
void broadcast(const GroupedTile& t) {
  if (t.tiles == 2)
    broadcast_tile<V, 2>(t);
  else
    broadcast_tile<V, 1>(t);
}

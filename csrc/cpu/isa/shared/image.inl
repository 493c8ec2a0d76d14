// The inner loops of image_kernels.hpp for any vector width. Included inside an unnamed namespace
// of a file with instruction-set flags; V holds the instructions:
//
//   F floats, I integers; kLanes floats and kBlock = 4 * kLanes bytes in a register. Loads and
//   stores take `left`, the elements wanted: Whole (all), or a number that may exceed a register.
//   What a short load puts into other lanes is unspecified, except for load_zero.
//
// Before it come Pieces, a table of 256 bytes for registers of indices, and interleave_sixteen():
// 16 bytes of each of two rows in turn (bytes_x86.inl; neon/image.cpp).

using F = V::F;
using I = V::I;
constexpr int64_t kLanes = V::kLanes;
constexpr int64_t kBlock = V::kBlock;

// ---- levels ---------------------------------------------------------------------------------

/// U8Finish in registers, without its table. The order of max and min makes NaN the lowest level.
template <bool kBounded>
struct Finish {
  F inv_scale, lo, hi;
  I zero, lowest, highest;
  explicit Finish(const U8Finish& f)
      : inv_scale(V::set(f.inv_scale)),
        lo(V::set(f.lo)),
        hi(V::set(f.hi)),
        zero(V::set16(f.zero_point)),
        lowest(V::set8(static_cast<int>(f.lo) + f.zero_point)),
        highest(V::set8(static_cast<int>(f.hi) + f.zero_point)) {}

  I relative(F y) const {
    y = V::mul(y, inv_scale);
    if constexpr (!kBounded) y = V::min(V::max(y, lo), hi);
    return V::round(y);
  }
  /// Four registers of relative levels to bytes in order. Saturation does the coarse clamp.
  I pack(I a, I b, I c, I d) const {
    const I low_words = V::adds16(V::packs32(a, b), zero);
    const I high_words = V::adds16(V::packs32(c, d), zero);
    return V::max8(V::min8(V::unmix(V::packus16(low_words, high_words)), highest), lowest);
  }
};

/// n bytes of output; value(i, left) is y of elements i .. i + kLanes.
template <bool kBounded, class Value>
void emit(const Finish<kBounded>& f, uint8_t* out, int64_t n, const Value& value) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    const I a = f.relative(value(i, Whole{}));
    const I b = f.relative(value(i + kLanes, Whole{}));
    const I c = f.relative(value(i + 2 * kLanes, Whole{}));
    const I d = f.relative(value(i + 3 * kLanes, Whole{}));
    V::store(out + i, f.pack(a, b, c, d), Whole{});
  }
  if (i == n) return;
  const int64_t left = n - i;
  I part[4];
  for (int64_t k = 0; k < 4; ++k)
    part[k] = k * kLanes < left ? f.relative(value(i + k * kLanes, left - k * kLanes)) : V::zero();
  V::store(out + i, f.pack(part[0], part[1], part[2], part[3]), left);
}

template <class Run>
void with_finish(const U8Finish& finish, bool bounded, const Run& run) {
  if (bounded)
    run(Finish<true>(finish));
  else
    run(Finish<false>(finish));
}

/// combine(real value of a, real value of b); b repeats after `period` bytes.
template <class Combine>
void pair(const PairSpec& spec, bool bounded, const uint8_t* a, const uint8_t* b, int64_t period,
          uint8_t* out, int64_t n, const Combine& combine) {
  const F zero_a = V::set(static_cast<float>(spec.zero_a)), scale_a = V::set(spec.scale_a);
  const F zero_b = V::set(static_cast<float>(spec.zero_b)), scale_b = V::set(spec.scale_b);
  with_finish(spec.finish, bounded, [&](const auto& finish) {
    for (int64_t base = 0; base < n; base += period) {
      const int64_t run = n - base < period ? n - base : period;
      emit(finish, out + base, run, [&](int64_t i, auto left) {
        // Differences of levels are exact in float.
        const F x = V::mul(V::sub(V::bytes(a + base + i, left), zero_a), scale_a);
        return combine(x, V::mul(V::sub(V::bytes(b + i, left), zero_b), scale_b));
      });
    }
  });
}

void add(const PairSpec& spec, bool bounded, const uint8_t* a, const uint8_t* b, int64_t period,
         uint8_t* out, int64_t n) {
  pair(spec, bounded, a, b, period, out, n, [](F x, F y) { return V::add(x, y); });
}

void mul(const PairSpec& spec, bool bounded, const uint8_t* a, const uint8_t* b, int64_t period,
         uint8_t* out, int64_t n) {
  pair(spec, bounded, a, b, period, out, n, [](F x, F y) { return V::mul(x, y); });
}

void line(const LineArgs& args, const uint8_t* in, uint8_t* out, int64_t n) {
  with_finish(args.finish, args.bounded, [&](const auto& finish) {
    for (int64_t base = 0; base < n; base += args.period) {
      const int64_t run = n - base < args.period ? n - base : args.period;
      const uint8_t* from = in + base;
      emit(finish, out + base, run, [&](int64_t i, auto left) {
        return V::fma(V::bytes(from + i, left), V::floats(args.slope + i, Whole{}),
                      V::floats(args.offset + i, Whole{}));
      });
    }
  });
}

// ---- moves ----------------------------------------------------------------------------------

void copy(const Pixels& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    const uint8_t* in = p.in + (p.index == nullptr ? i : p.index[i]) * p.in_step;
    uint8_t* out = p.out + i * p.out_step;
    int64_t c = 0;
    for (; c + kBlock <= p.bytes; c += kBlock)
      V::store(out + c, V::load(in + c, Whole{}), Whole{});
    if (c < p.bytes) V::store(out + c, V::load(in + c, p.bytes - c), p.bytes - c);
  }
}

void lookup(const uint8_t* table, const Pixels& p) {
  if (p.bytes * p.count < 256) {
    for (int64_t i = 0; i < p.count; ++i)
      for (int64_t c = 0; c < p.bytes; ++c)
        p.out[i * p.out_step + c] = table[p.in[i * p.in_step + c]];
    return;
  }
  const Pieces pieces(table);
  for (int64_t i = 0; i < p.count; ++i) {
    const uint8_t* in = p.in + i * p.in_step;
    uint8_t* out = p.out + i * p.out_step;
    int64_t c = 0;
    for (; c + kBlock <= p.bytes; c += kBlock)
      V::store(out + c, pieces(V::load(in + c, Whole{})), Whole{});
    if (c < p.bytes) V::store(out + c, pieces(V::load(in + c, p.bytes - c)), p.bytes - c);
  }
}

/// out[2i] = a[i], out[2i + 1] = b[i]; the last 16 are done once more where they are not whole.
void interleave(const uint8_t* a, const uint8_t* b, int64_t n, uint8_t* out) {
  if (n < 16) {
    for (int64_t i = 0; i < n; ++i) {
      out[2 * i] = a[i];
      out[2 * i + 1] = b[i];
    }
    return;
  }
  for (int64_t i = 0;;) {
    interleave_sixteen(a + i, b + i, out + 2 * i);
    if (i + 16 == n) return;
    i = i + 32 <= n ? i + 16 : n - 16;
  }
}

void gather(const GatherPlan& plan, const Pixels& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    const uint8_t* in = p.in + i * p.in_step;
    uint8_t* out = p.out + i * p.out_step;
    if (plan.interleaved) {
      interleave(in + plan.even, in + plan.odd, p.bytes / 2, out);
    } else {
      for (int64_t c = 0; c < p.bytes; ++c)
        out[c] = in[plan.index[c]];
    }
  }
}

// ---- windows --------------------------------------------------------------------------------

/// kHeight x kWidth positions, 0 for any.
template <int kHeight, int kWidth>
void max_window_of(const Window& w, const uint8_t* in, uint8_t* out) {
  const int64_t height = kHeight > 0 ? kHeight : w.height, width = kWidth > 0 ? kWidth : w.width;
  const auto maximum = [&](const uint8_t* from, auto left) {
    I m = V::zero();
    for (int64_t r = 0; r < height; ++r) {
      const uint8_t* q = from + w.rows[r];
      for (int64_t k = 0; k < width; ++k, q += w.column)
        m = V::max8(m, V::load(q, left));
    }
    return m;
  };
  for (int64_t i = 0; i < w.count; ++i, in += w.step, out += w.out_step) {
    int64_t c = 0;
    for (; c + kBlock <= w.bytes; c += kBlock)
      V::store(out + c, maximum(in + c, Whole{}), Whole{});
    if (c < w.bytes) V::store(out + c, maximum(in + c, w.bytes - c), w.bytes - c);
  }
}

void max_window(const Window& w, const uint8_t* in, uint8_t* out) {
  if (w.height == 3 && w.width == 3) return max_window_of<3, 3>(w, in, out);
  if (w.height == 2 && w.width == 2) return max_window_of<2, 2>(w, in, out);
  if (w.height == 3 && w.width == 1) return max_window_of<3, 1>(w, in, out);
  if (w.height == 1 && w.width == 3) return max_window_of<1, 3>(w, in, out);
  max_window_of<0, 0>(w, in, out);
}

/// Sums of bytes in two registers of 16-bit words: `all` adds words as they are, `odd` their upper
/// bytes. Up to 256 bytes fit `odd`; the lower bytes' sum is all - 256 * odd, whatever overflowed.
struct WordSums {
  I all = V::zero(), odd = V::zero();
  void add(I v) {
    all = V::add16(all, v);
    odd = V::add16(odd, V::template shr16<8>(v));
  }
};
constexpr int64_t kWordTaps = 256;

/// Adds them to 32-bit sums: lane i of sums[j] belongs to byte 4 * i + j.
void widen(const WordSums& words, I* sums) {
  const I even = V::sub16(words.all, V::template shl16<8>(words.odd));
  const I low = V::set32(0xFFFF);
  sums[0] = V::add32(sums[0], V::bit_and(even, low));
  sums[1] = V::add32(sums[1], V::bit_and(words.odd, low));
  sums[2] = V::add32(sums[2], V::template shr32<16>(even));
  sums[3] = V::add32(sums[3], V::template shr32<16>(words.odd));
}

struct AverageFinish {
  Finish<false> finish;
  I centre, zero;
  F factor;
  explicit AverageFinish(const Average& a)
      : finish(a.finish),
        centre(V::set32(a.centre)),
        zero(V::set32(a.finish.zero_point)),
        factor(V::set(a.factor)) {}
  I level(I sum) const {
    const F y = V::mul(V::to_float(V::sub32(sum, centre)), factor);
    return V::add32(finish.relative(y), zero);
  }
  I bytes(const I* sums) const {
    const I even = V::bit_or(level(sums[0]), V::template shl32<16>(level(sums[2])));
    const I odd = V::bit_or(level(sums[1]), V::template shl32<16>(level(sums[3])));
    return V::bit_or(even, V::template shl32<8>(odd));
  }
};

/// Windows of kHeight x kWidth positions, or of any size up to kWordTaps where both are 0.
template <int kHeight, int kWidth>
void average_small(const Window& w, const AverageFinish& finish, const uint8_t* in, uint8_t* out) {
  const int64_t height = kHeight > 0 ? kHeight : w.height, width = kWidth > 0 ? kWidth : w.width;
  const auto average = [&](const uint8_t* from, auto left) {
    WordSums words;
    for (int64_t r = 0; r < height; ++r) {
      const uint8_t* q = from + w.rows[r];
      for (int64_t k = 0; k < width; ++k, q += w.column)
        words.add(V::load(q, left));
    }
    I sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    widen(words, sums);
    return finish.bytes(sums);
  };
  for (int64_t i = 0; i < w.count; ++i, in += w.step, out += w.out_step) {
    int64_t c = 0;
    for (; c + kBlock <= w.bytes; c += kBlock)
      V::store(out + c, average(in + c, Whole{}), Whole{});
    if (c < w.bytes) V::store(out + c, average(in + c, w.bytes - c), w.bytes - c);
  }
}

/// One window of any size; kCount registers of neighbouring bytes share each walk over it.
template <int kCount, class Left>
void average_large(const Window& w, const AverageFinish& finish, const uint8_t* in, uint8_t* out,
                   Left left) {
  I sums[kCount][4];
  for (auto& s : sums)
    for (auto& v : s)
      v = V::zero();
  WordSums words[kCount];
  int64_t room = kWordTaps;
  const auto flush = [&] {
    for (int b = 0; b < kCount; ++b) {
      widen(words[b], sums[b]);
      words[b] = {};
    }
    room = kWordTaps;
  };
  for (int64_t r = 0; r < w.height; ++r) {
    const uint8_t* q = in + w.rows[r];
    for (int64_t todo = w.width; todo > 0;) {
      const int64_t taps = todo < room ? todo : room;
      for (int64_t k = 0; k < taps; ++k, q += w.column)
        for (int b = 0; b < kCount; ++b)
          words[b].add(V::load(q + b * kBlock, left));
      todo -= taps;
      room -= taps;
      if (room == 0) flush();
    }
  }
  flush();
  for (int b = 0; b < kCount; ++b)
    V::store(out + b * kBlock, finish.bytes(sums[b]), left);
}

void average_window(const Window& w, const Average& average, const uint8_t* in, uint8_t* out) {
  const AverageFinish finish(average);
  const int64_t taps = w.height * w.width;
  if (w.height == 3 && w.width == 3) return average_small<3, 3>(w, finish, in, out);
  if (w.height == 2 && w.width == 2) return average_small<2, 2>(w, finish, in, out);
  if (taps < 16) return average_small<0, 0>(w, finish, in, out);
  for (int64_t i = 0; i < w.count; ++i, in += w.step, out += w.out_step) {
    int64_t c = 0;
    for (; c + 4 * kBlock <= w.bytes; c += 4 * kBlock)
      average_large<4>(w, finish, in + c, out + c, Whole{});
    for (; c + kBlock <= w.bytes; c += kBlock)
      average_large<1>(w, finish, in + c, out + c, Whole{});
    if (c < w.bytes) average_large<1>(w, finish, in + c, out + c, w.bytes - c);
  }
}

void bilinear(const BilinearRow& row) {
  const ResizeSpec& spec = *row.spec;
  const F part_h = V::set(row.part_h), scale = V::set(spec.scale), offset = V::set(spec.offset);
  with_finish(spec.finish, row.bounded, [&](const auto& finish) {
    for (int64_t x = 0; x < row.count; ++x) {
      const int64_t low = spec.low_w[x] * row.in_step, high = spec.high_w[x] * row.in_step;
      const F part_w = V::set(spec.part_w[x]);
      emit(finish, row.out + x * row.out_step, row.bytes, [&](int64_t i, auto left) {
        const auto along = [&](const uint8_t* q) {
          const F q0 = V::bytes(q + low + i, left), q1 = V::bytes(q + high + i, left);
          return V::fma(part_w, V::sub(q1, q0), q0);
        };
        const F top = along(row.top), bottom = along(row.bottom);
        return V::fma(V::fma(part_h, V::sub(bottom, top), top), scale, offset);
      });
    }
  });
}

// ---- layer norm -----------------------------------------------------------------------------

void moments(const uint8_t* in, int64_t in_step, int64_t channels, int64_t count, int64_t* sums,
             int64_t* squares) {
  constexpr int64_t kRun = 4096 * kBlock;  // a lane of squares grows by at most 4 * 255^2 a block
  for (int64_t p = 0; p < count; ++p, in += in_step) {
    I s1 = V::zero();
    int64_t s2 = 0;
    for (int64_t base = 0; base < channels; base += kRun) {
      const int64_t end = channels - base < kRun ? channels : base + kRun;
      I acc = V::zero();
      const auto take = [&](I v) {
        s1 = V::add64(s1, V::sum8(v));
        const I low = V::unpack_low8(v), high = V::unpack_high8(v);
        acc = V::add32(acc, V::add32(V::dot16(low, low), V::dot16(high, high)));
      };
      int64_t i = base;
      for (; i + kBlock <= end; i += kBlock)
        take(V::load(in + i, Whole{}));
      if (i < end) take(V::load_zero(in + i, end - i));
      s2 += V::total32(acc);
    }
    sums[p] = V::total64(s1);
    squares[p] = s2;
  }
}

void normalize(const LayerNormSpec& spec, const double* means, const float* factors,
               const Pixels& p) {
  const Finish<false> finish(spec.finish);
  for (int64_t x = 0; x < p.count; ++x) {
    const uint8_t* in = p.in + x * p.in_step;
    const auto mean = V::set_double(means[x]);
    const F factor = V::set(factors[x]);
    emit(finish, p.out + x * p.out_step, p.bytes, [&](int64_t i, auto left) {
      return V::fma(V::mul(V::centred(in + i, left, mean), factor), V::floats(spec.gamma + i, left),
                    V::floats(spec.beta + i, left));
    });
  }
}

void normalize_floats(const LayerNormSpec& spec, double mean, float factor, const uint8_t* in,
                      int64_t n, float* out) {
  const auto means = V::set_double(mean);
  const F factors = V::set(factor);
  const auto value = [&](int64_t i, auto left) {
    const F y = V::fma(V::mul(V::centred(in + i, left, means), factors),
                       V::floats(spec.gamma + i, left), V::floats(spec.beta + i, left));
    V::store_floats(out + i, y, left);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    value(i, Whole{});
  if (i < n) value(i, n - i);
}

// ---- floats ---------------------------------------------------------------------------------

Finish<false> grid_finish(const ActivationGrid& grid) {
  return Finish<false>(U8Finish{.lo = static_cast<float>(-grid.zero_point),
                                .hi = static_cast<float>(grid.qmax - grid.zero_point),
                                .zero_point = grid.zero_point,
                                .inv_scale = grid.inv_scale});
}

/// Up to four planes, kLanes pixels: their levels as the bytes of a dword per pixel.
template <class Left>
I quantize_quad(const QuantizeRow& row, const Finish<false>& finish, int32_t zero_point,
                int64_t channel, int64_t x, Left left) {
  // Levels relative to the zero point may be negative: they are added up as integers, and the zero
  // points of all bytes at once.
  I quad = V::zero();
  const int64_t count = row.channels - channel < 4 ? row.channels - channel : 4;
  uint32_t zeros = 0;
  for (int64_t j = count; j-- > 0;) {
    const F v = V::floats(row.x + (channel + j) * row.plane + x, left);
    quad = V::add32(V::template shl32<8>(quad), finish.relative(v));
    zeros = (zeros << 8) + static_cast<uint32_t>(zero_point);
  }
  return V::add32(quad, V::set32(static_cast<int32_t>(zeros)));
}

/// kLanes pixels of four quads to 16 bytes per pixel: a 4 x 4 transpose of dwords in each 128 bits.
void store_quads(const I* quad, uint8_t* out, int64_t pitch, int64_t bytes, int64_t pixels) {
  const I ab_low = V::unpack_low32(quad[0], quad[1]), ab_high = V::unpack_high32(quad[0], quad[1]);
  const I cd_low = V::unpack_low32(quad[2], quad[3]), cd_high = V::unpack_high32(quad[2], quad[3]);
  // 128-bit lane l of rows[p] is pixel 4 * l + p.
  alignas(64) uint8_t rows[4][kBlock];
  V::store(rows[0], V::unpack_low64(ab_low, cd_low), Whole{});
  V::store(rows[1], V::unpack_high64(ab_low, cd_low), Whole{});
  V::store(rows[2], V::unpack_low64(ab_high, cd_high), Whole{});
  V::store(rows[3], V::unpack_high64(ab_high, cd_high), Whole{});
  for (int64_t p = 0; p < pixels; ++p, out += pitch) {
    const uint8_t* from = &rows[p % 4][p / 4 * 16];
    if (bytes == 16)
      std::memcpy(out, from, 16);
    else if (bytes == 8)
      std::memcpy(out, from, 8);
    else
      std::memcpy(out, from, static_cast<size_t>(bytes));
  }
}

void quantize_planar(const QuantizeRow& row, const ActivationGrid& grid) {
  const Finish<false> finish = grid_finish(grid);
  if (row.pitch == 4) {
    int64_t x = 0;
    for (; x + kLanes <= row.count; x += kLanes)
      V::store(row.out + x * 4, quantize_quad(row, finish, grid.zero_point, 0, x, Whole{}),
               Whole{});
    const int64_t left = row.count - x;
    if (left > 0)
      V::store(row.out + x * 4, quantize_quad(row, finish, grid.zero_point, 0, x, left), left * 4);
    return;
  }
  for (int64_t x = 0; x < row.count; x += kLanes) {
    const int64_t left = row.count - x;
    for (int64_t c = 0; c < row.channels; c += 16) {
      I quad[4];
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t channel = c + 4 * k;
        quad[k] = channel >= row.channels ? V::zero()
                  : left >= kLanes
                      ? quantize_quad(row, finish, grid.zero_point, channel, x, Whole{})
                      : quantize_quad(row, finish, grid.zero_point, channel, x, left);
      }
      const int64_t bytes = row.pitch - c < 16 ? row.pitch - c : 16;
      store_quads(quad, row.out + x * row.pitch + c, row.pitch, bytes,
                  left < kLanes ? left : kLanes);
    }
  }
}

void quantize_pixels(const QuantizeRow& row, const ActivationGrid& grid) {
  const Finish<false> finish = grid_finish(grid);
  if (row.channels == 3 && row.pitch == 4 && row.count > 0) {
    // Three floats to four lanes reads one float more: the last pixel is done by itself.
    emit(finish, row.out, (row.count - 1) * 4,
         [&](int64_t i, auto left) { return V::triples(row.x + i / 4 * 3, left); });
    for (int64_t c = 0; c < 3; ++c)
      row.out[(row.count - 1) * 4 + c] = quantize_value(row.x[(row.count - 1) * 3 + c], grid);
    return;
  }
  const bool flat = row.channels == row.pitch;
  const int64_t runs = flat ? 1 : row.count, n = flat ? row.count * row.channels : row.channels;
  for (int64_t p = 0; p < runs; ++p) {
    const float* x = row.x + p * row.channels;
    emit(finish, row.out + p * row.pitch, n,
         [&](int64_t i, auto left) { return V::floats(x + i, left); });
  }
}

void dequantize_planar(const DequantizeRow& row) {
  const I zero = V::set32(row.zero_point), byte = V::set32(255);
  const F scale = V::set(row.scale);
  const I lanes = V::mul32(V::iota(), V::set32(static_cast<int32_t>(row.pitch)));
  for (int64_t c = 0; c < row.channels; c += 4) {
    const int64_t count = row.channels - c < 4 ? row.channels - c : 4;
    float* out = row.out + c * row.plane;
    const auto store = [&](I quad, int64_t x, auto left) {
      for (int64_t j = 0; j < count; ++j, quad = V::template shr32<8>(quad))
        V::store_floats(out + j * row.plane + x,
                        V::mul(V::to_float(V::sub32(V::bit_and(quad, byte), zero)), scale), left);
    };
    int64_t x = 0;
    for (; x + kLanes <= row.count; x += kLanes) {
      const uint8_t* q = row.in + x * row.pitch + c;
      store(row.pitch == 4 ? V::load(q, Whole{}) : V::gather32(q, lanes), x, Whole{});
    }
    if (x == row.count) continue;
    // Lanes behind the last pixel read that one again.
    const uint8_t* q = row.in + x * row.pitch + c;
    const int64_t left = row.count - x;
    const I last = V::set32(static_cast<int32_t>((left - 1) * row.pitch));
    store(V::gather32(q, V::min32(lanes, last)), x, left);
  }
}

void dequantize_row(const uint8_t* q, int64_t n, float scale, int32_t zero_point, float* out) {
  const F zero = V::set(static_cast<float>(zero_point)), scales = V::set(scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    V::store_floats(out + i, V::mul(V::sub(V::bytes(q + i, Whole{}), zero), scales), Whole{});
  if (i < n) V::store_floats(out + i, V::mul(V::sub(V::bytes(q + i, n - i), zero), scales), n - i);
}

/// fn(i, left) for n elements, kLanes at a time.
template <class Fn>
void each_vector(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    fn(i, Whole{});
  if (i < n) fn(i, n - i);
}

void blend_columns(const float* row, const int32_t* low, const int32_t* high, const float* part,
                   int64_t n, float* out) {
  each_vector(n, [&](int64_t i, auto left) {
    const F q0 = V::gather_floats(row, low + i, left), q1 = V::gather_floats(row, high + i, left);
    V::store_floats(out + i, V::fma(V::floats(part + i, left), V::sub(q1, q0), q0), left);
  });
}

void blend_rows(const float* top, const float* bottom, float part, int64_t n, float* out) {
  const F parts = V::set(part);
  each_vector(n, [&](int64_t i, auto left) {
    const F q0 = V::floats(top + i, left), q1 = V::floats(bottom + i, left);
    V::store_floats(out + i, V::fma(parts, V::sub(q1, q0), q0), left);
  });
}

void fma_values(const float* a, const float* b, const float* c, int64_t n, float* out) {
  each_vector(n, [&](int64_t i, auto left) {
    const F x = V::floats(a + i, left), factor = V::floats(b + i, left);
    V::store_floats(out + i, V::fma(x, factor, V::floats(c + i, left)), left);
  });
}

/// softmax_exp
F exponential(F x) {
  x = V::max(x, V::set(-87.0f));
  const F n = V::nearest(V::mul(x, V::set(1.44269504f)));
  const F r = V::fma(n, V::set(2.12194440e-4f), V::fma(n, V::set(-0.693359375f), x));
  F p = V::set(1.0f / 5040.0f);
  p = V::fma(p, r, V::set(1.0f / 720.0f));
  p = V::fma(p, r, V::set(1.0f / 120.0f));
  p = V::fma(p, r, V::set(1.0f / 24.0f));
  p = V::fma(p, r, V::set(1.0f / 6.0f));
  p = V::fma(p, r, V::set(0.5f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::fma(p, r, V::set(1.0f));
  return V::mul(p, V::power(n));
}

/// sigmoid_value
F sigmoid(F x) {
  const F one = V::set(1.0f);
  return V::div(one, V::add(one, exponential(V::min(V::sub(V::set(0.0f), x), V::set(87.0f)))));
}

template <class Value>
void map_floats(const float* in, int64_t n, float* out, const Value& value) {
  each_vector(n, [&](int64_t i, auto left) {
    V::store_floats(out + i, value(V::floats(in + i, left)), left);
  });
}

void function(const FloatFunctionSpec& s, const float* in, int64_t n, float* out) {
  const F a = V::set(s.a), b = V::set(s.b);
  switch (s.function) {
    case FloatFunction::Clamp:
      return map_floats(in, n, out, [&](F x) { return V::min(V::max(x, a), b); });
    case FloatFunction::Multiply:
      return map_floats(in, n, out, [&](F x) { return V::mul(x, a); });
    case FloatFunction::Plus:
      return map_floats(in, n, out, [&](F x) { return V::add(x, a); });
    case FloatFunction::Sigmoid:
      return map_floats(in, n, out, [](F x) { return sigmoid(x); });
    case FloatFunction::Tanh:
      return map_floats(in, n, out, [](F x) {
        const F two = V::set(2.0f);
        return V::fma(two, sigmoid(V::mul(two, x)), V::set(-1.0f));
      });
    case FloatFunction::Silu:
      return map_floats(in, n, out,
                        [](F x) { return V::mul(V::max(x, V::set(-87.0f)), sigmoid(x)); });
  }
}

void combine(FloatPair pair, const float* a, const float* b, int64_t n, float* out) {
  const auto by = [&](auto value) {
    each_vector(n, [&](int64_t i, auto left) {
      V::store_floats(out + i, value(V::floats(a + i, left), V::floats(b + i, left)), left);
    });
  };
  switch (pair) {
    case FloatPair::Sum:
      return by([](F x, F y) { return V::add(x, y); });
    case FloatPair::Difference:
      return by([](F x, F y) { return V::sub(x, y); });
    case FloatPair::Product:
      return by([](F x, F y) { return V::mul(x, y); });
    case FloatPair::Quotient:
      return by([](F x, F y) { return V::div(x, y); });
  }
}

void line_floats(const float* in, float slope, float offset, int64_t n, float* out) {
  const F slopes = V::set(slope), offsets = V::set(offset);
  map_floats(in, n, out, [&](F x) { return V::fma(x, slopes, offsets); });
}

/// One position: vectors run along the channels; only the sum goes one by one.
void softmax_one(const float* in, int64_t n, float* out) {
  float top = in[0];
  int64_t c0 = 1;
  if (n >= kLanes) {
    F most = V::floats(in, Whole{});
    for (c0 = kLanes; c0 + kLanes <= n; c0 += kLanes)
      most = V::max(V::floats(in + c0, Whole{}), most);
    float each[kLanes];
    V::store_floats(each, most, Whole{});
    for (const float v : each)
      top = v > top ? v : top;
  }
  for (; c0 < n; ++c0)
    top = in[c0] > top ? in[c0] : top;
  const F tops = V::set(top);
  each_vector(n, [&](int64_t i, auto left) {
    V::store_floats(out + i, exponential(V::sub(V::floats(in + i, left), tops)), left);
  });
  double sum = 0.0;
  for (int64_t c = 0; c < n; ++c)
    sum += static_cast<double>(out[c]);
  const F factor = V::set(static_cast<float>(1.0 / sum));
  each_vector(n, [&](int64_t i, auto left) {
    V::store_floats(out + i, V::mul(V::floats(out + i, left), factor), left);
  });
}

void softmax(const float* in, int64_t channels, int64_t stride, int64_t count, float* out) {
  if (stride == 1) return softmax_one(in, channels, out);
  each_vector(count, [&](int64_t i, auto left) {
    F top = V::floats(in + i, left);
    for (int64_t c = 1; c < channels; ++c)
      top = V::max(V::floats(in + c * stride + i, left), top);
    typename V::Doubles sum{};
    for (int64_t c = 0; c < channels; ++c) {
      const F e = exponential(V::sub(V::floats(in + c * stride + i, left), top));
      V::store_floats(out + c * stride + i, e, left);
      sum.add(e);
    }
    const F factor = sum.inverse();
    for (int64_t c = 0; c < channels; ++c) {
      float* y = out + c * stride + i;
      V::store_floats(y, V::mul(V::floats(y, left), factor), left);
    }
  });
}

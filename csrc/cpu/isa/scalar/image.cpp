// The inner loops in plain C++, straight from the formulas: what other machines run.
#include <cstring>
#include <limits>

#include "cpu/image_kernels.hpp"

namespace adalayer::cpu {
namespace {

/// The finish without its table.
uint8_t level(float y, const U8Finish& f) {
  const float v = min_x86(max_x86(y * f.inv_scale, f.lo), f.hi);
  return static_cast<uint8_t>(round_even(v) + f.zero_point);
}

void copy(const Pixels& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t from = p.index == nullptr ? i : p.index[i];
    std::memcpy(p.out + i * p.out_step, p.in + from * p.in_step, static_cast<size_t>(p.bytes));
  }
}

void lookup(const uint8_t* table, const Pixels& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    const uint8_t* in = p.in + i * p.in_step;
    uint8_t* out = p.out + i * p.out_step;
    for (int64_t c = 0; c < p.bytes; ++c)
      out[c] = table[in[c]];
  }
}

void gather(const GatherPlan& plan, const Pixels& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    const uint8_t* in = p.in + i * p.in_step;
    uint8_t* out = p.out + i * p.out_step;
    for (int64_t c = 0; c < p.bytes; ++c)
      out[c] = in[plan.index[c]];
  }
}

template <class Combine>
void pair(const PairSpec& spec, const uint8_t* a, const uint8_t* b, int64_t period, uint8_t* out,
          int64_t n, const Combine& combine) {
  for (int64_t base = 0; base < n; base += period) {
    for (int64_t i = base; i < n && i < base + period; ++i) {
      const float x = dequantize_value(a[i], spec.scale_a, spec.zero_a);
      const float y = dequantize_value(b[i - base], spec.scale_b, spec.zero_b);
      out[i] = level(combine(x, y), spec.finish);
    }
  }
}

void add(const PairSpec& spec, bool, const uint8_t* a, const uint8_t* b, int64_t period,
         uint8_t* out, int64_t n) {
  pair(spec, a, b, period, out, n, [](float x, float y) { return x + y; });
}

void mul(const PairSpec& spec, bool, const uint8_t* a, const uint8_t* b, int64_t period,
         uint8_t* out, int64_t n) {
  pair(spec, a, b, period, out, n, [](float x, float y) { return x * y; });
}

void line(const LineArgs& args, const uint8_t* in, uint8_t* out, int64_t n) {
  for (int64_t base = 0; base < n; base += args.period) {
    for (int64_t i = base; i < n && i < base + args.period; ++i) {
      const int64_t c = i - base;
      out[i] =
          level(std::fmaf(static_cast<float>(in[i]), args.slope[c], args.offset[c]), args.finish);
    }
  }
}

void max_window(const Window& w, const uint8_t* in, uint8_t* out) {
  for (int64_t i = 0; i < w.count; ++i, in += w.step, out += w.out_step) {
    std::memset(out, 0, static_cast<size_t>(w.bytes));
    for (int64_t r = 0; r < w.height; ++r) {
      for (int64_t k = 0; k < w.width; ++k) {
        const uint8_t* q = in + w.rows[r] + k * w.column;
        for (int64_t c = 0; c < w.bytes; ++c)
          out[c] = out[c] > q[c] ? out[c] : q[c];
      }
    }
  }
}

void average_window(const Window& w, const Average& average, const uint8_t* in, uint8_t* out) {
  constexpr int64_t kBlock = 256;
  int64_t sums[kBlock];
  for (int64_t i = 0; i < w.count; ++i, in += w.step, out += w.out_step) {
    for (int64_t c0 = 0; c0 < w.bytes; c0 += kBlock) {
      const int64_t n = w.bytes - c0 < kBlock ? w.bytes - c0 : kBlock;
      for (int64_t c = 0; c < n; ++c)
        sums[c] = 0;
      for (int64_t r = 0; r < w.height; ++r) {
        for (int64_t k = 0; k < w.width; ++k) {
          const uint8_t* q = in + w.rows[r] + k * w.column + c0;
          for (int64_t c = 0; c < n; ++c)
            sums[c] += q[c];
        }
      }
      for (int64_t c = 0; c < n; ++c) {
        const auto centred = static_cast<int32_t>(sums[c] - average.centre);
        out[c0 + c] = level(static_cast<float>(centred) * average.factor, average.finish);
      }
    }
  }
}

void bilinear(const BilinearRow& row) {
  const ResizeSpec& s = *row.spec;
  for (int64_t x = 0; x < row.count; ++x) {
    const int64_t low = s.low_w[x] * row.in_step, high = s.high_w[x] * row.in_step;
    for (int64_t c = 0; c < row.bytes; ++c) {
      const float y =
          blend(static_cast<float>(row.top[low + c]), static_cast<float>(row.top[high + c]),
                static_cast<float>(row.bottom[low + c]), static_cast<float>(row.bottom[high + c]),
                s.part_w[x], row.part_h);
      row.out[x * row.out_step + c] = level(std::fmaf(y, s.scale, s.offset), s.finish);
    }
  }
}

void moments(const uint8_t* in, int64_t in_step, int64_t channels, int64_t count, int64_t* sums,
             int64_t* squares) {
  for (int64_t i = 0; i < count; ++i, in += in_step) {
    sums[i] = squares[i] = 0;
    for (int64_t c = 0; c < channels; ++c) {
      sums[i] += in[c];
      squares[i] += in[c] * in[c];
    }
  }
}

void normalize(const LayerNormSpec& spec, const double* means, const float* factors,
               const Pixels& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    const uint8_t* in = p.in + i * p.in_step;
    uint8_t* out = p.out + i * p.out_step;
    for (int64_t c = 0; c < p.bytes; ++c) {
      const float centred = static_cast<float>(static_cast<double>(in[c]) - means[i]) * factors[i];
      out[c] = level(std::fmaf(centred, spec.gamma[c], spec.beta[c]), spec.finish);
    }
  }
}

void quantize_planar(const QuantizeRow& row, const ActivationGrid& grid) {
  for (int64_t c = 0; c < row.channels; ++c)
    for (int64_t x = 0; x < row.count; ++x)
      row.out[x * row.pitch + c] = quantize_value(row.x[c * row.plane + x], grid);
}

void quantize_pixels(const QuantizeRow& row, const ActivationGrid& grid) {
  for (int64_t x = 0; x < row.count; ++x)
    for (int64_t c = 0; c < row.channels; ++c)
      row.out[x * row.pitch + c] = quantize_value(row.x[x * row.channels + c], grid);
}

void dequantize_planar(const DequantizeRow& row) {
  for (int64_t c = 0; c < row.channels; ++c)
    for (int64_t x = 0; x < row.count; ++x)
      row.out[c * row.plane + x] =
          dequantize_value(row.in[x * row.pitch + c], row.scale, row.zero_point);
}

void dequantize_row(const uint8_t* q, int64_t n, float scale, int32_t zero_point, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = dequantize_value(q[i], scale, zero_point);
}

void blend_columns(const float* row, const int32_t* low, const int32_t* high, const float* part,
                   int64_t n, float* out) {
  for (int64_t x = 0; x < n; ++x)
    out[x] = std::fmaf(part[x], row[high[x]] - row[low[x]], row[low[x]]);
}

void blend_rows(const float* top, const float* bottom, float part, int64_t n, float* out) {
  for (int64_t x = 0; x < n; ++x)
    out[x] = std::fmaf(part, bottom[x] - top[x], top[x]);
}

void fma_values(const float* a, const float* b, const float* c, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = std::fmaf(a[i], b[i], c[i]);
}

void softmax(const float* in, int64_t channels, int64_t stride, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    float top = in[i];
    for (int64_t c = 1; c < channels; ++c)
      top = max_x86(in[c * stride + i], top);
    double sum = 0.0;
    for (int64_t c = 0; c < channels; ++c) {
      const float e = softmax_exp(in[c * stride + i] - top);
      out[c * stride + i] = e;
      sum += static_cast<double>(e);
    }
    const auto factor = static_cast<float>(1.0 / sum);
    for (int64_t c = 0; c < channels; ++c)
      out[c * stride + i] *= factor;
  }
}

int32_t at(const BlockedSums& s, int64_t i) { return *s.at(i) + s.term; }

int32_t softmax_levels(const SoftmaxLevels& row) {
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < row.sums.count; ++j) {
    const float mask = row.mask == nullptr ? 0.0f : row.mask[j];
    row.scores[j] = attention_score(at(row.sums, j) + row.terms[j], row.scale, mask);
    top = max_x86(row.scores[j], top);
  }
  int32_t total = 0;
  for (int64_t j = 0; j < (row.sums.count + 15) / 16 * 16; ++j) {
    const int32_t value = j < row.sums.count ? attention_level(row.scores[j], top) : 0;
    row.levels[j] = static_cast<uint8_t>(value);
    total += value;
  }
  return total;
}

void scale_sums(const BlockedSums& sums, float factor, bool, const U8Finish& finish, uint8_t* out) {
  for (int64_t i = 0; i < sums.count; ++i)
    out[i] = level(static_cast<float>(at(sums, i)) * factor, finish);
}

void function(const FloatFunctionSpec& spec, const float* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = float_function(in[i], spec);
}

void combine(FloatPair pair, const float* a, const float* b, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = float_pair(a[i], b[i], pair);
}

void line_floats(const float* in, float slope, float offset, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = std::fmaf(in[i], slope, offset);
}

void normalize_floats(const LayerNormSpec& spec, double mean, float factor, const uint8_t* in,
                      int64_t n, float* out) {
  for (int64_t c = 0; c < n; ++c)
    out[c] = layer_norm_value(in[c], c, {mean, factor}, spec);
}

void multiply_floats(const FloatProduct& p) {
  for (int r = 0; r < p.rows; ++r)
    for (int64_t j = 0; j < p.columns; ++j) {
      const float* a = p.a + r * p.a_row;
      const float* b = p.b + j / kFloatColumns * p.b_block + j % kFloatColumns;
      float sum = 0.0f;
      for (int64_t k = 0; k < p.terms; ++k)
        sum = std::fmaf(a[k * p.a_term], b[k * p.b_term], sum);
      p.c[r * p.c_row + j] += sum;
    }
}

void recurrent_cell(const RecurrentCell& a) {
  const int64_t gates = recurrent_gates(a.kind);
  for (int64_t j = 0; j < a.hidden; ++j) {
    float x[4], y[4];
    for (int64_t g = 0; g < gates; ++g) {
      const int64_t o = g * a.hidden + j;
      x[g] = a.products[o];
      y[g] = conv_value(a.sums[o] + a.correction[o], a.scale[o], a.bias[o]);
    }
    if (a.kind == RecurrentKind::Lstm)
      a.state[j] = lstm_unit(x, y, a.cell[j]);
    else if (a.kind == RecurrentKind::Gru)
      a.state[j] = gru_unit(x, y, a.state[j]);
    else
      a.state[j] = plain_unit(a.kind, x[0], y[0]);
    a.levels[j] = level(a.state[j], a.finish);
  }
}

void add_group(const GroupSums& a) {
  for (int r = 0; r < a.rows; ++r)
    for (int64_t j = 0; j < a.columns; ++j) {
      float& y = a.reals[r * a.real_row + j];
      y = add_part(a.sums[r * a.sum_row + j] - a.zero * a.totals[j], a.scale[j], a.step, y);
    }
}

void finish_floats(const float* y, int64_t n, const U8Finish& finish, uint8_t* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = level(y[i], finish);
}

#include "cpu/isa/shared/image_table.inl"

}  // namespace

const ImageKernels kScalarImage = kImage;

}  // namespace adalayer::cpu

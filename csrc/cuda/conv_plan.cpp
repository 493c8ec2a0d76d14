#include "cuda/conv_plan.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/thread_pool.hpp"
#include "cuda/conv_sparse.hpp"
#include "cuda/packing.hpp"
#include "cuda/plan.hpp"
#include "formats/canonical.hpp"

namespace adalayer::cuda {

namespace {

// Weights are multiplied as if they had 8 bits: above this many products int32 could overflow.
constexpr int64_t kMostProducts = ((int64_t{1} << 31) - 1) / (255 * 128);

/// One axis of a convolution's kernel as a product sees it: which kernel positions take part, and
/// where they read.
struct Taps {
  std::vector<int32_t> kernel;  // position in the kernel
  std::vector<int16_t> at;      // position * stride + at = input coordinate
  int32_t stride = 1, positions = 0, step = 1, phase = 0;
};

bool fits(int64_t tap) { return tap >= -30000 && tap <= 30000; }

/// One axis of a product; false where it has too many taps.
bool forward_taps(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t out,
                  Taps& t) {
  if (kernel > kMaxTaps || !fits(kernel * dilation) || !fits(pad)) return false;
  for (int64_t k = 0; k < kernel; ++k) {
    t.kernel.push_back(static_cast<int32_t>(k));
    t.at.push_back(static_cast<int16_t>(k * dilation - pad));
  }
  t.stride = static_cast<int32_t>(stride);
  t.positions = static_cast<int32_t>(out);
  return true;
}

/// Output coordinates phase, phase + stride, ... of a transposed convolution collect the inputs
/// j + at for the kernel positions with phase + pad - k * dilation = at * stride.
bool phase_taps(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t out,
                int64_t phase, Taps& t) {
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t at = phase + pad - k * dilation;
    if (at % stride != 0) continue;
    if (!fits(at / stride)) return false;
    t.kernel.push_back(static_cast<int32_t>(k));
    t.at.push_back(static_cast<int16_t>(at / stride));
  }
  t.positions = out > phase ? static_cast<int32_t>((out - phase + stride - 1) / stride) : 0;
  t.step = static_cast<int32_t>(stride);
  t.phase = static_cast<int32_t>(phase);
  return t.kernel.size() <= static_cast<size_t>(kMaxTaps);
}

/// Weights [O][I / groups][KH][KW].
struct Weights {
  std::vector<int8_t> w;
  int64_t group_in, kh, kw;
  int8_t at(int64_t o, int64_t c, int64_t ky, int64_t kx) const {
    return w[((o * group_in + c) * kh + ky) * kw + kx];
  }
};

/// Groups taken together so that a group's channels fill whole pieces; weights between channels of
/// different original groups are zero. 0: there is no such number.
int64_t merged_groups(int64_t groups, int64_t group_in) {
  for (int64_t m = 1; m <= groups; ++m) {
    if (groups % m != 0 || m * group_in > 256) continue;
    if (m == groups || m * group_in % 16 == 0) return m;
  }
  return 0;
}

class ProductBuilder {
 public:
  ProductBuilder(const ConvSource& s, const Weights& w, int bits, ImageBuilder& image)
      : s_(s), w_(w), bits_(bits), image_(image) {}

  /// False where the product kernels cannot do it.
  bool build(ConvPlan& plan) {
    const engine::ConvAttributes& a = s_.a;
    if (w_.group_in * a.kernel_h * a.kernel_w > kMostProducts) return false;
    merge_ = a.groups == 1 ? 1 : merged_groups(a.groups, w_.group_in);
    if (merge_ == 0) return false;
    const int64_t groups = a.groups / merge_;
    pitch_ = device_pitch(s_.in_c);
    // With one group left its channels may have the whole pixel, padding included.
    span_ = groups == 1 ? pitch_ : merge_ * w_.group_in;
    if (groups > 1 && span_ % 16 != 0) return false;

    std::vector<std::pair<Taps, Taps>> phases;
    bool whole = false;
    if (s_.transposed) {
      for (int64_t py = 0; py < std::min<int64_t>(a.stride_h, s_.out_h); ++py)
        for (int64_t px = 0; px < std::min<int64_t>(a.stride_w, s_.out_w); ++px) {
          Taps y, x;
          if (!phase_taps(a.kernel_h, a.stride_h, a.pad_top, a.dilation_h, s_.out_h, py, y) ||
              !phase_taps(a.kernel_w, a.stride_w, a.pad_left, a.dilation_w, s_.out_w, px, x))
            return false;
          phases.emplace_back(std::move(y), std::move(x));
        }
      if (phases.size() > 64) return false;
    } else {
      whole = groups == 1 && a.kernel_h == s_.in_h && a.kernel_w == s_.in_w && s_.out_h == 1 &&
              s_.out_w == 1 && a.pad_top == 0 && a.pad_left == 0 && a.dilation_h == 1 &&
              a.dilation_w == 1;
      Taps y, x;
      if (whole) {
        y.kernel = x.kernel = {0};
        y.at = x.at = {0};
        y.positions = x.positions = 1;
      } else if (!forward_taps(a.kernel_h, a.stride_h, a.pad_top, a.dilation_h, s_.out_h, y) ||
                 !forward_taps(a.kernel_w, a.stride_w, a.pad_left, a.dilation_w, s_.out_w, x)) {
        return false;
      }
      phases.emplace_back(std::move(y), std::move(x));
    }
    for (const auto& [y, x] : phases)
      if (y.positions > 0 && x.positions > 0) add(plan, y, x, whole);
    plan.kind = ConvKind::Products;
    return true;
  }

 private:
  /// Weight of output channel `o` of (merged) group `g` at tap (ky, kx) and channel `c` of the
  /// group's span.
  int8_t weight(int64_t g, int64_t o, int64_t ky, int64_t kx, int64_t c) const {
    const int64_t group_out = s_.out_c / s_.a.groups;
    const int64_t own = c / w_.group_in;  // which of the merged groups
    if (own >= merge_ || own != o / group_out) return 0;
    return w_.at(g * merge_ * group_out + o, c % w_.group_in, ky, kx);
  }

  /// A piece of the reduction.
  struct Entry {
    int32_t ky, kx, y, x;  // taps of the kernel, and their numbers here
    int32_t channel;
    int32_t offset;
  };

  void add(ConvPlan& plan, const Taps& y, const Taps& x, bool whole) {
    ProductPlan p = geometry(y, x, whole);
    const std::vector<Entry> entries = reduction(p, y, x, whole);
    const auto bytes = static_cast<int64_t>(entries.size()) * p.piece;
    p.depth = static_cast<int32_t>((bytes + 31) / 32 * 32);
    p.steps = static_cast<int32_t>((bytes + kStepDepth - 1) / kStepDepth);

    // Pieces behind the last one name a tap that no position has.
    std::vector<int32_t> pieces(static_cast<size_t>(p.steps) * (kStepDepth / p.piece) * 2);
    for (size_t k = 0; k < pieces.size() / 2; ++k) {
      const bool there = k < entries.size();
      pieces[2 * k] = there ? entries[k].offset : 0;
      pieces[2 * k + 1] = there ? entries[k].y | entries[k].x << 8 : kMaxTaps | kMaxTaps << 8;
    }
    p.pieces = image_.add(pieces);
    const std::vector<uint8_t> page(16, static_cast<uint8_t>(s_.input_zero_point));
    p.zero_page = image_.add(page);

    std::vector<int64_t> totals(static_cast<size_t>(s_.out_c), 0);
    const ProductMatrix m = matrix(p, entries, totals);
    std::vector<ChannelConstants> constants(static_cast<size_t>(s_.out_c) + kBlockChannels);
    for (int64_t o = 0; o < s_.out_c; ++o)
      constants[o] = {s_.scale[o], s_.bias[o],
                      static_cast<int32_t>(-s_.input_zero_point * totals[o]), 0};
    const std::vector<uint8_t> packed = pack(p, m);
    p.channels = image_.add(constants);
    p.weights = image_.add(packed);
    plan.weight_bytes += static_cast<int64_t>(packed.size());
    plan.weight_bytes += add_blocks(m, pieces, p, image_);
    plan.weight_bytes += add_structured(m, p, image_);
    plan.products.push_back(std::move(p));
  }

  ProductPlan geometry(const Taps& y, const Taps& x, bool whole) const {
    ProductPlan p;
    p.groups = static_cast<int32_t>(s_.a.groups / merge_);
    p.group_out = s_.out_c / p.groups;
    p.piece = span_ % 16 == 0 ? 16 : span_ % 8 == 0 ? 8 : 4;
    // Few input channels: the product is what takes the time, not the weights.
    p.bits = p.piece == 16 ? bits_ : 8;
    p.shift = p.bits == 8 ? 0 : 8 - p.bits;
    p.group_in_bytes = static_cast<int32_t>(p.groups == 1 ? 0 : span_);
    p.plane_h = y.positions;
    p.plane_w = x.positions;
    p.in_h = whole ? 1 : s_.in_h;
    p.in_w = whole ? 1 : s_.in_w;
    p.in_pixel_bytes = static_cast<int32_t>(whole ? pitch_ * s_.in_h * s_.in_w : pitch_);
    p.in_row_bytes = static_cast<int32_t>(pitch_ * s_.in_w);
    p.stride_y = y.stride;
    p.stride_x = x.stride;
    p.tap_y = y.at;
    p.tap_x = x.at;
    p.step_y = y.step;
    p.step_x = x.step;
    p.phase_y = y.phase;
    p.phase_x = x.phase;
    p.vector_store = p.groups == 1 || p.group_out % 8 == 0;
    return p;
  }

  /// Tap by tap; `whole` has one tap, whose channels are pixels' bytes.
  std::vector<Entry> reduction(const ProductPlan& p, const Taps& y, const Taps& x,
                               bool whole) const {
    std::vector<Entry> entries;
    const auto add_entries = [&](int32_t ky, int32_t kx, int32_t ny, int32_t nx, int64_t offset) {
      for (int64_t c = 0; c < span_; c += p.piece)
        entries.push_back(
            {ky, kx, ny, nx, static_cast<int32_t>(c), static_cast<int32_t>(offset + c)});
    };
    if (whole) {
      for (int32_t ky = 0; ky < s_.a.kernel_h; ++ky)
        for (int32_t kx = 0; kx < s_.a.kernel_w; ++kx)
          add_entries(ky, kx, 0, 0, (ky * s_.a.kernel_w + kx) * pitch_);
      return entries;
    }
    for (size_t ny = 0; ny < y.at.size(); ++ny)
      for (size_t nx = 0; nx < x.at.size(); ++nx)
        add_entries(y.kernel[ny], x.kernel[nx], static_cast<int32_t>(ny), static_cast<int32_t>(nx),
                    static_cast<int64_t>(y.at[ny]) * p.in_row_bytes +
                        static_cast<int64_t>(x.at[nx]) * p.in_pixel_bytes);
    return entries;
  }

  /// Weights of every output channel in the order of the reduction, and their totals.
  ProductMatrix matrix(const ProductPlan& p, const std::vector<Entry>& entries,
                       std::vector<int64_t>& totals) const {
    ProductMatrix m;
    m.columns = static_cast<int64_t>(entries.size()) * p.piece;
    m.w.resize(static_cast<size_t>(s_.out_c * m.columns));
    parallel_for(int64_t{s_.out_c}, default_threads(), [&](int64_t o, int) {
      int8_t* row = m.w.data() + o * m.columns;
      for (int64_t k = 0; k < m.columns; ++k) {
        const Entry& e = entries[k / p.piece];
        row[k] = weight(o / p.group_out, o % p.group_out, e.ky, e.kx, e.channel + k % p.piece);
        totals[o] += row[k];
      }
    });
    return m;
  }

  /// The dense form; its sizes go into `p`.
  static std::vector<uint8_t> pack(ProductPlan& p, const ProductMatrix& m) {
    p.cells = cells_of(p.group_out);
    const int64_t cell_bytes = int64_t{kCellBytesPerBit} * p.bits;
    p.group_weight_bytes = int64_t{p.steps} * p.cells * 2 * cell_bytes;
    std::vector<uint8_t> packed(static_cast<size_t>(p.group_weight_bytes) * p.groups, 0);
    parallel_for(int64_t{p.groups} * p.cells, default_threads(), [&](int64_t task, int) {
      const int64_t g = task / p.cells, cell = task % p.cells;
      for (int row = 0; row < kCellChannels; ++row) {
        const int64_t o = cell_channel(p.group_out, cell, row);
        if (o >= p.group_out) continue;
        const int8_t* w = m.row(g * p.group_out + o);
        for (int64_t k = 0; k < m.columns; ++k) {
          if (w[k] == 0) continue;
          uint8_t* to =
              packed.data() + g * p.group_weight_bytes +
              ((k / kStepDepth * p.cells + cell) * 2 + k % kStepDepth / kCellDepth) * cell_bytes;
          put_weight(to, p.bits, row, static_cast<int>(k % kCellDepth), w[k]);
        }
      }
    });
    return packed;
  }

  const ConvSource& s_;
  const Weights& w_;
  const int bits_;
  ImageBuilder& image_;
  int64_t merge_ = 1, pitch_ = 0, span_ = 0;
};

void plan_depthwise(const ConvSource& s, const Weights& w, ImageBuilder& image, ConvPlan& plan) {
  const int64_t pitch = device_pitch(s.in_c), taps = w.kh * w.kw;
  std::vector<int8_t> packed(static_cast<size_t>(taps * pitch), 0);
  std::vector<ChannelConstants> constants(static_cast<size_t>(pitch) + kBlockChannels);
  for (int64_t c = 0; c < s.in_c; ++c) {
    int64_t total = 0;
    for (int64_t t = 0; t < taps; ++t) {
      packed[t * pitch + c] = w.w[c * taps + t];
      total += w.w[c * taps + t];
    }
    constants[c] = {s.scale[c], s.bias[c], static_cast<int32_t>(-s.input_zero_point * total), 0};
  }
  plan.kind = ConvKind::Depthwise;
  plan.weights = image.add(packed);
  plan.channels = image.add(constants);
  plan.weight_bytes = static_cast<int64_t>(packed.size());
}

void plan_direct(const ConvSource& s, const Weights& w, ImageBuilder& image, ConvPlan& plan) {
  std::vector<int8_t> turned(w.w.size());
  size_t next = 0;
  for (int64_t o = 0; o < s.out_c; ++o)
    for (int64_t ky = 0; ky < w.kh; ++ky)
      for (int64_t kx = 0; kx < w.kw; ++kx)
        for (int64_t c = 0; c < w.group_in; ++c)
          turned[next++] = w.at(o, c, ky, kx);
  std::vector<ChannelConstants> constants(static_cast<size_t>(s.out_c) + kBlockChannels);
  for (int64_t o = 0; o < s.out_c; ++o)
    constants[o] = {s.scale[o], s.bias[o], 0, 0};
  plan.kind = ConvKind::Direct;
  plan.weights = image.add(turned);
  plan.channels = image.add(constants);
  plan.weight_bytes = static_cast<int64_t>(turned.size());
}

}  // namespace

int64_t ImageBuilder::add(const void* data, size_t bytes) {
  const size_t at = (bytes_.size() + 127) / 128 * 128;
  bytes_.resize(at + bytes);
  if (bytes > 0) std::memcpy(bytes_.data() + at, data, bytes);
  return static_cast<int64_t>(at);
}

const char* ConvPlan::name() const {
  switch (kind) {
    case ConvKind::Products:
      return "tensor cores";
    case ConvKind::Depthwise:
      return "depthwise";
    default:
      return "direct";
  }
}

ConvPlan plan_conv(const ConvSource& s, ImageBuilder& image) {
  const formats::CanonicalHeader header = formats::read_header(*s.packed);
  const Weights w{formats::unpack_canonical(*s.packed), header.group_in, header.kernel_h,
                  header.kernel_w};
  ConvPlan plan;
  plan.bits = header.bits;
  const bool depthwise =
      !s.transposed && s.a.groups > 1 && s.a.groups == s.in_c && s.in_c == s.out_c;
  if (depthwise)
    plan_depthwise(s, w, image, plan);
  else if (!ProductBuilder(s, w, header.bits, image).build(plan))
    plan_direct(s, w, image, plan);
  return plan;
}

}  // namespace adalayer::cuda

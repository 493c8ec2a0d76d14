// Both products of attention are of levels on both sides, which differ with every image: operands
// relative to their zero points fit int16, and the kernels that multiply Winograd's factors in
// pairs of int16 are exact for them. A few queries at a time meet all keys of a head, so that their
// scores stay in the second-level cache.
#include "cpu/image/attention.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/image/rows.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {
namespace {

constexpr int64_t kGroup = kWinogradGroup;
constexpr int64_t kQueries = 24;  // of a block: whole passes of every row's kernel

struct ForKeys {};
struct ForValues {};
struct ForQueries {};
struct ForScores {};
struct ForSums {};
struct ForLevels {};

int64_t groups_of(int64_t n) { return (n + kGroup - 1) / kGroup; }
int64_t pairs_of(int64_t n) { return (n + 1) / 2; }

struct Tokens {
  ConstImageView image;
  bool rows;  // each is a sequence

  const uint8_t* at(int64_t sequence, int64_t token) const {
    const int64_t w = image.layout->w;
    return rows ? image.pixel(sequence, token) : image.pixel(token / w, token % w);
  }
};

/// Products of [rows][pairs][2] with [pairs][16][2], the sums [rows][16].
void multiply(const WinogradProductArgs& a) {
  if (const KernelRow* row = active_kernels()) return row->winograd->multiply(a);
  const auto* taps = reinterpret_cast<const int16_t*>(a.taps);
  for (int r = 0; r < a.rows; ++r)
    for (int64_t o = 0; o < kGroup; ++o) {
      int32_t sum = 0;
      for (int64_t p = 0; p < 2 * a.pairs; ++p)
        sum += a.factors[r * a.factor_stride + p] * taps[(p / 2 * kGroup + o) * 2 + p % 2];
      a.products[r * kGroup + o] = sum;
    }
}

/// Every group of 16 columns times the same rows; sums [group][rows][16].
void multiply_groups(const int16_t* factors, int64_t stride, const int16_t* panels,
                     int64_t panel_pairs, int64_t pairs, int64_t rows, int64_t groups,
                     int32_t* sums) {
  for (int64_t g = 0; g < groups; ++g)
    multiply({.factors = factors,
              .factor_stride = stride,
              .taps = reinterpret_cast<const uint8_t*>(panels + g * panel_pairs * kGroup * 2),
              .group_bytes = 0,
              .narrow = false,
              .pairs = pairs,
              .rows = static_cast<int>(rows),
              .groups = 1,
              .products = sums + g * rows * kGroup});
}

/// One head of a sequence, its keys and values in the order of the products.
class Head {
 public:
  Head(const AttentionShape& n, const AttentionSpec& s, const Tokens& q, const Tokens& k,
       const Tokens& v)
      : n_(n),
        s_(s),
        q_(q),
        k_(k),
        v_(v),
        keys_(thread_scratch<int16_t, ForKeys>(groups_of(n.keys) * kGroup * key_stride())),
        values_(thread_scratch<int16_t, ForValues>(groups_of(n.width) * kGroup * value_stride())),
        queries_(thread_scratch<int16_t, ForQueries>(kQueries * key_stride())),
        sums_(thread_scratch<int32_t, ForSums>(
            kQueries * kGroup * std::max(groups_of(n.keys), groups_of(n.width)))),
        scores_(thread_scratch<float, ForScores>(groups_of(n.keys) * kGroup)),
        levels_(thread_scratch<int16_t, ForLevels>(kQueries * level_stride())) {}

  void load(int64_t sequence, int64_t head) {
    sequence_ = sequence;
    head_ = head;
    const int64_t shared = n_.key_head(head), pairs = pairs_of(n_.depth);
    for (int64_t j = 0; j < groups_of(n_.keys) * kGroup; ++j) {
      int16_t* to = keys_ + j / kGroup * kGroup * key_stride() + j % kGroup * 2;
      if (j >= n_.keys) {
        for (int64_t p = 0; p < pairs; ++p)
          to[p * kGroup * 2] = to[p * kGroup * 2 + 1] = 0;
        continue;
      }
      const uint8_t* from = k_.at(sequence, j) + shared * n_.depth;
      for (int64_t c = 0; c < 2 * pairs; ++c)
        to[c / 2 * kGroup * 2 + c % 2] =
            c < n_.depth ? static_cast<int16_t>(from[c] - s_.zero_k) : int16_t{0};
    }
    for (int64_t j = 0; j < value_stride(); ++j) {
      const uint8_t* from =
          j < n_.keys ? v_.at(sequence, j) + shared * n_.width : nullptr;
      for (int64_t c = 0; c < groups_of(n_.width) * kGroup; ++c)
        values_[c / kGroup * kGroup * value_stride() + (j / 2 * kGroup + c % kGroup) * 2 + j % 2] =
            from != nullptr && c < n_.width ? static_cast<int16_t>(from[c] - s_.zero_v)
                                            : int16_t{0};
    }
  }

  /// Queries [first, first + rows): calls store(query, sums, factor) for each.
  template <class Store>
  void run(int64_t first, int64_t rows, const Store& store) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* from = q_.at(sequence_, first + r) + head_ * n_.depth;
      for (int64_t c = 0; c < key_stride(); ++c)
        queries_[r * key_stride() + c] =
            c < n_.depth ? static_cast<int16_t>(from[c] - s_.zero_q) : int16_t{0};
    }
    const int64_t met = attended_keys(n_, s_, first + rows - 1);  // by the last of them
    multiply_groups(queries_, key_stride(), keys_, pairs_of(n_.depth), pairs_of(n_.depth), rows,
                    groups_of(met), sums_);
    const ImageKernels& kernels = image_kernels();
    float factors[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t own = attended_keys(n_, s_, first + r);
      int16_t* levels = levels_ + r * level_stride();
      const int32_t total =
          kernels.softmax_levels({{sums_ + r * kGroup, rows * kGroup, own},
                                  s_.scale,
                                  mask_row(n_, s_, sequence_, head_, first + r),
                                  scores_,
                                  levels});
      std::fill(levels + groups_of(own) * kGroup, levels + groups_of(met) * kGroup, int16_t{0});
      factors[r] = attention_factor(total, s_.value_scale);
    }
    multiply_groups(levels_, level_stride(), values_, pairs_of(n_.keys), pairs_of(met), rows,
                    groups_of(n_.width), sums_);
    for (int64_t r = 0; r < rows; ++r)
      store(first + r, BlockedSums{sums_ + r * kGroup, rows * kGroup, n_.width}, factors[r]);
  }

 private:
  int64_t key_stride() const { return 2 * pairs_of(n_.depth); }
  int64_t value_stride() const { return 2 * pairs_of(n_.keys); }
  int64_t level_stride() const { return groups_of(n_.keys) * kGroup; }

  const AttentionShape& n_;
  const AttentionSpec& s_;
  Tokens q_, k_, v_;
  int16_t *keys_, *values_, *queries_;
  int32_t* sums_;
  float* scores_;
  int16_t* levels_;
  int64_t sequence_ = 0, head_ = 0;
};

/// The part's share of all blocks of queries: calls store(sequence, head, query, sums, factor).
template <class Store>
void each_query(const AttentionShape& n, const AttentionSpec& s, ConstImageView q, ConstImageView k,
                ConstImageView v, Part part, const Store& store) {
  const bool rows = n.sequences > 1;
  const int64_t blocks = (n.queries + kQueries - 1) / kQueries;
  const int64_t units = n.sequences * n.heads * blocks;
  Head head(n, s, {q, rows}, {k, rows}, {v, rows});
  int64_t loaded = -1;
  for (int64_t unit = part.first(units); unit < part.last(units); ++unit) {
    const int64_t which = unit / blocks, first = unit % blocks * kQueries;
    if (which != loaded) head.load(which / n.heads, which % n.heads);
    loaded = which;
    head.run(first, std::min(kQueries, n.queries - first),
             [&](int64_t query, const BlockedSums& sums, float factor) {
               store(which / n.heads, which % n.heads, query, sums, factor);
             });
  }
}

}  // namespace

int64_t attention_parts(const AttentionShape& n) {
  return n.sequences * n.heads * ((n.queries + kQueries - 1) / kQueries);
}

double attention_scratch(const AttentionShape& n) {
  const auto keys = static_cast<double>(groups_of(n.keys) * kGroup);
  const auto width = static_cast<double>(groups_of(n.width) * kGroup);
  const auto depth = static_cast<double>(n.depth + 1);
  return 2.0 * keys * depth + 2.0 * width * (keys + 1.0) + 2.0 * kQueries * (depth + keys) +
         4.0 * kQueries * std::max(keys, width) + 4.0 * keys;
}

void attention(const AttentionShape& n, const AttentionSpec& s, ConstImageView q, ConstImageView k,
               ConstImageView v, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const int64_t w = out.layout->w;
  // A row's values are averages of V's, whatever their weights.
  const bool bounded = is_bounded(256.0 * std::fabs(static_cast<double>(s.value_scale)), s.finish);
  each_query(n, s, q, k, v, part,
             [&](int64_t sequence, int64_t head, int64_t query, const BlockedSums& sums, float f) {
               uint8_t* pixel = n.sequences > 1 ? out.pixel(sequence, query)
                                                : out.pixel(query / w, query % w);
               kernels.scale_sums(sums, f, bounded, s.finish, pixel + head * n.width);
             });
}

void attention_f32(const AttentionShape& n, const AttentionSpec& s, ConstImageView q,
                   ConstImageView k, ConstImageView v, float* out, Part part) {
  each_query(n, s, q, k, v, part,
             [&](int64_t sequence, int64_t head, int64_t query, const BlockedSums& sums, float f) {
               float* to = out + ((sequence * n.queries + query) * n.heads + head) * n.width;
               for (int64_t c = 0; c < n.width; ++c)
                 to[c] = static_cast<float>(sums.sums[c / kGroup * sums.block + c % kGroup]) * f;
             });
}

}  // namespace adalayer::cpu

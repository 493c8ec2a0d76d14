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
struct ForMasks {};

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

/// The pairs of one column of a panel, from a row of levels; zeros for none.
void spread_pairs(const uint8_t* from, int64_t count, int32_t zero, int16_t* to) {
  const int64_t whole = from == nullptr ? 0 : count / 2;
  for (int64_t p = 0; p < whole; ++p) {
    to[p * kGroup * 2] = static_cast<int16_t>(from[2 * p] - zero);
    to[p * kGroup * 2 + 1] = static_cast<int16_t>(from[2 * p + 1] - zero);
  }
  for (int64_t p = whole; p < pairs_of(count); ++p) {
    to[p * kGroup * 2] =
        from == nullptr ? int16_t{0} : static_cast<int16_t>(from[count - 1] - zero);
    to[p * kGroup * 2 + 1] = 0;
  }
}

/// One pair of every column of a panel, from two rows of levels, of which the second may be none.
void interleave(const uint8_t* first, const uint8_t* second, int64_t count, int32_t zero,
                int16_t* to) {
  if (count == kGroup && second != nullptr) {
    for (int64_t c = 0; c < kGroup; ++c) {
      to[2 * c] = static_cast<int16_t>(first[c] - zero);
      to[2 * c + 1] = static_cast<int16_t>(second[c] - zero);
    }
    return;
  }
  for (int64_t c = 0; c < kGroup; ++c) {
    to[2 * c] = c < count ? static_cast<int16_t>(first[c] - zero) : int16_t{0};
    const bool both = c < count && second != nullptr;
    to[2 * c + 1] = both ? static_cast<int16_t>(second[c] - zero) : int16_t{0};
  }
}

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
        sums_(thread_scratch<int32_t, ForSums>(kQueries * kGroup *
                                               std::max(groups_of(n.keys), groups_of(n.width)))),
        scores_(thread_scratch<float, ForScores>(groups_of(n.keys) * kGroup)),
        levels_(thread_scratch<int16_t, ForLevels>(kQueries * level_stride())) {}

  void load(int64_t sequence, int64_t head) {
    sequence_ = sequence;
    head_ = head;
    const int64_t shared = n_.key_head(head);
    for (int64_t j = 0; j < groups_of(n_.keys) * kGroup; ++j) {
      int16_t* to = keys_ + j / kGroup * kGroup * key_stride() + j % kGroup * 2;
      const uint8_t* from = j < n_.keys ? k_.at(sequence, j) + shared * n_.depth : nullptr;
      spread_pairs(from, n_.depth, s_.zero_k, to);
    }
    for (int64_t j = 0; j < n_.keys; j += 2) {
      const uint8_t* first = v_.at(sequence, j) + shared * n_.width;
      const uint8_t* second =
          j + 1 < n_.keys ? v_.at(sequence, j + 1) + shared * n_.width : nullptr;
      for (int64_t c = 0; c < n_.width; c += kGroup)
        interleave(first + c, second == nullptr ? nullptr : second + c,
                   std::min(kGroup, n_.width - c), s_.zero_v,
                   values_ + c * value_stride() + j * kGroup);
    }
  }

  /// Queries [first, first + rows): calls store(query, sums, factor) for each.
  template <class Store>
  void run(int64_t first, int64_t rows, const Store& store) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* from = q_.at(sequence_, first + r) + head_ * n_.depth;
      int16_t* to = queries_ + r * key_stride();
      for (int64_t c = 0; c < n_.depth; ++c)
        to[c] = static_cast<int16_t>(from[c] - s_.zero_q);
      if (n_.depth % 2 == 1) to[n_.depth] = 0;
    }
    const int64_t met = attended_keys(n_, s_, first + rows - 1);  // by the last of them
    multiply_groups(queries_, key_stride(), keys_, pairs_of(n_.depth), pairs_of(n_.depth), rows,
                    groups_of(met), sums_);
    const ImageKernels& kernels = image_kernels();
    float factors[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t own = attended_keys(n_, s_, first + r);
      int16_t* levels = levels_ + r * level_stride();
      const int32_t total = kernels.softmax_levels({{sums_ + r * kGroup, rows * kGroup, own},
                                                    s_.scale,
                                                    mask_of(first + r),
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
  /// What is added to the scores of a query, or null.
  const float* mask_of(int64_t query) const {
    const float* row = mask_row(n_, s_, sequence_, head_, query);
    if (s_.keys == nullptr) return row;
    if (row == nullptr) return s_.keys;
    float* both = thread_scratch<float, ForMasks>(n_.keys);
    for (int64_t j = 0; j < n_.keys; ++j)
      both[j] = mask_value(row, s_.keys, j);
    return both;
  }

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
         4.0 * kQueries * std::max(keys, width) + 8.0 * keys;
}

void attention(const AttentionShape& n, const AttentionSpec& s, ConstImageView q, ConstImageView k,
               ConstImageView v, ImageView out, Part part) {
  const ImageKernels& kernels = image_kernels();
  const int64_t w = out.layout->w;
  // A row's values are averages of V's, whatever their weights.
  const bool bounded = is_bounded(256.0 * std::fabs(static_cast<double>(s.value_scale)), s.finish);
  each_query(n, s, q, k, v, part,
             [&](int64_t sequence, int64_t head, int64_t query, const BlockedSums& sums, float f) {
               uint8_t* pixel =
                   n.sequences > 1 ? out.pixel(sequence, query) : out.pixel(query / w, query % w);
               kernels.scale_sums(sums, f, bounded, s.finish, pixel + head * n.width);
             });
}

void attention_f32(const AttentionShape& n, const AttentionSpec& s, ConstImageView q,
                   ConstImageView k, ConstImageView v, const FloatTokens& out, Part part) {
  each_query(n, s, q, k, v, part,
             [&](int64_t sequence, int64_t head, int64_t query, const BlockedSums& sums, float f) {
               float* to = out.data + (sequence * n.queries + query) * out.token +
                           head * n.width * out.channel;
               for (int64_t c = 0; c < n.width; ++c)
                 to[c * out.channel] =
                     static_cast<float>(sums.sums[c / kGroup * sums.block + c % kGroup]) * f;
             });
}

}  // namespace adalayer::cpu

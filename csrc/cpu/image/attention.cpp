// A few queries at a time meet all keys of a head, so that their scores stay in the second-level
// cache.
#include "cpu/image/attention.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/image/attention_products.hpp"

namespace adalayer::cpu {
namespace {

struct ForScores {};
struct ForMasks {};

struct Tokens {
  ConstImageView image;
  bool rows;  // each is a sequence

  const uint8_t* at(int64_t sequence, int64_t token) const {
    const int64_t w = image.layout->w;
    return rows ? image.pixel(sequence, token) : image.pixel(token / w, token % w);
  }
};

/// One head of a sequence, its keys and values in the order of the products.
template <class Products>
class Head {
 public:
  Head(const AttentionShape& n, const AttentionSpec& s, const Tokens& q, const Tokens& k,
       const Tokens& v)
      : n_(n),
        s_(s),
        q_(q),
        k_(k),
        v_(v),
        products_(n, s),
        scores_(thread_scratch<float, ForScores>(blocks_of(n.keys, 16) * 16)) {}

  void load(int64_t sequence, int64_t head) {
    sequence_ = sequence;
    head_ = head;
    const int64_t shared = n_.key_head(head);
    const auto from = [&](const Tokens& tokens, int64_t channels) {
      return [&tokens, sequence, first = shared * channels](int64_t j) {
        return tokens.at(sequence, j) + first;
      };
    };
    products_.load(from(k_, n_.depth), from(v_, n_.width));
  }

  /// Queries [first, first + rows): calls store(query, sums, factor) for each.
  template <class Store>
  void run(int64_t first, int64_t rows, const Store& store) {
    for (int64_t r = 0; r < rows; ++r)
      products_.set_query(r, q_.at(sequence_, first + r) + head_ * n_.depth);
    const int64_t met = attended_keys(n_, s_, first + rows - 1);  // by the last of them
    products_.score(rows, met);
    const ImageKernels& kernels = image_kernels();
    int32_t totals[Products::kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t own = attended_keys(n_, s_, first + r);
      uint8_t* levels = products_.levels(r);
      totals[r] = kernels.softmax_levels({products_.scores(r, rows, own), products_.key_terms(),
                                          s_.scale, mask_of(first + r), scores_, levels});
      std::fill(levels + blocks_of(own, 16) * 16, levels + products_.level_stride(), uint8_t{0});
    }
    products_.weigh(rows, met);
    for (int64_t r = 0; r < rows; ++r)
      store(first + r, products_.values(r, rows, totals[r]),
            attention_factor(totals[r], s_.value_scale));
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

  const AttentionShape& n_;
  const AttentionSpec& s_;
  Tokens q_, k_, v_;
  Products products_;
  float* scores_;
  int64_t sequence_ = 0, head_ = 0;
};

/// The part's share of all blocks of queries: calls store(sequence, head, query, sums, factor).
template <class Products, class Store>
void each_query_of(const AttentionShape& n, const AttentionSpec& s, ConstImageView q,
                   ConstImageView k, ConstImageView v, Part part, const Store& store) {
  const bool rows = n.sequences > 1;
  const int64_t blocks = blocks_of(n.queries, Products::kQueries);
  const int64_t units = n.sequences * n.heads * blocks;
  Head<Products> head(n, s, {q, rows}, {k, rows}, {v, rows});
  int64_t loaded = -1;
  for (int64_t unit = part.first(units); unit < part.last(units); ++unit) {
    const int64_t which = unit / blocks, first = unit % blocks * Products::kQueries;
    if (which != loaded) head.load(which / n.heads, which % n.heads);
    loaded = which;
    head.run(first, std::min(Products::kQueries, n.queries - first),
             [&](int64_t query, const BlockedSums& sums, float factor) {
               store(which / n.heads, which % n.heads, query, sums, factor);
             });
  }
}

template <class Store>
void each_query(const AttentionShape& n, const AttentionSpec& s, ConstImageView q, ConstImageView k,
                ConstImageView v, Part part, const Store& store) {
  if (ByteProducts::suit(active_kernels(), n))
    each_query_of<ByteProducts>(n, s, q, k, v, part, store);
  else
    each_query_of<WordProducts>(n, s, q, k, v, part, store);
}

}  // namespace

int64_t attention_parts(const AttentionShape& n) {
  return n.sequences * n.heads * blocks_of(n.queries, WordProducts::kQueries);
}

double attention_scratch(const AttentionShape& n) {
  return std::max(WordProducts::scratch(n), ByteProducts::scratch(n));
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
                 to[c * out.channel] = static_cast<float>(*sums.at(c) + sums.term) * f;
             });
}

}  // namespace adalayer::cpu

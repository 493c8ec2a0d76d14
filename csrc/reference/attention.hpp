// Attention between levels: softmax(scale * (Q K^T) + mask) V for every head, in scalar form.
//
// Products of levels are added up as whole numbers, each level relative to its zero point. The
// softmax of a row is not rounded to a fixed grid: its largest weight gets level 255 and the others
// what they are beside it, and their sum of levels divides the row's values. So weights that are
// all alike keep eight bits each, however many there are.
#pragma once

#include "reference/image_spec.hpp"

namespace adalayer {

/// Sequences of tokens: all of one image, or one for each of its rows. Heads are equal shares of
/// the channels; with fewer heads of keys and values, neighbouring heads of queries share one.
struct AttentionShape {
  int64_t sequences = 1;  // rows of the image; 1 where the whole image is one sequence
  int64_t queries = 1, keys = 1;
  int64_t heads = 1, key_heads = 1;  // a multiple of key_heads
  int64_t depth = 1;                 // channels per head of queries and keys
  int64_t width = 1;                 // of values and of the result

  int64_t key_head(int64_t head) const { return head / (heads / key_heads); }
};

struct AttentionSpec {
  int32_t zero_q = 0, zero_k = 0, zero_v = 0;
  float scale = 1.0f;        // of a score: the grids' of Q and K, and the softmax's own
  float value_scale = 1.0f;  // of V's grid
  bool causal = false;       // a query meets the keys up to its own place
  // [sequences or 1][heads or 1][queries][keys], finite or -infinity; null for none.
  const float* mask = nullptr;
  int64_t mask_sequence = 0, mask_head = 0;  // elements from one to the next; 0 where all share
  // [keys], for all heads and queries of one sequence: the lower one of the two counts.
  const float* keys = nullptr;
  U8Finish finish;  // of a u8 result; has no table
};

/// Most products of two levels that one sum may have: 255^2 each.
constexpr int64_t kMostAttentionTerms = (int64_t{1} << 31) / (255 * 255) - 1;

/// Keys that a query meets.
inline int64_t attended_keys(const AttentionShape& n, const AttentionSpec& s, int64_t query) {
  return s.causal && query + 1 < n.keys ? query + 1 : n.keys;
}
/// The row of the mask, or null.
inline const float* mask_row(const AttentionShape& n, const AttentionSpec& s, int64_t sequence,
                             int64_t head, int64_t query) {
  if (s.mask == nullptr) return nullptr;
  return s.mask + sequence * s.mask_sequence + head * s.mask_head + query * n.keys;
}

/// What is added to the score of key j.
inline float mask_value(const float* row, const float* keys, int64_t j) {
  if (row == nullptr) return keys == nullptr ? 0.0f : keys[j];
  return keys == nullptr ? row[j] : min_x86(row[j], keys[j]);
}

inline float attention_score(int32_t sum, float scale, float mask) {
  return std::fmaf(static_cast<float>(sum), scale, mask);
}
/// 0 .. 255; `top` is the row's largest score. 0 where all are -infinity, and their difference NaN.
inline int32_t attention_level(float score, float top) {
  return round_even(softmax_exp(score - top) * 255.0f);
}
/// A row's values are (float)sum * factor, sum over keys of level * (v - zero_v). A row that meets
/// no key is zero.
inline float attention_factor(int32_t total, float value_scale) {
  return total == 0 ? 0.0f : value_scale / static_cast<float>(total);
}

namespace reference {

/// One image: levels in NCHW order, channels being [head][depth], positions [sequence][token].
/// Writes real values [heads * width][sequences * queries].
void attention(const AttentionShape& n, const AttentionSpec& s, const uint8_t* q, const uint8_t* k,
               const uint8_t* v, float* out);

}  // namespace reference
}  // namespace adalayer

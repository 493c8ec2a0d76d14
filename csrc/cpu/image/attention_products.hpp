// Both products of attention for one head: of levels on both sides, which differ with every image.
//
// WordProducts: levels relative to their zero points fit int16, and the kernels that multiply
// Winograd's factors in pairs of int16 are exact for them.
// ByteProducts, where a row multiplies u8 by s8 exactly: keys and values less 128 take the place of
// weights. With k' = k - 128, and the same of zero points,
//
//   sum (q - zq)(k' - zk') = sum q k' - zk' sum q - (zq sum k' - depth zq zk')
//   sum p (v' - zv')       = sum p v' - zv' sum p
//
// so that a key and a query have a term each, known before, that their sum lacks.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/image/rows.hpp"
#include "cpu/kernel_table.hpp"

namespace adalayer::cpu {

/// Blocks of so many that n takes.
inline int64_t blocks_of(int64_t n, int64_t of) { return (n + of - 1) / of; }

class WordProducts {
 public:
  static constexpr int64_t kQueries = 24;  // of a block: whole passes of every row's kernel
  static constexpr int64_t kGroup = kWinogradGroup;

  WordProducts(const AttentionShape& n, const AttentionSpec& s)
      : n_(n),
        s_(s),
        keys_(thread_scratch<int16_t, struct ForKeys>(blocks_of(n.keys, kGroup) * kGroup *
                                                      key_stride())),
        values_(thread_scratch<int16_t, struct ForValues>(blocks_of(n.width, kGroup) * kGroup *
                                                          value_stride())),
        queries_(thread_scratch<int16_t, struct ForQueries>(kQueries * key_stride())),
        words_(thread_scratch<int16_t, struct ForWords>(kQueries * level_stride())),
        levels_(thread_scratch<uint8_t, struct ForLevels>(kQueries * level_stride())),
        sums_(thread_scratch<int32_t, struct ForSums>(
            kQueries * kGroup * std::max(blocks_of(n.keys, kGroup), blocks_of(n.width, kGroup)))),
        terms_(thread_scratch<int32_t, struct ForTerms>(level_stride())) {
    std::fill_n(terms_, level_stride(), 0);
  }

  static double scratch(const AttentionShape& n) {
    const auto keys = static_cast<double>(blocks_of(n.keys, kGroup) * kGroup);
    const auto width = static_cast<double>(blocks_of(n.width, kGroup) * kGroup);
    const auto depth = static_cast<double>(n.depth + 1);
    return 2.0 * keys * depth + 2.0 * width * (keys + 1.0) + 2.0 * kQueries * (depth + 1.5 * keys) +
           4.0 * kQueries * std::max(keys, width) + 12.0 * keys;
  }

  /// at(j): the levels of token j.
  template <class At>
  void load(const At& key_at, const At& value_at) {
    for (int64_t j = 0; j < blocks_of(n_.keys, kGroup) * kGroup; ++j)
      spread_pairs(j < n_.keys ? key_at(j) : nullptr,
                   keys_ + j / kGroup * kGroup * key_stride() + j % kGroup * 2);
    for (int64_t j = 0; j < n_.keys; j += 2) {
      const uint8_t* first = value_at(j);
      const uint8_t* second = j + 1 < n_.keys ? value_at(j + 1) : nullptr;
      for (int64_t c = 0; c < n_.width; c += kGroup)
        interleave(first + c, second == nullptr ? nullptr : second + c,
                   std::min(kGroup, n_.width - c), values_ + c * value_stride() + j * kGroup);
    }
  }
  void set_query(int64_t r, const uint8_t* from) {
    int16_t* to = queries_ + r * key_stride();
    for (int64_t c = 0; c < n_.depth; ++c)
      to[c] = static_cast<int16_t>(from[c] - s_.zero_q);
    if (n_.depth % 2 == 1) to[n_.depth] = 0;
  }
  /// The sums of `rows` queries with the first `met` keys.
  void score(int64_t rows, int64_t met) {
    multiply(queries_, key_stride(), keys_, pairs_of(n_.depth), pairs_of(n_.depth), rows,
             blocks_of(met, kGroup));
  }
  BlockedSums scores(int64_t r, int64_t rows, int64_t count) const {
    return {sums_ + r * kGroup, rows * kGroup, 4, count, 0};
  }
  const int32_t* key_terms() const { return terms_; }
  /// Where the weights of query r belong, zeros behind them.
  uint8_t* levels(int64_t r) { return levels_ + r * level_stride(); }
  int64_t level_stride() const { return blocks_of(n_.keys, kGroup) * kGroup; }
  /// The values of `rows` queries, weighed by those.
  void weigh(int64_t rows, int64_t met) {
    std::copy_n(levels_, rows * level_stride(), words_);
    multiply(words_, level_stride(), values_, pairs_of(n_.keys), pairs_of(met), rows,
             blocks_of(n_.width, kGroup));
  }
  BlockedSums values(int64_t r, int64_t rows, int32_t) const {
    return {sums_ + r * kGroup, rows * kGroup, 4, n_.width, 0};
  }

 private:
  static int64_t pairs_of(int64_t n) { return (n + 1) / 2; }
  int64_t key_stride() const { return 2 * pairs_of(n_.depth); }
  int64_t value_stride() const { return 2 * pairs_of(n_.keys); }

  /// The pairs of one column of a panel, from a row of levels; zeros for none.
  void spread_pairs(const uint8_t* from, int16_t* to) const {
    const int64_t count = n_.depth, both = from == nullptr ? 0 : count / 2;
    for (int64_t p = 0; p < both; ++p) {
      to[p * kGroup * 2] = static_cast<int16_t>(from[2 * p] - s_.zero_k);
      to[p * kGroup * 2 + 1] = static_cast<int16_t>(from[2 * p + 1] - s_.zero_k);
    }
    for (int64_t p = both; p < pairs_of(count); ++p) {
      to[p * kGroup * 2] =
          from == nullptr ? int16_t{0} : static_cast<int16_t>(from[count - 1] - s_.zero_k);
      to[p * kGroup * 2 + 1] = 0;
    }
  }

  /// One pair of every column of a panel, from two rows of levels, of which the second may be none.
  void interleave(const uint8_t* first, const uint8_t* second, int64_t count, int16_t* to) const {
    const int32_t zero = s_.zero_v;
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

  /// Every group of 16 columns times the same rows; sums [group][rows][16].
  void multiply(const int16_t* factors, int64_t stride, const int16_t* panels, int64_t panel_pairs,
                int64_t pairs, int64_t rows, int64_t groups) {
    for (int64_t g = 0; g < groups; ++g)
      multiply_group(
          {.factors = factors,
           .factor_stride = stride,
           .taps = reinterpret_cast<const uint8_t*>(panels + g * panel_pairs * kGroup * 2),
           .group_bytes = 0,
           .narrow = false,
           .pairs = pairs,
           .rows = static_cast<int>(rows),
           .groups = 1,
           .products = sums_ + g * rows * kGroup});
  }
  static void multiply_group(const WinogradProductArgs& a) {
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

  const AttentionShape& n_;
  const AttentionSpec& s_;
  int16_t *keys_, *values_, *queries_, *words_;
  uint8_t* levels_;
  int32_t *sums_, *terms_;
};

class ByteProducts {
 public:
  static constexpr int64_t kQueries = kBlockRows;

  /// Rows whose products of all levels with all bytes are exact in their own order; what few keys
  /// gain is lost before and behind the products (windows of 49 tokens: nothing to 5 % slower; 197
  /// tokens: a fifth faster on AMX).
  static bool suit(const KernelRow* row, const AttentionShape& n) {
    return row != nullptr && row->arrangement == nullptr && product_bits(*row, 8, 1) == 8 &&
           row->isa != Isa::Neon && n.keys > kStep;
  }

  ByteProducts(const AttentionShape& n, const AttentionSpec& s)
      : n_(n),
        s_(s),
        row_(*active_kernels()),
        keys_(thread_scratch<Tile, struct ForKeys>(pairs_of(n.keys) * 2 * steps_of(n.depth))),
        values_(thread_scratch<Tile, struct ForValues>(pairs_of(n.width) * 2 * steps_of(n.keys))),
        queries_(thread_scratch<Line, struct ForQueries>(kQueries * steps_of(n.depth))),
        levels_(thread_scratch<Line, struct ForLevels>(kQueries * steps_of(n.keys))),
        sums_(thread_scratch<int32_t, struct ForSums>(
            kQueries * kBlockCols * std::max(pairs_of(n.keys), pairs_of(n.width)))),
        terms_(thread_scratch<int32_t, struct ForTerms>(pairs_of(n.keys) * kBlockCols)) {
    const int64_t most = std::max(steps_of(n.depth), steps_of(n.keys));
    steps_ = thread_scratch<int64_t, struct ForSteps>(most);
    live_ = thread_scratch<uint8_t, struct ForLive>(most);
    for (int64_t i = 0; i < most; ++i)
      steps_[i] = i * kStep;
    // Columns and rows that there are not must be numbers all the same, and weights of zero.
    std::fill_n(keys_, pairs_of(n.keys) * 2 * steps_of(n.depth), Tile{});
    std::fill_n(values_, pairs_of(n.width) * 2 * steps_of(n.keys), Tile{});
    std::fill_n(queries_, kQueries * steps_of(n.depth), Line{});
    std::fill_n(levels_, kQueries * steps_of(n.keys), Line{});
    std::fill_n(terms_, pairs_of(n.keys) * kBlockCols, 0);
  }

  static double scratch(const AttentionShape& n) {
    const auto tiles = static_cast<double>(pairs_of(n.keys) * 2 * steps_of(n.depth) +
                                           pairs_of(n.width) * 2 * steps_of(n.keys));
    const auto lines = static_cast<double>(kQueries * (steps_of(n.depth) + steps_of(n.keys)));
    const auto pairs = static_cast<double>(std::max(pairs_of(n.keys), pairs_of(n.width)));
    return tiles * sizeof(Tile) + lines * sizeof(Line) + pairs * kBlockCols * 4.0 * (kQueries + 2) +
           9.0 * static_cast<double>(steps_of(n.keys) + steps_of(n.depth));
  }

  template <class At>
  void load(const At& key_at, const At& value_at) {
    for (int64_t j = 0; j < n_.keys; ++j) {
      const uint8_t* from = key_at(j);
      set_key(j, from);
      int32_t sum = 0;
      for (int64_t c = 0; c < n_.depth; ++c)
        sum += from[c];
      const int64_t depth = n_.depth, zero = s_.zero_k - kHalf;
      terms_[j] = static_cast<int32_t>(s_.zero_q * (depth * zero - (sum - depth * kHalf)));
    }
    for (int64_t j = 0; j < n_.keys; j += 4) {
      const uint8_t* rows[4];
      for (int64_t k = 0; k < 4; ++k)
        rows[k] = value_at(std::min(j + k, n_.keys - 1));  // times a weight of 0
      set_values(j, rows);
    }
  }
  void set_query(int64_t r, const uint8_t* from) {
    std::memcpy(queries_[r * steps_of(n_.depth)].bytes, from, static_cast<size_t>(n_.depth));
    int32_t sum = 0;
    for (int64_t c = 0; c < n_.depth; ++c)
      sum += from[c];
    query_terms_[r] = (kHalf - s_.zero_k) * sum;
  }
  void score(int64_t rows, int64_t met) {
    multiply(queries_, keys_, steps_of(n_.depth), n_.depth, rows, pairs_of(met),
             steps_of(n_.depth));
  }
  BlockedSums scores(int64_t r, int64_t rows, int64_t count) const {
    return {sums_ + r * kBlockCols, room(rows), 5, count, query_terms_[r]};
  }
  const int32_t* key_terms() const { return terms_; }
  uint8_t* levels(int64_t r) { return levels_[r * steps_of(n_.keys)].bytes; }
  int64_t level_stride() const { return steps_of(n_.keys) * kStep; }
  void weigh(int64_t rows, int64_t met) {
    multiply(levels_, values_, steps_of(n_.keys), met, rows, pairs_of(n_.width), steps_of(met));
  }
  BlockedSums values(int64_t r, int64_t rows, int32_t total) const {
    return {sums_ + r * kBlockCols, room(rows), 5, n_.width, (kHalf - s_.zero_v) * total};
  }

 private:
  static constexpr int64_t kStep = 64;
  static constexpr int32_t kHalf = 128;
  struct alignas(64) Line {
    uint8_t bytes[kStep];
  };
  struct alignas(64) Tile {
    uint32_t quads[kStep / 4][formats::kTileWidth];
  };
  static_assert(sizeof(Tile) == formats::kTileBytes);
  static constexpr uint32_t kSigns = 0x80808080;  // a byte less 128

  static int64_t steps_of(int64_t n) { return blocks_of(n, kStep); }
  static int64_t pairs_of(int64_t n) { return blocks_of(n, kBlockCols); }
  /// The tile unit writes whole tiles of rows.
  static int64_t room(int64_t rows) { return blocks_of(rows, 16) * 16 * kBlockCols; }

  void set_key(int64_t j, const uint8_t* from) {
    Tile* tiles = keys_ + j / formats::kTileWidth * steps_of(n_.depth);
    const int64_t column = j % formats::kTileWidth, quads = n_.depth / 4;
    for (int64_t q = 0; q < quads; ++q) {
      uint32_t four;
      std::memcpy(&four, from + 4 * q, 4);
      tiles[q / 16].quads[q % 16][column] = four ^ kSigns;
    }
    if (const int64_t rest = n_.depth % 4; rest > 0) {
      uint32_t four = 0;
      for (int64_t i = 0; i < rest; ++i)
        four |= static_cast<uint32_t>(from[4 * quads + i] ^ 0x80u) << 8 * i;
      tiles[quads / 16].quads[quads % 16][column] = four;
    }
  }

  void set_values(int64_t j, const uint8_t* const (&rows)[4]) {
    for (int64_t c = 0; c < n_.width; c += formats::kTileWidth) {
      uint32_t* to =
          values_[c / formats::kTileWidth * steps_of(n_.keys) + j / kStep].quads[j % kStep / 4];
      const int64_t count = std::min<int64_t>(formats::kTileWidth, n_.width - c);
      const auto fill = [&](int64_t n) {
        for (int64_t i = 0; i < n; ++i)
          to[i] = (uint32_t{rows[0][c + i]} | uint32_t{rows[1][c + i]} << 8 |
                   uint32_t{rows[2][c + i]} << 16 | uint32_t{rows[3][c + i]} << 24) ^
                  kSigns;
      };
      if (count == formats::kTileWidth)
        fill(formats::kTileWidth);
      else
        fill(count);
    }
  }

  /// Rows of levels, `stride` lines each, with pairs of column tiles that have `tile_steps` each,
  /// over the first `depth` elements of `steps` steps.
  void multiply(const Line* lines, const Tile* tiles, int64_t tile_steps, int64_t depth,
                int64_t rows, int64_t pairs, int64_t steps) {
    int32_t offsets[kQueries];
    for (int64_t r = 0; r < rows; ++r)
      offsets[r] = static_cast<int32_t>(r * tile_steps * kStep);
    for (int64_t i = 0; i < steps; ++i)
      live_[i] = static_cast<uint8_t>(blocks_of(std::min(depth - i * kStep, kStep), 4));
    for (int64_t p = 0; p < pairs; ++p) {
      const auto* first = reinterpret_cast<const uint8_t*>(tiles + 2 * p * tile_steps);
      const auto* second = first + tile_steps * formats::kTileBytes;
      int32_t* sums = sums_ + p * room(rows);
      if (row_.block != nullptr)
        row_.block({.activations = lines->bytes,
                    .row_stride = tile_steps * kStep,
                    .step_offsets = steps_,
                    .steps = steps,
                    .packed = {first, second},
                    .bits = 8,
                    .unpacked = {},
                    .unpack = false,
                    .rows = static_cast<int>(rows),
                    .sums = sums,
                    .prefetch = nullptr,
                    .prefetch_bytes = 0});
      else
        row_.gemm({.activations = lines->bytes,
                   .row_offsets = offsets,
                   .step_offsets = steps_,
                   .live_quads = live_,
                   .steps = steps,
                   .tile0 = reinterpret_cast<const int8_t*>(first),
                   .tile1 = reinterpret_cast<const int8_t*>(second),
                   .weight_bits = 8,
                   .arranged = false,
                   .rows = static_cast<int>(rows),
                   .fetch = first,
                   .fetch_row = 0,
                   .fetch_lines = 0,
                   .sums = sums});
    }
  }

  const AttentionShape& n_;
  const AttentionSpec& s_;
  const KernelRow& row_;
  Tile *keys_, *values_;
  Line *queries_, *levels_;
  int32_t *sums_, *terms_;
  int32_t query_terms_[kQueries];
  int64_t* steps_;
  uint8_t* live_;
};

}  // namespace adalayer::cpu

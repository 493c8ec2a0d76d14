#include "cpu/isa/avx2/arrange.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/isa/avx2/products.hpp"

namespace adalayer::cpu {
namespace {

// Quads that are tried as partners of one. More find few more pairs and take longer.
constexpr int kPartners = 64;

/// A quad of one half while it is sorted.
struct Entry {
  int8_t weights[kVectorBytes];
  int16_t positive[16], negative[16];  // sums of each pair of weights, and of its mate's
  uint32_t quad;                       // with its order
  uint32_t next;
  uint32_t mate;
};

/// Entries in a row, linked by their numbers.
constexpr uint32_t kEnd = ~0u;
struct List {
  uint32_t first = kEnd, last = kEnd;

  void append(Entry* entries, uint32_t e) {
    entries[e].next = kEnd;
    (last == kEnd ? first : entries[last].next) = e;
    last = e;
  }
  uint32_t pop(const Entry* entries) {
    const uint32_t e = first;
    first = entries[e].next;
    if (first == kEnd) last = kEnd;
    return e;
  }
};

__m256i ordered(__m256i w, int order) {
  return _mm256_shuffle_epi8(
      w,
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kOrder[order]))));
}

struct Sums {
  __m256i positive, negative;
};
Sums sums_of(__m256i w) {
  const __m256i ones = _mm256_set1_epi8(1), zero = _mm256_setzero_si256();
  // Absolute values up to 128 are u8, which is the first operand of vpmaddubsw.
  return {_mm256_maddubs_epi16(_mm256_max_epi8(w, zero), ones),
          _mm256_maddubs_epi16(_mm256_abs_epi8(_mm256_min_epi8(w, zero)), ones)};
}

/// What the absolute values of the weights of one sign may come to in a sum that int16 holds,
/// whatever levels of 0 .. qmax they are multiplied with.
class Bound {
 public:
  explicit Bound(int qmax)
      : positive_(_mm256_set1_epi16(static_cast<int16_t>(INT16_MAX / qmax))),
        negative_(_mm256_set1_epi16(static_cast<int16_t>(std::min(-INT16_MIN / qmax, INT16_MAX)))) {
  }

  bool holds(const Sums& sums) const {
    const __m256i beyond = _mm256_or_si256(_mm256_cmpgt_epi16(sums.positive, positive_),
                                           _mm256_cmpgt_epi16(sums.negative, negative_));
    return _mm256_testz_si256(beyond, beyond) != 0;
  }
  bool holds(const Entry& a, const Entry& b) const { return holds(together(a, b)); }

  static Sums together(const Entry& a, const Entry& b) {
    return {_mm256_add_epi16(load(a.positive), load(b.positive)),
            _mm256_add_epi16(load(a.negative), load(b.negative))};
  }

 private:
  __m256i positive_, negative_;
};

void set_sums(Entry& e, const Sums& sums) {
  store(e.positive, sums.positive);
  store(e.negative, sums.negative);
}

/// Writes slots of one half in order.
struct Writer {
  int8_t* slots;
  uint32_t* quads;
  int count = 0;

  void put(const void* weights, uint32_t quad) {
    std::memcpy(slots + int64_t{count} * 2 * kVectorBytes, weights, kVectorBytes);
    quads[count++] = quad;
  }
  void put(const Entry& e) { put(e.weights, e.quad); }
};

/// Takes the first of `candidates` that int16 holds together with `a` out of their list.
uint32_t take_partner(const Bound& bound, Entry* entries, List& candidates, const Entry& a) {
  uint32_t before = kEnd, e = candidates.first;
  for (int tried = 0; e != kEnd; before = e, e = entries[e].next, ++tried) {
    if (tried == kPartners) return kEnd;
    if (!bound.holds(a, entries[e])) continue;
    (before == kEnd ? candidates.first : entries[before].next) = entries[e].next;
    if (candidates.last == e) candidates.last = before;
    return e;
  }
  return kEnd;
}

/// Quads whose products are exact in some order of their levels: two by two, and pairs two by two,
/// as far as they go together. Those in another order are hard to place, so they choose first.
void put_exact(const Bound& bound, Entry* entries, List plain, List others, Writer& to,
               ArrangedTable& table) {
  List lonely_plain, lonely_others, pairs, lonely_pairs;
  List mates;  // mixed pairs, plain one first
  while (others.first != kEnd) {
    const uint32_t e = others.pop(entries);
    const uint32_t partner = take_partner(bound, entries, plain, entries[e]);
    if (partner == kEnd) {
      lonely_others.append(entries, e);
    } else {
      mates.append(entries, partner);
      mates.append(entries, e);
    }
  }
  while (plain.first != kEnd) {
    const uint32_t e = plain.pop(entries);
    const uint32_t partner = take_partner(bound, entries, plain, entries[e]);
    if (partner == kEnd) {
      lonely_plain.append(entries, e);
      continue;
    }
    entries[e].mate = partner;
    set_sums(entries[e], Bound::together(entries[e], entries[partner]));
    pairs.append(entries, e);
  }
  const auto put_pair = [&](const Entry& e, uint32_t& count) {
    to.put(e);
    to.put(entries[e.mate]);
    count += 2;
  };
  while (pairs.first != kEnd) {
    const uint32_t e = pairs.pop(entries);
    const uint32_t partner = take_partner(bound, entries, pairs, entries[e]);
    if (partner == kEnd) {
      lonely_pairs.append(entries, e);
      continue;
    }
    put_pair(entries[e], table.four);
    put_pair(entries[partner], table.four);
  }
  for (uint32_t e = lonely_pairs.first; e != kEnd; e = entries[e].next)
    put_pair(entries[e], table.paired);
  const auto put_list = [&](const List& list, uint32_t& count) {
    for (uint32_t e = list.first; e != kEnd; e = entries[e].next, ++count)
      to.put(entries[e]);
  };
  put_list(mates, table.mixed);
  put_list(lonely_plain, table.whole);
  put_list(lonely_others, table.ordered);
}

void arrange_half(const int8_t* original, int64_t steps, const uint8_t* live_quads,
                  const Bound& bound, int half, int8_t* tile, Entry* entries) {
  ArrangedTable& table = arranged_table(tile, steps, half);
  std::memset(&table, 0, static_cast<size_t>(arranged_table_bytes(steps)));
  Writer to{tile + half * kVectorBytes, table.quads()};
  List plain, others, wide;
  uint32_t count = 0;
  for (int64_t s = 0; s < steps; ++s)
    for (int q = 0; q < live_quads[s]; ++q) {
      const auto number = static_cast<uint32_t>(s * kQuadsPerStep + q);
      const __m256i w = load(original + int64_t{number} * 2 * kVectorBytes + half * kVectorBytes);
      if (_mm256_testz_si256(w, w) != 0) continue;
      Entry& e = entries[count];
      int order = 0;
      for (; order < kOrders; ++order) {
        const __m256i candidate = ordered(w, order);
        const Sums sums = sums_of(candidate);
        if (!bound.holds(sums)) continue;
        store(e.weights, candidate);
        set_sums(e, sums);
        break;
      }
      e.quad = number;
      if (order == kOrders) {
        store(e.weights, w);
        wide.append(entries, count);
      } else {
        e.quad |= static_cast<uint32_t>(order) << kOrderBit;
        (order == 0 ? plain : others).append(entries, count);
      }
      ++count;
    }
  put_exact(bound, entries, plain, others, to, table);
  for (uint32_t e = wide.first; e != kEnd; e = entries[e].next, ++table.wide)
    to.put(entries[e]);
}

int64_t scratch_bytes(int64_t steps) {
  return steps * (formats::kTileBytes + kQuadsPerStep * static_cast<int64_t>(sizeof(Entry)));
}

/// Additions and multiplications of a row by a half tile, as gemm_arranged.cpp does them.
double operations(const ArrangedTable& t) {
  constexpr double kOfList = 16;  // sums to and from memory, loops that end
  return kOfList + 2.25 * t.four + 2.5 * t.paired + 3 * (t.mixed + t.whole) +
         4 * (t.ordered + t.wide);
}

/// The cheapest of a tile.
ShortForm short_form(const ArrangedTable& a, const ArrangedTable& b, int quads) {
  const bool bytes = a.mixed + a.ordered + a.wide + b.mixed + b.ordered + b.wide == 0;
  if (operations(a) + operations(b) <= (bytes ? 6.0 : 8.0) * quads) return ShortForm::None;
  return bytes ? ShortForm::Bytes : ShortForm::Words;
}

/// Writes the live quads in bytes or in 16 bits.
void put_short(const int8_t* original, int64_t steps, const uint8_t* live_quads, ShortForm form,
               int8_t* to) {
  for (int64_t s = 0; s < steps; ++s) {
    const int8_t* quad = original + s * formats::kTileBytes;
    if (form == ShortForm::Bytes) {
      std::memcpy(to, quad, static_cast<size_t>(live_quads[s]) * kQuadBytes);
      to += live_quads[s] * kQuadBytes;
      continue;
    }
    for (int q = 0; q < live_quads[s]; ++q, quad += kQuadBytes, to += kWideQuadBytes)
      for (int half = 0; half < 2; ++half) {
        const __m256i w = load(quad + half * kVectorBytes);
        store(to + half * kVectorBytes, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
        store(to + (2 + half) * kVectorBytes, _mm256_srai_epi16(w, 8));
      }
  }
}

void arrange(int8_t* tile, int64_t steps, const uint8_t* live_quads, int qmax, uint8_t* scratch) {
  const int64_t bytes = steps * formats::kTileBytes;
  auto* original = reinterpret_cast<int8_t*>(scratch);
  auto* entries = reinterpret_cast<Entry*>(scratch + bytes);
  std::memcpy(original, tile, static_cast<size_t>(bytes));
  std::memset(tile, 0, static_cast<size_t>(bytes));
  for (int half = 0; half < 2; ++half)
    arrange_half(original, steps, live_quads, Bound(qmax), half, tile, entries);
  if (steps > kMostShortSteps) return;
  ArrangedTable& first = arranged_table(tile, steps, 0);
  ArrangedTable& second = arranged_table(tile, steps, 1);
  int8_t* const weights = short_weights(tile, steps);
  std::memset(weights, 0, static_cast<size_t>(steps * kQuadsPerStep * kWideQuadBytes));
  const int quads = std::accumulate(live_quads, live_quads + steps, 0);
  first.short_form = second.short_form = short_form(first, second, quads);
  if (first.short_form != ShortForm::None)
    put_short(original, steps, live_quads, first.short_form, weights);
}

}  // namespace

const TileArrangement kAvx2Arrangement{arranged_extra_bytes, scratch_bytes, arrange};

}  // namespace adalayer::cpu

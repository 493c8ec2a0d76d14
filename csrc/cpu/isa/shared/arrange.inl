// Sorting the quads of a column tile by what int16 holds of their products (arranged.hpp). Included
// inside the unnamed namespace of one ISA file only.
//
// V has a vector type T of kBytes bytes (the weights of a list's columns for one quad of levels)
// and what is done with it: load, store, shuffle (bytes of 128-bit lanes, by kOrder), set1 and add
// of int16, positive and negative (sums of the absolute values of neighbouring weights of that
// sign, in int16), beyond (whether an int16 of the first exceeds its neighbour in the second) and
// is_zero.

// Quads that are tried as partners of one. More find few more pairs and take longer.
constexpr int kPartners = 64;

template <class V>
class Arranger {
 public:
  static constexpr int kLists = kQuadBytes / V::kBytes;

  static int64_t scratch_bytes(int64_t steps) {
    return steps * (formats::kTileBytes + kQuadsPerStep * static_cast<int64_t>(sizeof(Entry)));
  }

  /// TileArrangement::arrange of slots and tables. Returns the weights as they were, in `scratch`.
  static const int8_t* arrange(int8_t* tile, int64_t steps, const uint8_t* live_quads, int qmax,
                               uint8_t* scratch) {
    const int64_t bytes = steps * formats::kTileBytes;
    auto* original = reinterpret_cast<int8_t*>(scratch);
    std::memcpy(original, tile, static_cast<size_t>(bytes));
    std::memset(tile, 0, static_cast<size_t>(bytes));
    for (int list = 0; list < kLists; ++list)
      Arranger(qmax, scratch + bytes).arrange_list(original, steps, live_quads, list, tile);
    return original;
  }

 private:
  using T = typename V::T;

  /// A quad of one list while it is sorted.
  struct Entry {
    int8_t weights[V::kBytes];
    int16_t positive[V::kBytes / 2];  // sums of each pair of weights, and of its mate's
    int16_t negative[V::kBytes / 2];
    uint32_t quad;  // with its order
    uint32_t next;
    uint32_t mate;
  };
  struct Sums {
    T positive, negative;
  };

  /// Entries in a row, linked by their numbers.
  static constexpr uint32_t kEnd = ~0u;
  struct List {
    uint32_t first = kEnd, last = kEnd;
  };

  /// Writes slots of one list in order.
  struct Writer {
    int8_t* slots;
    uint32_t* quads;
    int count = 0;

    void put(const Entry& e) {
      std::memcpy(slots + int64_t{count} * kQuadBytes, e.weights, V::kBytes);
      quads[count++] = e.quad;
    }
  };

  /// What the absolute values of the weights of one sign may come to in a sum that int16 holds,
  /// whatever levels of 0 .. qmax they are multiplied with, is its bound.
  Arranger(int qmax, uint8_t* entries)
      : positive_(V::set1(static_cast<int16_t>(INT16_MAX / qmax))),
        negative_(V::set1(static_cast<int16_t>(std::min(-INT16_MIN / qmax, INT16_MAX)))),
        entries_(reinterpret_cast<Entry*>(entries)) {}

  bool holds(const Sums& sums) const {
    return !V::beyond(sums.positive, positive_) && !V::beyond(sums.negative, negative_);
  }
  static Sums together(const Entry& a, const Entry& b) {
    return {V::add(V::load(a.positive), V::load(b.positive)),
            V::add(V::load(a.negative), V::load(b.negative))};
  }
  static void set_sums(Entry& e, const Sums& sums) {
    V::store(e.positive, sums.positive);
    V::store(e.negative, sums.negative);
  }

  void append(List& list, uint32_t e) {
    entries_[e].next = kEnd;
    (list.last == kEnd ? list.first : entries_[list.last].next) = e;
    list.last = e;
  }
  uint32_t pop(List& list) {
    const uint32_t e = list.first;
    list.first = entries_[e].next;
    if (list.first == kEnd) list.last = kEnd;
    return e;
  }

  /// Takes the first of `candidates` that int16 holds together with `a` out of their list.
  uint32_t take_partner(List& candidates, const Entry& a) {
    uint32_t before = kEnd, e = candidates.first;
    for (int tried = 0; e != kEnd; before = e, e = entries_[e].next, ++tried) {
      if (tried == kPartners) return kEnd;
      if (!holds(together(a, entries_[e]))) continue;
      (before == kEnd ? candidates.first : entries_[before].next) = entries_[e].next;
      if (candidates.last == e) candidates.last = before;
      return e;
    }
    return kEnd;
  }

  /// Quads whose products are exact in some order of their levels: two by two, and pairs two by
  /// two, as far as they go together. Those in another order are hard to place, so they choose
  /// first.
  void put_exact(List plain, List others, Writer& to, ArrangedTable& table) {
    List lonely_plain, lonely_others, pairs, lonely_pairs;
    List mates;  // mixed pairs, plain one first
    while (others.first != kEnd) {
      const uint32_t e = pop(others);
      const uint32_t partner = take_partner(plain, entries_[e]);
      if (partner == kEnd) {
        append(lonely_others, e);
      } else {
        append(mates, partner);
        append(mates, e);
      }
    }
    while (plain.first != kEnd) {
      const uint32_t e = pop(plain);
      const uint32_t partner = take_partner(plain, entries_[e]);
      if (partner == kEnd) {
        append(lonely_plain, e);
        continue;
      }
      entries_[e].mate = partner;
      set_sums(entries_[e], together(entries_[e], entries_[partner]));
      append(pairs, e);
    }
    const auto put_pair = [&](const Entry& e, uint32_t& count) {
      to.put(e);
      to.put(entries_[e.mate]);
      count += 2;
    };
    while (pairs.first != kEnd) {
      const uint32_t e = pop(pairs);
      const uint32_t partner = take_partner(pairs, entries_[e]);
      if (partner == kEnd) {
        append(lonely_pairs, e);
        continue;
      }
      put_pair(entries_[e], table.four);
      put_pair(entries_[partner], table.four);
    }
    for (uint32_t e = lonely_pairs.first; e != kEnd; e = entries_[e].next)
      put_pair(entries_[e], table.paired);
    put_list(mates, to, table.mixed);
    put_list(lonely_plain, to, table.whole);
    put_list(lonely_others, to, table.ordered);
  }

  void put_list(const List& list, Writer& to, uint32_t& count) {
    for (uint32_t e = list.first; e != kEnd; e = entries_[e].next, ++count)
      to.put(entries_[e]);
  }

  void arrange_list(const int8_t* original, int64_t steps, const uint8_t* live_quads, int list,
                    int8_t* tile) {
    ArrangedTable& table = arranged_table(tile, steps, list);
    std::memset(&table, 0, static_cast<size_t>(arranged_table_bytes(steps)));
    Writer to{tile + list * V::kBytes, table.quads()};
    List plain, others, wide;
    uint32_t count = 0;
    for (int64_t s = 0; s < steps; ++s)
      for (int q = 0; q < live_quads[s]; ++q) {
        const auto number = static_cast<uint32_t>(s * kQuadsPerStep + q);
        const T w = V::load(original + int64_t{number} * kQuadBytes + list * V::kBytes);
        if (V::is_zero(w)) continue;
        Entry& e = entries_[count];
        int order = 0;
        for (; order < kOrders; ++order) {
          const T candidate = V::shuffle(w, V::control(kOrder[order]));
          const Sums sums{V::positive(candidate), V::negative(candidate)};
          if (!holds(sums)) continue;
          V::store(e.weights, candidate);
          set_sums(e, sums);
          break;
        }
        e.quad = number;
        if (order == kOrders) {
          V::store(e.weights, w);
          append(wide, count);
        } else {
          e.quad |= static_cast<uint32_t>(order) << kOrderBit;
          append(order == 0 ? plain : others, count);
        }
        ++count;
      }
    put_exact(plain, others, to, table);
    put_list(wide, to, table.wide);
  }

  T positive_, negative_;
  Entry* entries_;
};

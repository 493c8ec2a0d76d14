// One function for every set of flags of requantize.inl, and the choice between them.

namespace {

using Variant = void (*)(const RequantizeArgs&, const Lookup&);

template <int kTiles, int kFlags>
void run_rows(const RequantizeArgs& a, const Lookup& lookup) {
  Rows<kTiles, kFlags>(a, lookup).all();
}

template <int kTiles, int... kFlags>
Variant variant(int flags, std::integer_sequence<int, kFlags...>) {
  static constexpr Variant kAll[] = {run_rows<kTiles, kFlags>...};
  return kAll[flags];
}

void requantize_any(const RequantizeArgs& a) {
  const ConvEpilogue& e = *a.epilogue;
  const U8Finish& f = e.finish;
  const bool levels = f.zero_point != 0 || f.lo != 0.0f || f.hi != 255.0f;
  const int flags = (a.residual != nullptr ? kResidual : 0) | (e.bounded ? 0 : kClampFirst) |
                    (e.correction != nullptr ? kCorrection : 0) | (levels ? kLevels : 0) |
                    (f.table != nullptr ? kTable : 0);
  const Lookup lookup(f.table);
  constexpr auto kFlagSets = std::make_integer_sequence<int, 32>();
  (a.tiles == 2 ? variant<2>(flags, kFlagSets) : variant<1>(flags, kFlagSets))(a, lookup);
}

}  // namespace

#include "cuda/linear_plan.hpp"

#include "core/status.hpp"
#include "core/thread_pool.hpp"
#include "cuda/linear_packing.hpp"
#include "formats/canonical.hpp"

namespace adalayer::cuda {

LinearWeights pack_linear(std::span<const uint8_t> canonical) {
  const formats::CanonicalHeader header = formats::read_header(canonical);
  if (header.kernel_h != 1 || header.kernel_w != 1)
    fail<InvalidArgument>("weights of a linear layer have a 1 x 1 kernel, got ", header.kernel_h,
                          " x ", header.kernel_w);
  const std::vector<int8_t> w = formats::unpack_canonical(canonical);
  LinearWeights l;
  l.bits = header.bits;
  l.out_features = header.out_channels;
  l.in_features = header.group_in;
  l.units = static_cast<int32_t>((l.in_features + kLinearDepth - 1) / kLinearDepth);
  const int64_t strips = (l.out_features + kLinearRows - 1) / kLinearRows;
  l.packed.assign(static_cast<size_t>(strips * l.units * linear_unit_bytes(l.bits)), 0);
  parallel_for(strips, default_threads(), [&](int64_t strip, int) {
    for (int32_t unit = 0; unit < l.units; ++unit) {
      uint8_t* to = l.packed.data() + (strip * l.units + unit) * linear_unit_bytes(l.bits);
      for (int lane = 0; lane < 32; ++lane)
        for (int pair = 0; pair < kLinearPairs; ++pair)
          for (int i = 0; i < 2; ++i) {
            const int s = pair / 4, r = pair % 4;
            const int64_t o = strip * kLinearRows + linear_row(lane, r);
            const int64_t k = int64_t{unit} * kLinearDepth + linear_column(lane, s, r, i);
            const int weight =
                o < l.out_features && k < l.in_features ? w[o * l.in_features + k] : 0;
            const auto v = static_cast<uint32_t>(weight + (1 << (l.bits - 1)));
            int before = 0;
            for (const int plane : {8, 4, 2, 1}) {
              if (l.bits - before < plane) continue;
              const FieldPlace at = linear_place(plane, lane, pair, i);
              uint8_t& byte = to[linear_plane(before) + at.byte];
              byte = static_cast<uint8_t>(byte | ((v >> before) & ((1u << plane) - 1)) << at.bit);
              before += plane;
            }
          }
    }
  });
  return l;
}

}  // namespace adalayer::cuda

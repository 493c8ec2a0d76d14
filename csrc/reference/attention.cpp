#include "reference/attention.hpp"

#include <limits>
#include <vector>

namespace adalayer::reference {

void attention(const AttentionShape& n, const AttentionSpec& s, const uint8_t* q, const uint8_t* k,
               const uint8_t* v, float* out) {
  const int64_t q_plane = n.sequences * n.queries, k_plane = n.sequences * n.keys;
  std::vector<float> scores(static_cast<size_t>(n.keys));
  std::vector<int32_t> levels(static_cast<size_t>(n.keys));
  for (int64_t sequence = 0; sequence < n.sequences; ++sequence)
    for (int64_t head = 0; head < n.heads; ++head)
      for (int64_t i = 0; i < n.queries; ++i) {
        const int64_t met = attended_keys(n, s, i), shared = n.key_head(head);
        const float* mask = mask_row(n, s, sequence, head, i);
        float top = -std::numeric_limits<float>::infinity();
        for (int64_t j = 0; j < met; ++j) {
          int32_t sum = 0;
          for (int64_t c = 0; c < n.depth; ++c) {
            const int32_t a =
                q[(head * n.depth + c) * q_plane + sequence * n.queries + i] - s.zero_q;
            const int32_t b =
                k[(shared * n.depth + c) * k_plane + sequence * n.keys + j] - s.zero_k;
            sum += a * b;
          }
          scores[j] = attention_score(sum, s.scale, mask_value(mask, s.keys, j));
          top = max_x86(scores[j], top);
        }
        int32_t total = 0;
        for (int64_t j = 0; j < met; ++j)
          total += levels[j] = attention_level(scores[j], top);
        const float factor = attention_factor(total, s.value_scale);
        for (int64_t c = 0; c < n.width; ++c) {
          const uint8_t* values = v + (shared * n.width + c) * k_plane + sequence * n.keys;
          int32_t sum = 0;
          for (int64_t j = 0; j < met; ++j)
            sum += levels[j] * (values[j] - s.zero_v);
          out[(head * n.width + c) * q_plane + sequence * n.queries + i] =
              static_cast<float>(sum) * factor;
        }
      }
}

}  // namespace adalayer::reference

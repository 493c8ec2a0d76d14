// Attention against its reference.
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/image/attention.hpp"
#include "cpu/kernel_table.hpp"
#include "image/cases.hpp"

using namespace adalayer;
using namespace adalayer::cpu;

/// Sizes around a block of queries, a group of keys or channels, and their halves.
AttentionShape random_attention() {
  AttentionShape n;
  n.sequences = uniform(0, 2) == 0 ? uniform(2, 3) : 1;
  n.queries = pick<int64_t>({1, 2, 5, 23, 24, 25, 31, 33, 49, 65});
  n.keys = uniform(0, 2) == 0 ? n.queries : pick<int64_t>({1, 2, 15, 16, 17, 33, 64, 65, 130});
  n.key_heads = uniform(1, 3);
  n.heads = n.key_heads * uniform(1, 2);
  n.depth = pick<int64_t>({1, 2, 3, 8, 17, 32, 64, 70});
  n.width = pick<int64_t>({1, 7, 15, 16, 17, 31, 33, 64, 65});
  return n;
}

TEST(attention) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int round = 0; round < 80; ++round) {
    const AttentionShape n = random_attention();
    AttentionSpec s;
    s.zero_q = pick<int32_t>({0, 127, 255});
    s.zero_k = pick<int32_t>({0, 127, 255});
    s.zero_v = pick<int32_t>({0, 127, 255});
    s.scale = pick<float>({0.0f, 1e-5f, 1e-3f, -0.01f, 1e30f});
    s.value_scale = 0.05f;
    s.causal = uniform(0, 3) == 0;
    s.finish = {-20.0f, 220.0f, 30, nullptr, pick<float>({20.0f, 1e30f})};
    const int64_t matrix = n.queries * n.keys;
    const bool rows = n.sequences > 1 && uniform(0, 1) == 1, heads = uniform(0, 1) == 1;
    Exact<float> mask(
        static_cast<size_t>((rows ? n.sequences : 1) * (heads ? n.heads : 1) * matrix));
    for (size_t i = 0; i < mask.size(); ++i)
      mask[i] = uniform(0, 3) == 0 ? -kInfinity : static_cast<float>(uniform(-30, 30)) / 8.0f;
    if (round % 2 == 1) {
      if (uniform(0, 1) == 1)
        for (int64_t j = 0; j < n.keys; ++j)  // a query that meets no key
          mask[static_cast<size_t>(j)] = -kInfinity;
      s.mask = mask.data();
      s.mask_head = heads ? matrix : 0;
      s.mask_sequence = rows ? (heads ? n.heads : 1) * matrix : 0;
    }
    Exact<float> hidden(static_cast<size_t>(n.keys));
    for (size_t i = 0; i < hidden.size(); ++i)
      hidden[i] = uniform(0, 2) == 0 ? pick<float>({-kInfinity, -3e38f}) : 0.0f;
    if (n.sequences == 1 && round % 4 > 1) s.keys = hidden.data();
    // One sequence may lie in several rows, and keys and values in others.
    const auto image = [&](int64_t channels, int64_t tokens) {
      int64_t h = n.sequences;
      if (h == 1 && tokens % 5 == 0) h = 5;
      return Image(channels, h, n.sequences > 1 ? tokens : tokens / h);
    };
    const Image q = image(n.heads * n.depth, n.queries), k = image(n.key_heads * n.depth, n.keys),
                v = image(n.key_heads * n.width, n.keys);
    const auto planar = [&](const Image& from) {
      std::vector<uint8_t> levels;
      for (int64_t c = 0; c < from.layout.channels; ++c)
        for (int64_t y = 0; y < from.layout.h; ++y)
          for (int64_t x = 0; x < from.layout.w; ++x)
            levels.push_back(static_cast<uint8_t>(from(c, y, x)));
      return levels;
    };
    const int64_t h = q.layout.h, w = q.layout.w;
    std::vector<float> reals(static_cast<size_t>(n.heads * n.width * h * w));
    reference::attention(n, s, planar(q).data(), planar(k).data(), planar(v).data(), reals.data());
    check_operation(
        "attention of " + describe(q.layout) + " with " + describe(k.layout),
        random_layout(n.heads * n.width, h, w),
        [&](int64_t c, int64_t y, int64_t x) {
          return finish_u8(reals[static_cast<size_t>((c * h + y) * w + x)], s.finish);
        },
        [&](ImageView out, Part part) {
          const KernelScope scope;
          attention(n, s, q.view(), k.view(), v.view(), out, part);
        },
        0, -1, true);
    check_floats("attention_f32 of " + describe(q.layout), reals, [&](float* out, Part part) {
      const KernelScope scope;
      attention_f32(n, s, q.view(), k.view(), v.view(), {out, 1, h * w}, part);
    });
  }
}

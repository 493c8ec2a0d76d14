// Attention (reference/attention.hpp): one block per query of a head.
#pragma once

#include "cuda/law.cuh"
#include "cuda/params.hpp"
#include "cuda/simt.cuh"

namespace adalayer::cuda {

ADALAYER_DEVICE float attention_score(const AttentionParams& p, const uint8_t* q, const uint8_t* k,
                                      const float* mask, int32_t key) {
  int32_t sum = 0;
  for (int32_t c = 0; c < p.depth; ++c)
    sum += (static_cast<int32_t>(q[c]) - p.zero_q) * (static_cast<int32_t>(k[c]) - p.zero_k);
  return fma_rn(to_float_rn(sum), p.scale, mask == nullptr ? 0.0f : mask[key]);
}

/// Shared memory: a number per thread, then the levels of the row's keys.
ADALAYER_KERNEL ADALAYER_THREADS(kAttentionThreads) attention(ADALAYER_PARAMS AttentionParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const auto query = static_cast<int32_t>(block_x() % p.queries);
  const uint32_t rest = block_x() / p.queries;
  const auto head = static_cast<int32_t>(rest % p.heads);
  const int64_t sequence = rest / p.heads;  // of all images
  const int32_t shared_head = head / (p.heads / p.key_heads);
  const int64_t row = sequence * p.queries + query;
  const uint8_t* q = p.q + row * p.q_pitch + head * p.depth;
  const uint8_t* k = p.k + sequence * p.keys * p.k_pitch + shared_head * p.depth;
  const uint8_t* v = p.v + sequence * p.keys * p.v_pitch + shared_head * p.width;
  const float* mask = p.mask == nullptr
                          ? nullptr
                          : p.mask + sequence % p.sequences * p.mask_sequence + head * p.mask_head +
                                static_cast<int64_t>(query) * p.keys;
  const int32_t met = p.causal && query + 1 < p.keys ? query + 1 : p.keys;
  auto* numbers = reinterpret_cast<float*>(shared_memory());
  auto* sums = reinterpret_cast<int32_t*>(shared_memory());
  uint8_t* levels = shared_memory() + 4 * block_threads();

  float top = -bits_to_float(0x7F800000u);
  for (int32_t j = thread_index(); j < met; j += block_threads())
    top = max_x86(attention_score(p, q, k + j * p.k_pitch, mask, j), top);
  numbers[thread_index()] = top;
  sync_threads();
  for (int t = 0; t < block_threads(); ++t)
    top = max_x86(numbers[t], top);
  sync_threads();
  int32_t total = 0;
  for (int32_t j = thread_index(); j < met; j += block_threads()) {
    const float score = attention_score(p, q, k + j * p.k_pitch, mask, j);
    const auto level =
        static_cast<int32_t>(round_even_float(mul_rn(softmax_exp(sub_rn(score, top)), 255.0f)));
    levels[j] = static_cast<uint8_t>(level);
    total += level;
  }
  sums[thread_index()] = total;
  sync_threads();
  total = 0;
  for (int t = 0; t < block_threads(); ++t)
    total += sums[t];
  const float factor = total == 0 ? 0.0f : div_rn(p.value_scale, to_float_rn(total));
  uint8_t* out = p.out + row * p.out_pitch + head * p.width;
  for (int32_t c = thread_index(); c < p.width; c += block_threads()) {
    int32_t sum = 0;
    for (int32_t j = 0; j < met; ++j)
      sum += levels[j] * (static_cast<int32_t>(v[j * p.v_pitch + c]) - p.zero_v);
    out[c] = finish_u8(mul_rn(to_float_rn(sum), factor), p.finish);
  }
  if (head == p.heads - 1)
    for (int32_t c = p.width + thread_index(); head * p.width + c < p.out_pitch;
         c += block_threads())
      out[c] = 0;
}

}  // namespace adalayer::cuda

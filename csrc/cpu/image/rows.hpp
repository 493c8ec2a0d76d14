// How the image operations cut their work into runs for the kernels.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/image/layout.hpp"
#include "cpu/image_kernels.hpp"

namespace adalayer::cpu {

/// Scratch memory of this thread, which grows to the largest use; Tag keeps uses apart.
template <class T, class Tag>
T* thread_scratch(int64_t count) {
  thread_local std::vector<T> memory;
  if (memory.size() < static_cast<size_t>(count)) memory.resize(static_cast<size_t>(count));
  return memory.data();
}

/// Bytes of a pixel that a kernel may handle as one run: whole vectors where both sides have them.
inline int64_t common_bytes(ConstImageView in, ImageView out) {
  const int64_t pitch = in.layout->pitch < out.layout->pitch ? in.layout->pitch : out.layout->pitch;
  return pitch;
}

/// Calls fn(in, out, bytes) for runs that cover the output rows first <= y < last: whole rows where
/// pixels lie equally far apart on both sides (the bytes between channels and pitch come along),
/// else pixel by pixel.
template <class Fn>
void each_run(ConstImageView in, ImageView out, int64_t y, const Fn& fn) {
  const ImageLayout& a = *in.layout;
  const ImageLayout& b = *out.layout;
  if (a.pitch == b.pitch) {
    fn(in.row(y), out.row(y), b.w * b.pitch);
    return;
  }
  const uint8_t* from = in.row(y);
  uint8_t* to = out.row(y);
  for (int64_t x = 0; x < b.w; ++x)
    fn(from + x * a.pitch, to + x * b.pitch, b.channels);
}

/// The order of channels `index`, of `input` of them, for the kernel that gathers `output` ones. It
/// lies in scratch memory of this thread until the next plan.
GatherPlan plan_gather(const int32_t* index, int64_t input, int64_t output);

/// The pixels of one output row, for kernels that take strides.
inline Pixels row_pixels(ConstImageView in, ImageView out, int64_t y) {
  const ImageLayout& a = *in.layout;
  const ImageLayout& b = *out.layout;
  if (a.pitch == b.pitch) return {in.row(y), 0, out.row(y), 0, b.w * b.pitch, 1};
  return {in.row(y), a.pitch, out.row(y), b.pitch, b.channels, b.w};
}

/// The table of a finish over channels [channel, channel + count) of one output row, in place.
inline void apply_table(const ImageKernels& kernels, const U8Finish& finish, ImageView out,
                        int64_t y, int64_t channel, int64_t count) {
  if (finish.table == nullptr) return;
  const int64_t pitch = out.layout->pitch;
  uint8_t* row = out.row(y) + channel;
  kernels.lookup(finish.table, {row, pitch, row, pitch, count, out.layout->w});
}
inline void apply_table(const ImageKernels& kernels, const U8Finish& finish, ImageView out,
                        int64_t y) {
  if (finish.table != nullptr) kernels.lookup(finish.table, row_pixels(out, out, y));
}

/// Is |y| below 2^30 for every level? False for NaN and infinities.
inline bool is_bounded(double largest, const U8Finish& finish) {
  return largest * static_cast<double>(finish.inv_scale) < 1073741824.0;
}

}  // namespace adalayer::cpu

#include "cpu/layer/single_layer.hpp"

#include <algorithm>
#include <numeric>

#include "core/status.hpp"
#include "core/thread_pool.hpp"
#include "cpu/conv/trial.hpp"
#include "cpu/image/attention.hpp"
#include "cpu/image/float_conv.hpp"
#include "cpu/image/ops.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/layer/plan.hpp"
#include "reference/reference.hpp"

namespace adalayer::cpu {
namespace {

// Packed activations of one task should stay in the second-level cache (2 MiB on the machines this
// was tuned on, 1 MiB on older ones) beside the weights that stream past them.
constexpr int64_t kImageBudget = 512 << 10;
// Below about this many nanoseconds of work a fork-join (2-5 us) costs more than it saves.
constexpr int64_t kSerialNanoseconds = 8000;
// Output positions of one image are int32 in the kernels.
constexpr int64_t kMaxPositions = int64_t{1} << 31;
// Least and most positions of one of the tall images that a long list of pixels is cut into.
constexpr int64_t kShortest = 256, kTallest = 8192;

/// Buffers of one thread; they grow to the largest layer and are then reused, so that a warm call
/// allocates nothing.
struct Scratch {
  AlignedBuffer image;
  AlignedBuffer correction;  // filled by the calling thread, read by all
};
Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

/// What every task of one call reads.
struct Call {
  const LayerPlan& plan;
  const ActivationIn& in;
  const LayerWeights& weights;
  const OutputSpec& out;
  const KernelRow& kernels;
  const int32_t* correction;  // [out_channels]
  int64_t images;
};

/// One part of images [first, first + images), which lie packed at `packed`.
void multiply(const Call& call, const uint8_t* packed, int64_t first, int64_t images, Part part,
              bool by_columns) {
  const KernelScope scope(&call.kernels);
  call.plan.conv->run({.weights = *call.weights.form,
                       .packed = call.weights.packed.data(),
                       .bits = call.weights.header.bits,
                       .in = packed,
                       .images = images,
                       .correction = call.correction,
                       .tensor = &call.out,
                       .first_image = first,
                       .by_columns = by_columns},
                      part);
}

void run_images(const Call& call, int threads) {
  const PlannedConv& conv = *call.plan.conv;
  const int64_t image_bytes = conv.in().image_bytes, slack = conv.in().slack;
  if (threads == 1 || call.images >= threads) {
    // Each task packs some images and multiplies them while they are in its cache.
    const int64_t fit = std::max<int64_t>(1, kImageBudget / image_bytes);
    const int64_t chunk = std::min(fit, (call.images + threads - 1) / threads);
    parallel_for((call.images + chunk - 1) / chunk, threads, [&](int64_t task, int) {
      const int64_t first = task * chunk, count = std::min(chunk, call.images - first);
      auto* packed = grown<uint8_t>(scratch().image, count * image_bytes + slack);
      for (int64_t n = 0; n < count; ++n)
        pack_image(call.plan, call.in, first + n, packed + n * image_bytes, {});
      multiply(call, packed, first, count, {}, false);
    });
    return;
  }
  auto* packed = grown<uint8_t>(scratch().image, call.images * image_bytes + slack);
  const int64_t row_parts = std::clamp<int64_t>(conv.in().h, 1, threads * int64_t{2});
  parallel_for(call.images * row_parts, threads, [&](int64_t task, int) {
    const int64_t n = task / row_parts;
    pack_image(call.plan, call.in, n, packed + n * image_bytes, {task % row_parts, row_parts});
  });
  const bool by_columns =
      conv.prefers_columns(*call.weights.form, call.weights.header.bits, threads);
  // A few parts for each thread even out what a neighbour on the core takes away.
  const int64_t parts = std::min<int64_t>(conv.most_parts(by_columns), threads * int64_t{2});
  parallel_for(parts, threads, [&](int64_t part, int) {
    multiply(call, packed, 0, call.images, {part, parts}, by_columns);
  });
}

int64_t estimated_nanoseconds(const ConvShape& s) {
  const int64_t in = s.batch * s.in_channels * s.in_h * s.in_w;
  const int64_t out = s.batch * s.out_channels * s.out_h() * s.out_w();
  // Rough rates of one AMX core: 1000 multiply-accumulates and 8 elements per nanosecond.
  return s.macs() / 1000 + (in + out) / 8 + s.out_channels * s.reduction() / 32;
}

void run(const ConvShape& shape, const ActivationIn& in, const LayerWeights& weights,
         const OutputSpec& out, int threads, const KernelRow& kernels) {
  if (weights.isa != kernels.isa || weights.form == nullptr)
    throw InvalidArgument("conv2d: the weights were derived for another instruction set");
  const int bits = weights.header.bits;
  const std::shared_ptr<const LayerPlan> plan =
      cached_plan(layer_task(shape, bits, weights.qmax), *weights.algorithm, weights.form->variant);
  if (static_cast<int64_t>(weights.packed.size()) != plan->conv->packed_bytes(*weights.form, bits))
    throw InvalidArgument("conv2d: the weights were derived for another layer");
  auto* correction = grown<int32_t>(scratch().correction, shape.out_channels);
  for (int64_t o = 0; o < shape.out_channels; ++o)
    correction[o] = -in.grid.zero_point * weights.sums[o];
  if (estimated_nanoseconds(shape) < kSerialNanoseconds) threads = 1;
  run_images({*plan, in, weights, out, kernels, correction, shape.batch}, threads);
}

/// Images of one pixel are the same bytes in both layouts; as interleaved ones they can be merged.
void prefer_interleaved(const ConvShape& s, ActivationIn& in, OutputSpec& out) {
  if (s.in_h == 1 && s.in_w == 1 && s.out_h() == 1 && s.out_w() == 1)
    in.layout = out.layout = Layout::NHWC;
}

/// Whether the layer does not care where images end: a 1x1 convolution without padding over
/// interleaved tensors is a matmul over one long list of pixels.
bool is_matmul(const ConvShape& s, const ActivationIn& in, const LayerWeights& weights,
               const OutputSpec& out) {
  const bool pointwise = s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 &&
                         s.pad_top == 0 && s.pad_left == 0 && s.pad_bottom == 0 && s.pad_right == 0;
  return pointwise && in.layout == Layout::NHWC && out.layout == Layout::NHWC &&
         weights.algorithm != nullptr && weights.algorithm->joins_images();
}

void skip(ActivationIn& in, int64_t elements) {
  if (in.dtype == DType::F32)
    in.data = static_cast<const float*>(in.data) + elements;
  else
    in.data = static_cast<const uint8_t*>(in.data) + elements;
}
void skip(OutputSpec& out, int64_t elements) {
  if (out.dtype == DType::F32)
    out.data = static_cast<float*>(out.data) + elements;
  else
    out.data = static_cast<uint8_t*>(out.data) + elements;
  if (out.residual != nullptr) out.residual += elements;
}

/// The pixels as tall images that fit the cache, and what is left.
void run_matmul(const ConvShape& shape, ActivationIn in, const LayerWeights& weights,
                OutputSpec out, int threads, const KernelRow& kernels) {
  const int64_t pixels = shape.batch * shape.in_h * shape.in_w;
  const int64_t fit = kImageBudget / pixel_pitch(shape.in_channels);
  const int64_t tall = std::clamp(fit, kShortest, kTallest);
  ConvShape part = shape;
  part.in_w = 1;
  if (pixels >= 2 * tall) {
    part.batch = pixels / tall;
    part.in_h = tall;
    run(part, in, weights, out, threads, kernels);
    skip(in, part.batch * tall * shape.in_channels);
    skip(out, part.batch * tall * shape.out_channels);
  }
  part.in_h = pixels < 2 * tall ? pixels : pixels % tall;
  part.batch = 1;
  if (part.in_h > 0) run(part, in, weights, out, threads, kernels);
}

/// Splits n elements among threads in runs of whole cache lines.
template <class Fn>
void split_elements(int64_t n, int threads, const Fn& fn) {
  constexpr int64_t kGrain = 1 << 15;
  const int64_t tasks = std::max<int64_t>(1, (n + kGrain - 1) / kGrain);
  parallel_for(tasks, threads, [&](int64_t task, int) {
    const int64_t first = task * kGrain;
    fn(first, std::min(n - first, kGrain));
  });
}

}  // namespace

LayerWeights derive_weights(const ConvShape& shape, std::span<const uint8_t> canonical, int qmax) {
  LayerWeights weights;
  weights.qmax = qmax;
  weights.header = formats::read_header(canonical);
  weights.isa = active_isa();
  const auto& h = weights.header;
  if (h.out_channels != shape.out_channels || h.group_in != shape.group_in() ||
      h.kernel_h != shape.kernel_h || h.kernel_w != shape.kernel_w)
    fail<InvalidArgument>("conv2d: expected packed weights of shape [", shape.out_channels, ", ",
                          shape.group_in(), ", ", shape.kernel_h, ", ", shape.kernel_w, "], got [",
                          h.out_channels, ", ", h.group_in, ", ", h.kernel_h, ", ", h.kernel_w,
                          "]");
  check_accumulator(shape.reduction(), h.bits);
  std::vector<int8_t> dense = formats::unpack_canonical(canonical);
  const int64_t reduction = shape.reduction();
  for (int64_t o = 0; o < shape.out_channels; ++o) {
    const auto first = dense.begin() + o * reduction;
    weights.sums.push_back(std::accumulate(first, first + reduction, int32_t{0}));
  }
  if (active_kernels() == nullptr) {
    weights.dense = std::move(dense);
    return weights;
  }
  const ConvTask task = layer_task(shape, h.bits, qmax);
  std::vector<ConvForm> forms;
  for (const ConvAlgorithm* algorithm : algorithms_for(task)) {
    ConvForm form = make_form(*algorithm, task, {layer_input(task, *algorithm).layout}, dense);
    if (form.weights != nullptr) forms.push_back(std::move(form));
  }
  PackedForm fastest = fastest_form(task, std::move(forms), dense);
  weights.algorithm = fastest.form.algorithm;
  weights.form = std::move(fastest.form.weights);
  weights.packed = std::move(fastest.packed);
  return weights;
}

void conv2d(const ConvShape& shape, const ActivationIn& in, const LayerWeights& weights,
            const OutputSpec& out, int threads) {
  const int64_t positions = shape.out_h() * shape.out_w();
  if (shape.batch == 0 || positions == 0) return;
  if (largest_level(in) > weights.qmax)
    fail<InvalidArgument>("conv2d: the weights were derived for levels up to ", weights.qmax,
                          ", the input may have ", largest_level(in));
  const KernelRow* kernels = active_kernels();
  if (kernels == nullptr) {
    if (weights.dense.empty())
      throw InvalidArgument("conv2d: the weights were derived for another instruction set");
    reference::conv2d(shape, in, weights.dense.data(), out, threads);
    return;
  }
  if (positions >= kMaxPositions)
    throw InvalidArgument("conv2d: an output image of 2^31 or more positions is not supported");
  ActivationIn from = in;
  OutputSpec to = out;
  prefer_interleaved(shape, from, to);
  if (is_matmul(shape, from, weights, to))
    run_matmul(shape, from, weights, to, threads, *kernels);
  else
    run(shape, from, weights, to, threads, *kernels);
}

void quantize(const float* x, int64_t n, const ActivationGrid& grid, uint8_t* q, int threads) {
  const KernelRow* kernels = active_kernels();
  if (kernels == nullptr) return reference::quantize(x, n, grid, q);
  split_elements(n, threads, [&](int64_t first, int64_t count) {
    kernels->quantize_row(x + first, count, grid, q + first);
  });
}

void fake_quantize(const float* x, int64_t n, const ActivationGrid& grid, float scale, float* y,
                   int threads) {
  const KernelRow* kernels = active_kernels();
  if (kernels == nullptr) return reference::fake_quantize(x, n, grid, scale, y);
  split_elements(n, threads, [&](int64_t first, int64_t count) {
    kernels->fake_quantize(x + first, count, grid, scale, y + first);
  });
}

void fma_values(const float* a, const float* b, const float* c, int64_t n, float* y, int threads) {
  const ImageKernels& kernels = image_kernels();
  split_elements(n, threads, [&](int64_t first, int64_t count) {
    kernels.fma_values(a + first, b + first, c + first, count, y + first);
  });
}

void function_values(const FloatFunctionSpec& spec, const float* x, int64_t n, float* y,
                     int threads) {
  const ImageKernels& kernels = image_kernels();
  split_elements(n, threads, [&](int64_t first, int64_t count) {
    kernels.function(spec, x + first, count, y + first);
  });
}

void softmax(const float* x, int64_t images, int64_t channels, int64_t positions, float* y,
             int threads) {
  const int64_t size = channels * positions;
  parallel_for(images, threads, [&](int64_t n, int) {
    softmax_f32(x + n * size, channels, positions, y + n * size, {});
  });
}

void attention(const AttentionShape& shape, const AttentionSpec& spec, int64_t images,
               const uint8_t* q, const uint8_t* k, const uint8_t* v, float* y, int threads) {
  const auto row = [](int64_t channels, int64_t tokens) {
    ImageLayout l;
    l.channels = l.pitch = channels;
    l.h = l.phase_rows = 1;
    l.w = l.columns = tokens;
    l.row_bytes = l.image_bytes = channels * tokens;
    return l;
  };
  const ImageLayout queries = row(shape.heads * shape.depth, shape.queries);
  const ImageLayout keys = row(shape.key_heads * shape.depth, shape.keys);
  const ImageLayout values = row(shape.key_heads * shape.width, shape.keys);
  const int64_t size = shape.queries * shape.heads * shape.width;
  const int64_t parts = images < threads ? std::min<int64_t>(threads, attention_parts(shape)) : 1;
  parallel_for(images * parts, threads, [&](int64_t task, int) {
    const int64_t n = task / parts;
    AttentionSpec own = spec;
    if (own.mask != nullptr) own.mask += n * spec.mask_sequence;
    const KernelScope scope;
    attention_f32(shape, own, {&queries, q + n * queries.image_bytes},
                  {&keys, k + n * keys.image_bytes}, {&values, v + n * values.image_bytes},
                  {y + n * size, shape.heads * shape.width, 1}, {task % parts, parts});
  });
}

void float_norm(const GroupNormSpec& spec, const float* x, int64_t images, int64_t channels,
                int64_t plane, float* y, int threads) {
  const int64_t size = channels * plane;
  parallel_for(images, threads, [&](int64_t n, int) {
    if (spec.groups > 0)
      group_norm_floats(spec, x + n * size, channels, plane, y + n * size, {});
    else
      layer_norm_floats(spec.norm, x + n * size, channels, plane, y + n * size, {});
  });
}

void float_conv(const FloatConvSpec& spec, const float* x, int64_t images, float* y, int threads) {
  const FloatConv conv(spec);
  const ConvShape& s = spec.shape;
  const int64_t in = s.in_channels * s.in_h * s.in_w, out = s.out_channels * s.out_h() * s.out_w();
  const bool by_images = images >= threads;
  const int64_t parts = by_images ? threads : std::min<int64_t>(threads, conv.max_parts());
  parallel_for(parts, threads, [&](int64_t task, int) {
    const Part part{task, parts};
    if (!by_images) return conv.run(x, y, images, part);
    const int64_t first = part.first(images);
    conv.run(x + first * in, y + first * out, part.last(images) - first, {});
  });
}

}  // namespace adalayer::cpu

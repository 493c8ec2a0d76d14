// _C.Layer, operations on tensors of floats, and packed weights. Buffers are raw addresses, as in
// module.cpp.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "core/status.hpp"
#include "cpu/layer/layer.hpp"
#include "cpu/layer/linear_layer.hpp"
#include "cpu/layer/recurrent_layer.hpp"
#include "cpu/layer/single_layer.hpp"
#include "formats/canonical.hpp"
#include "reference/reference.hpp"

namespace py = pybind11;
using namespace adalayer;

namespace {

std::span<const uint8_t> bytes_at(uintptr_t address, size_t size) {
  return {reinterpret_cast<const uint8_t*>(address), size};
}

const float* floats_at(uintptr_t address) { return reinterpret_cast<const float*>(address); }

using GridNumbers = std::tuple<float, int, int>;  // scale, zero point, bits

cpu::Grid grid_of(const GridNumbers& numbers) {
  const auto [scale, zero_point, bits] = numbers;
  return {scale, zero_point, bits};
}

/// `geometry` by the names of the engine's table of operations; batch and image size stay open.
ConvShape shape_of(int64_t channels, int64_t out_channels, const py::dict& geometry) {
  const auto of = [&](const char* name) { return geometry[name].cast<int64_t>(); };
  ConvShape s;
  s.in_channels = channels;
  s.out_channels = out_channels;
  s.kernel_h = of("kernel_h");
  s.kernel_w = of("kernel_w");
  s.stride_h = of("stride_h");
  s.stride_w = of("stride_w");
  s.pad_top = of("pad_top");
  s.pad_left = of("pad_left");
  s.pad_bottom = of("pad_bottom");
  s.pad_right = of("pad_right");
  s.dilation_h = of("dilation_h");
  s.dilation_w = of("dilation_w");
  s.groups = of("groups");
  return s;
}

/// With `levels` tensors are u8, else f32.
cpu::Layer make_layer(int64_t channels, int64_t out_channels, const py::dict& geometry,
                      const GridNumbers& input, const std::pair<float, float>& bounds,
                      const std::optional<GridNumbers>& output, bool levels) {
  cpu::Layer::Steps steps;
  steps.input = grid_of(input);
  std::tie(steps.lo, steps.hi) = bounds;
  if (output) steps.output = grid_of(*output);
  steps.levels = levels;
  return {shape_of(channels, out_channels, geometry), steps};
}

/// parameters: address of the packed weights, their bytes, addresses of scale and bias. size:
/// images, height and width.
void run_layer(const cpu::Layer& layer,
               const std::tuple<uintptr_t, size_t, uintptr_t, uintptr_t>& parameters, uintptr_t x,
               const std::array<int64_t, 3>& size, bool nhwc, uintptr_t residual, uintptr_t y,
               int threads) {
  const auto [packed, bytes, scale, bias] = parameters;
  const py::gil_scoped_release release;
  layer.run({bytes_at(packed, bytes), floats_at(scale), floats_at(bias)},
            {size[0], size[1], size[2], nhwc ? Layout::NHWC : Layout::NCHW},
            reinterpret_cast<const void*>(x), floats_at(residual), reinterpret_cast<void*>(y),
            threads);
}

/// sizes: images, queries, keys, heads, key_heads, depth, width. mask: its address, and how far it
/// is from image to image and from head to head, 0 where there is one for all; it is [images or
/// 1][heads or 1][queries][keys]. tensors: query, key, value, result.
void attention(const std::array<int64_t, 7>& sizes, const std::array<int32_t, 3>& zeros,
               const std::pair<float, float>& scales, bool causal,
               const std::tuple<uintptr_t, int64_t, int64_t>& mask,
               const std::array<uintptr_t, 4>& tensors, int threads) {
  const auto [images, queries, keys, heads, key_heads, depth, width] = sizes;
  if (*std::min_element(sizes.begin(), sizes.end()) < 1 || heads % key_heads != 0)
    throw InvalidArgument("attention: expected positive sizes, and heads a multiple of key_heads");
  if (depth > kMostAttentionTerms || keys > kMostAttentionTerms)
    fail<InvalidArgument>("attention: expected at most ", kMostAttentionTerms,
                          " keys, and channels per head, got ", keys, " and ", depth);
  AttentionSpec spec;
  spec.zero_q = zeros[0];
  spec.zero_k = zeros[1];
  spec.zero_v = zeros[2];
  std::tie(spec.scale, spec.value_scale) = scales;
  spec.causal = causal;
  spec.mask = floats_at(std::get<0>(mask));
  std::tie(std::ignore, spec.mask_sequence, spec.mask_head) = mask;
  const auto [q, k, v, y] = tensors;
  const py::gil_scoped_release release;
  cpu::attention({1, queries, keys, heads, key_heads, depth, width}, spec, images,
                 reinterpret_cast<const uint8_t*>(q), reinterpret_cast<const uint8_t*>(k),
                 reinterpret_cast<const uint8_t*>(v), reinterpret_cast<float*>(y), threads);
}

/// sizes: images, steps, units. form: RecurrentKind, reverse, cells. packed: address and bytes.
/// line: scale (of the grid and of the weights) and bias. tensors: products, state, cell, result;
/// state and cell may be 0.
void recurrence(const std::array<int64_t, 3>& sizes, const std::tuple<int, bool, bool>& form,
                const std::pair<uintptr_t, size_t>& packed, const std::array<uintptr_t, 2>& line,
                const GridNumbers& grid, const std::array<uintptr_t, 4>& tensors, int threads) {
  const auto [images, steps, hidden] = sizes;
  const auto [kind, reverse, cells] = form;
  const auto [scale, zero_point, bits] = grid;
  if (*std::min_element(sizes.begin(), sizes.end()) < 1 || kind < 0 || kind >= kRecurrentKinds)
    throw InvalidArgument("recurrence: expected positive sizes and a known kind");
  RecurrenceSpec spec;
  spec.kind = static_cast<RecurrentKind>(kind);
  spec.reverse = reverse;
  spec.cells = cells;
  spec.hidden = hidden;
  spec.steps = steps;
  spec.scale = floats_at(line[0]);
  spec.bias = floats_at(line[1]);
  spec.state.inv_scale = 1.0f / scale;
  spec.state.zero_point = zero_point;
  spec.state.lo = static_cast<float>(-zero_point);
  spec.state.hi = static_cast<float>((1 << bits) - 1 - zero_point);
  cpu::RecurrenceJob job;
  job.images = images;
  const int64_t outputs = spec.outputs(), channels = spec.channels();
  job.products = {reinterpret_cast<float*>(tensors[0]), steps * outputs, outputs, 1};
  job.state = floats_at(tensors[1]);
  job.cell = floats_at(tensors[2]);
  job.reals = {reinterpret_cast<float*>(tensors[3]), steps * channels, channels, 1};
  const py::gil_scoped_release release;
  cpu::recurrent_layer(spec, bytes_at(packed.first, packed.second), job, threads);
}

/// sizes: rows, inputs, outputs, input channels per scale. packed: address and bytes. line: scale,
/// [outputs][groups], and bias. tensors: input and result, both [rows][..].
void linear(const std::array<int64_t, 4>& sizes, const std::pair<uintptr_t, size_t>& packed,
            const std::array<uintptr_t, 2>& line, const GridNumbers& input,
            const std::pair<float, float>& bounds, const std::array<uintptr_t, 2>& tensors,
            int threads) {
  const auto [rows, inputs, outputs, group] = sizes;
  if (*std::min_element(sizes.begin(), sizes.end()) < 1)
    throw InvalidArgument("linear: expected positive sizes");
  const ActivationGrid grid = cpu::activation_grid(grid_of(input));
  LinearSpec spec;
  spec.inputs = inputs;
  spec.outputs = outputs;
  spec.group = std::min(group, inputs);
  spec.scale = floats_at(line[0]);
  spec.bias = floats_at(line[1]);
  spec.qmax = grid.qmax;
  spec.zero_point = grid.zero_point;
  spec.step = std::get<0>(input);
  std::tie(spec.lo, spec.hi) = bounds;
  cpu::LinearJob job;
  job.images = rows;
  job.inv_scale = grid.inv_scale;
  job.reals = {reinterpret_cast<float*>(tensors[0]), inputs, inputs, 1};
  job.real_out = {reinterpret_cast<float*>(tensors[1]), outputs, outputs, 1};
  const py::gil_scoped_release release;
  cpu::linear_layer(spec, bytes_at(packed.first, packed.second), job, threads);
}

/// sizes: images, channels, positions. line: addresses of gamma and beta.
void float_norm(const std::array<int64_t, 3>& sizes, int64_t groups, bool about_zero, float eps,
                const std::array<uintptr_t, 2>& line, uintptr_t x, uintptr_t y, int threads) {
  GroupNormSpec spec;
  spec.groups = groups;
  spec.norm.about_zero = about_zero;
  spec.norm.eps = static_cast<double>(eps);
  spec.norm.gamma = floats_at(line[0]);
  spec.norm.beta = floats_at(line[1]);
  const py::gil_scoped_release release;
  cpu::float_norm(spec, floats_at(x), sizes[0], sizes[1], sizes[2], reinterpret_cast<float*>(y),
                  threads);
}

/// sizes: images, channels, output channels, height and width of the input. parameters: addresses
/// of weights and bias.
void float_conv(const std::array<int64_t, 5>& sizes, const py::dict& geometry,
                const std::array<uintptr_t, 2>& parameters, uintptr_t x, uintptr_t y, int threads) {
  const auto [images, channels, out_channels, h, w] = sizes;
  FloatConvSpec spec;
  spec.shape = shape_of(channels, out_channels, geometry);
  spec.shape.batch = 1;
  spec.shape.in_h = h;
  spec.shape.in_w = w;
  validate(spec.shape);
  spec.weights = floats_at(parameters[0]);
  spec.bias = floats_at(parameters[1]);
  const py::gil_scoped_release release;
  cpu::float_conv(spec, floats_at(x), images, reinterpret_cast<float*>(y), threads);
}

py::bytes pack(uintptr_t weights, size_t count, int bits, uint32_t o, uint32_t i, uint32_t kh,
               uint32_t kw) {
  std::vector<uint8_t> packed;
  {
    const py::gil_scoped_release release;
    packed = formats::pack_canonical({reinterpret_cast<const int8_t*>(weights), count}, bits, o, i,
                                     kh, kw);
  }
  return {reinterpret_cast<const char*>(packed.data()), packed.size()};
}

py::bytes unpack(uintptr_t packed, size_t size) {
  std::vector<int8_t> weights;
  {
    const py::gil_scoped_release release;
    weights = formats::unpack_canonical(bytes_at(packed, size));
  }
  return {reinterpret_cast<const char*>(weights.data()), weights.size()};
}

py::dict header(uintptr_t packed, size_t size) {
  const formats::CanonicalHeader h = formats::read_header(bytes_at(packed, size));
  py::dict d;
  d["bits"] = h.bits;
  static constexpr const char* kEncodings[] = {"dense", "bitmask", "blocks"};
  d["encoding"] = kEncodings[h.encoding];
  d["shape"] = py::make_tuple(h.out_channels, h.group_in, h.kernel_h, h.kernel_w);
  d["stored"] = h.stored;
  d["payload_bytes"] = h.payload_bytes;
  return d;
}

void bind_elementwise(py::module_& m) {
  m.def("quantize", [](uintptr_t x, int64_t n, float scale, int zero_point, int bits, uintptr_t q,
                       int threads) {
    const ActivationGrid grid = cpu::activation_grid({scale, zero_point, bits});
    const py::gil_scoped_release release;
    cpu::quantize(floats_at(x), n, grid, reinterpret_cast<uint8_t*>(q), threads);
  });
  m.def("fake_quantize", [](uintptr_t x, int64_t n, float scale, int zero_point, int bits,
                            uintptr_t y, int threads) {
    const ActivationGrid grid = cpu::activation_grid({scale, zero_point, bits});
    const py::gil_scoped_release release;
    cpu::fake_quantize(floats_at(x), n, grid, scale, reinterpret_cast<float*>(y), threads);
  });
  m.def("fma", [](uintptr_t a, uintptr_t b, uintptr_t c, int64_t n, uintptr_t y, int threads) {
    const py::gil_scoped_release release;
    cpu::fma_values(floats_at(a), floats_at(b), floats_at(c), n, reinterpret_cast<float*>(y),
                    threads);
  });
  m.def("float_function", [](int function, uintptr_t x, int64_t n, uintptr_t y, int threads) {
    if (function < 0 || function >= kFloatFunctions)
      fail<InvalidArgument>("function must be 0 to ", kFloatFunctions - 1, ", got ", function);
    const py::gil_scoped_release release;
    cpu::function_values({static_cast<FloatFunction>(function)}, floats_at(x), n,
                         reinterpret_cast<float*>(y), threads);
  });
}

}  // namespace

void bind_layers(py::module_& m) {
  py::class_<cpu::Layer>(m, "Layer").def(py::init(&make_layer)).def("run", &run_layer);
  bind_elementwise(m);
  m.def("softmax", [](uintptr_t x, int64_t images, int64_t channels, int64_t positions, uintptr_t y,
                      int threads) {
    const py::gil_scoped_release release;
    cpu::softmax(floats_at(x), images, channels, positions, reinterpret_cast<float*>(y), threads);
  });
  m.def("attention", &attention);
  m.def("float_norm", &float_norm);
  m.def("float_conv", &float_conv);
  m.def("recurrence", &recurrence);
  m.def("linear", &linear);

  m.def("pack", &pack);
  m.def("unpack", &unpack);
  m.def("header", &header);
  m.def("check_accumulator", &check_accumulator);
}

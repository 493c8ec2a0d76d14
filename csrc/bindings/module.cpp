// The extension module adalayer_native._C: raw pointers and sizes in, no torch. Tensors are checked
// by python/adalayer_native/ops.py, the only caller; what arrives here is checked again only where
// a wrong value could read or write outside its buffer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <sstream>
#include <string>
#include <utility>

#include "bindings/engine_bindings.hpp"
#include "core/cpu_features.hpp"
#include "core/host_openmp.hpp"
#include "core/status.hpp"
#include "core/thread_pool.hpp"
#include "cpu/conv/policy.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/layer/single_layer.hpp"
#include "cpu/probe.hpp"
#include "engine/planner.hpp"
#include "formats/canonical.hpp"
#include "reference/reference.hpp"

namespace py = pybind11;
using namespace adalayer;

namespace {

std::span<const uint8_t> bytes_at(uintptr_t address, size_t size) {
  return {reinterpret_cast<const uint8_t*>(address), size};
}

/// sizes: images, queries, keys, heads, key_heads, depth, width. The mask is [images or 1][heads or
/// 1][queries][keys], its strides 0 where there is one for all.
void attention(const std::array<int64_t, 7>& sizes, const std::array<int32_t, 3>& zeros,
               float scale, float value_scale, bool causal, uintptr_t mask, int64_t mask_image,
               int64_t mask_head, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t y, int threads) {
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
  spec.scale = scale;
  spec.value_scale = value_scale;
  spec.causal = causal;
  spec.mask = reinterpret_cast<const float*>(mask);
  spec.mask_sequence = mask_image;
  spec.mask_head = mask_head;
  const py::gil_scoped_release release;
  cpu::attention({1, queries, keys, heads, key_heads, depth, width}, spec, images,
                 reinterpret_cast<const uint8_t*>(q), reinterpret_cast<const uint8_t*>(k),
                 reinterpret_cast<const uint8_t*>(v), reinterpret_cast<float*>(y), threads);
}

/// (C, O, KH, KW, SH, SW, PT, PL, PB, PR, DH, DW, groups), as ops.py builds it once per layer.
ConvShape parse_shape(int64_t batch, int64_t h, int64_t w, const py::tuple& geometry) {
  if (geometry.size() != 13) throw InvalidArgument("conv2d: geometry must have 13 entries");
  int64_t v[13];
  for (size_t i = 0; i < 13; ++i)
    v[i] = geometry[i].cast<int64_t>();
  ConvShape s;
  s.batch = batch;
  s.in_h = h;
  s.in_w = w;
  s.in_channels = v[0];
  s.out_channels = v[1];
  s.kernel_h = v[2];
  s.kernel_w = v[3];
  s.stride_h = v[4];
  s.stride_w = v[5];
  s.pad_top = v[6];
  s.pad_left = v[7];
  s.pad_bottom = v[8];
  s.pad_right = v[9];
  s.dilation_h = v[10];
  s.dilation_w = v[11];
  s.groups = v[12];
  validate(s);
  return s;
}

ActivationGrid parse_grid(float scale, int zero_point, int bits) {
  if (bits < 2 || bits > 8) throw InvalidArgument("activation bits must be 2 to 8");
  const int qmax = (1 << bits) - 1;
  if (zero_point < 0 || zero_point > qmax)
    fail<InvalidArgument>("zero point must be 0 to ", qmax, ", got ", zero_point);
  if (!(scale > 0.0f) || !(scale < 3.4e38f))
    fail<InvalidArgument>("activation scale must be positive and finite, got ", scale);
  return {1.0f / scale, zero_point, qmax};
}

/// scale[o] * factor in float32: the one product that law 1's `scale` is made of.
const float* scaled(const float* scale, int64_t n, float factor) {
  thread_local AlignedBuffer buffer;
  if (buffer.size() < static_cast<size_t>(n) * 4) buffer.reset(static_cast<size_t>(n) * 4);
  auto* out = reinterpret_cast<float*>(buffer.data());
  for (int64_t i = 0; i < n; ++i)
    out[i] = scale[i] * factor;
  return out;
}

void conv2d(uintptr_t x, bool x_is_u8, bool x_nhwc, int64_t batch, int64_t h, int64_t w,
            const py::tuple& geometry, uintptr_t packed, size_t packed_bytes, uintptr_t scale,
            uintptr_t bias, float input_scale, int input_zero_point, int input_bits, uintptr_t y,
            bool y_is_u8, bool y_nhwc, float lo, float hi, int output_zero_point,
            uintptr_t residual, float grid_scale, int grid_zero_point, int grid_bits, int threads) {
  const ConvShape shape = parse_shape(batch, h, w, geometry);
  ActivationIn in{reinterpret_cast<const void*>(x), x_is_u8 ? DType::U8 : DType::F32,
                  x_nhwc ? Layout::NHWC : Layout::NCHW,
                  parse_grid(input_scale, input_zero_point, input_bits)};
  OutputSpec out;
  out.data = reinterpret_cast<void*>(y);
  out.dtype = y_is_u8 ? DType::U8 : DType::F32;
  out.layout = y_nhwc ? Layout::NHWC : Layout::NCHW;
  out.bias = reinterpret_cast<const float*>(bias);
  out.lo = lo;
  out.hi = hi;
  out.zero_point = output_zero_point;
  out.residual = reinterpret_cast<const float*>(residual);
  if (grid_bits != 0) {
    out.on_grid = true;
    out.grid = parse_grid(grid_scale, grid_zero_point, grid_bits);
    out.grid_scale = grid_scale;
  }
  const py::gil_scoped_release release;
  const auto weights =
      cpu::cached_weights(shape, bytes_at(packed, packed_bytes), cpu::largest_level(in));
  const auto* channel_scale = reinterpret_cast<const float*>(scale);
  // u8 to u8 receives the whole requantization scale from the caller.
  out.scale = x_is_u8 ? channel_scale : scaled(channel_scale, shape.out_channels, input_scale);
  cpu::conv2d(shape, in, *weights, out, threads);
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of adalayer_native (raw pointers; use adalayer_native.ops).";

  // Translators run newest first, so the base class is registered first.
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& e) {
      py::set_error(PyExc_RuntimeError, e.what());
    }
  });
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const LimitExceeded& e) {
      py::set_error(PyExc_MemoryError, e.what());
    } catch (const InvalidArgument& e) {
      py::set_error(PyExc_ValueError, e.what());
    } catch (const CorruptData& e) {
      py::set_error(PyExc_ValueError, e.what());
    }
  });

  bind_engine(m);

  m.def("conv2d", &conv2d);
  m.def("quantize", [](uintptr_t x, int64_t n, float scale, int zero_point, int bits, uintptr_t q,
                       int threads) {
    const ActivationGrid grid = parse_grid(scale, zero_point, bits);
    const py::gil_scoped_release release;
    cpu::quantize(reinterpret_cast<const float*>(x), n, grid, reinterpret_cast<uint8_t*>(q),
                  threads);
  });
  m.def("fake_quantize", [](uintptr_t x, int64_t n, float scale, int zero_point, int bits,
                            uintptr_t y, int threads) {
    const ActivationGrid grid = parse_grid(scale, zero_point, bits);
    const py::gil_scoped_release release;
    cpu::fake_quantize(reinterpret_cast<const float*>(x), n, grid, scale,
                       reinterpret_cast<float*>(y), threads);
  });

  m.def("fma", [](uintptr_t a, uintptr_t b, uintptr_t c, int64_t n, uintptr_t y, int threads) {
    const py::gil_scoped_release release;
    cpu::fma_values(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b),
                    reinterpret_cast<const float*>(c), n, reinterpret_cast<float*>(y), threads);
  });
  m.def("float_function", [](int function, uintptr_t x, int64_t n, uintptr_t y, int threads) {
    if (function < 0 || function >= kFloatFunctions)
      fail<InvalidArgument>("function must be 0 to ", kFloatFunctions - 1, ", got ", function);
    const py::gil_scoped_release release;
    cpu::function_values({static_cast<FloatFunction>(function)}, reinterpret_cast<const float*>(x),
                         n, reinterpret_cast<float*>(y), threads);
  });
  m.def("softmax", [](uintptr_t x, int64_t images, int64_t channels, int64_t positions, uintptr_t y,
                      int threads) {
    const py::gil_scoped_release release;
    cpu::softmax(reinterpret_cast<const float*>(x), images, channels, positions,
                 reinterpret_cast<float*>(y), threads);
  });

  m.def("attention", &attention);
  m.def("float_norm",
        [](uintptr_t x, int64_t images, int64_t channels, int64_t plane, int64_t groups,
           bool about_zero, float eps, uintptr_t gamma, uintptr_t beta, uintptr_t y, int threads) {
          GroupNormSpec spec;
          spec.groups = groups;
          spec.norm.about_zero = about_zero;
          spec.norm.eps = static_cast<double>(eps);
          spec.norm.gamma = reinterpret_cast<const float*>(gamma);
          spec.norm.beta = reinterpret_cast<const float*>(beta);
          const py::gil_scoped_release release;
          cpu::float_norm(spec, reinterpret_cast<const float*>(x), images, channels, plane,
                          reinterpret_cast<float*>(y), threads);
        });
  m.def("float_conv", [](const py::tuple& geometry, uintptr_t x, int64_t images, int64_t h,
                         int64_t w, uintptr_t weights, uintptr_t bias, uintptr_t y, int threads) {
    FloatConvSpec spec;
    spec.shape = parse_shape(1, h, w, geometry);
    spec.weights = reinterpret_cast<const float*>(weights);
    spec.bias = reinterpret_cast<const float*>(bias);
    const py::gil_scoped_release release;
    cpu::float_conv(spec, reinterpret_cast<const float*>(x), images, reinterpret_cast<float*>(y),
                    threads);
  });

  m.def("pack", &pack);
  m.def("unpack", &unpack);
  m.def("header", &header);
  m.def("check_accumulator", &check_accumulator);

  m.def("isas", [] {
    std::vector<std::string> names;
    for (const auto* row : cpu::kernel_rows())
      if (isa_supported(row->isa)) names.emplace_back(row->name);
    names.emplace_back("scalar");
    return names;
  });
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("force_isa", [](const std::string& name) { force_isa(name); });
  m.def("set_sparse_policy", [](const std::string& name) {
    cpu::set_sparse_policy(name);
    cpu::clear_weight_cache();  // what is derived already was derived under another policy
  });
  m.def("set_winograd_policy", [](const std::string& name) {
    cpu::set_winograd_policy(name);
    cpu::clear_weight_cache();
  });
  m.def("kernels_key", [] {
    // For keys of what was measured: the kernels of this build, and who chooses among them.
    std::ostringstream key;
    key << std::hex << engine::kernels_digest() << '-' << static_cast<int>(cpu::sparse_policy())
        << static_cast<int>(cpu::winograd_policy());
    return key.str();
  });
  m.def("fork_join_seconds", [](int threads, int rounds) {
    // The cost of an empty parallel loop, for bench/test_threads.py.
    const py::gil_scoped_release release;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < rounds; ++i)
      parallel_for(threads, threads, [](int64_t, int) {});
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / rounds;
  });
  m.def("probe_cores", [](int threads) {
    // How fast the cores are now, for the classes of bench/interleave.py.
    const py::gil_scoped_release release;
    const cpu::Probe probe = cpu::probe_cores(threads);
    return std::pair(probe.seconds, probe.operations);
  });
  m.def("threading_backend", [] { return std::string(threading_backend()); });
  m.def("cpu_features", [] { return describe_cpu_features(); });
  m.def("cache_info", [] {
    const auto info = cpu::weight_cache_info();
    return py::make_tuple(info.entries, info.bytes, info.limit);
  });
  m.def("set_cache_limit", &cpu::set_weight_cache_limit);
  m.def("clear_cache", &cpu::clear_weight_cache);
}

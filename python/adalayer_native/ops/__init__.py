"""Torch operators over the native kernels: schemas, implementations, fake kernels.

Operators take the canonical packed weights (device-neutral bytes with a header), so a compiled or
exported program holds nothing that depends on the machine. The layout that the machine's kernels
want is derived on first use and cached by content.

Results have the same bits on CPU and GPU tensors. Weights are ``uint8[64 + payload]`` as
:func:`pack_weight` makes them; scales and biases are ``float32[out_channels]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adalayer_native.ops import (
    attention,
    averages,
    cpu,
    cuda,
    fake,
    floats,
    fused,
    norms,
    recurrence,
    resizing,
    transposed,
)
from adalayer_native.ops.checks import plain_eager, untraced
from adalayer_native.ops.geometry import (
    LAYER_OPERATORS,
    LayerCall,
    LayerGeometry,
    call_of,
    conv_out_shape,
    transposed_out_size,
)
from adalayer_native.ops.layer import Layer, run_cpu
from adalayer_native.ops.machine import (
    active_isa,
    force_isa,
    get_num_threads,
    isas,
    set_num_threads,
    set_sparse_policy,
    set_winograd_policy,
)
from adalayer_native.ops.packing import pack_weight, packed_info, unpack_weight

__all__ = [
    "Layer",
    "LayerGeometry",
    "active_isa",
    "conv2d",
    "conv2d_u8",
    "conv_out_shape",
    "conv_transpose2d",
    "fake_quantize",
    "force_isa",
    "get_num_threads",
    "isas",
    "linear",
    "linear_weight_only",
    "pack_weight",
    "packed_info",
    "plain_eager",
    "quantize",
    "set_num_threads",
    "set_sparse_policy",
    "set_winograd_policy",
    "transposed_out_size",
    "unpack_weight",
]

_library = torch.library.Library("adalayer", "DEF")

_CONV_ARGS = (
    "int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, int groups, "
    "float? lo=None, float? hi=None, Tensor? residual=None, float output_scale=0.0, "
    "int output_zero_point=0, int output_bits=0"
)
_library.define(
    "conv2d(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor bias, float input_scale, "
    f"int input_zero_point, int input_bits, {_CONV_ARGS}) -> Tensor"
)
_library.define(
    "conv2d_u8(Tensor x, Tensor weight_packed, Tensor scale, Tensor bias, int input_zero_point, "
    "int output_zero_point, int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, "
    "int groups, int lo=0, int hi=255) -> Tensor"
)
_library.define(
    "conv_transpose2d(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor bias, "
    "float input_scale, int input_zero_point, int input_bits, int[2] kernel_size, int[2] stride, "
    "int[2] padding, SymInt[2] output_padding, int[2] dilation, int groups, float? lo=None, "
    "float? hi=None, float output_scale=0.0, int output_zero_point=0, int output_bits=0) -> Tensor"
)
_library.define(
    "linear(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor bias, float input_scale, "
    "int input_zero_point, int input_bits, float? lo=None, float? hi=None) -> Tensor"
)
_library.define("quantize(Tensor x, float scale, int zero_point, int bits) -> Tensor")
_library.define("fake_quantize(Tensor x, float scale, int zero_point, int bits) -> Tensor")
_library.define(
    "linear_weight_only(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor bias) -> Tensor"
)

_library.define(
    "grid_batch_norm(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight, "
    "Tensor? bias, float eps, Tensor? qparams) -> Tensor"
)
_library.define(
    "grid_layer_norm(Tensor input, Tensor? weight, Tensor? bias, float eps, Tensor? qparams)"
    " -> Tensor"
)
_library.define("grid_unit(Tensor input, float eps, Tensor? qparams) -> Tensor")
_library.define("grid_rms_norm(Tensor input, Tensor? weight, float eps, Tensor? qparams) -> Tensor")
_library.define(
    "grid_group_norm(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? qparams) -> Tensor"
)
_library.define(
    "grid_line(Tensor input, Tensor constant, str kind, float alpha, bool left, Tensor qparams, "
    "Tensor? addend=None) -> Tensor"
)
_library.define(
    "exact_avg_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, "
    "bool ceil_mode, bool count_include_pad, Tensor? qparams) -> Tensor"
)
_library.define(
    "exact_adaptive_avg_pool2d(Tensor input, SymInt[2] output_size, Tensor? qparams) -> Tensor"
)
for _name in ("exact_mean", "exact_sum", "exact_vector_norm"):
    _library.define(f"{_name}(Tensor input, int[] dim, bool keepdim, Tensor? qparams) -> Tensor")
_library.define(
    "exact_bilinear(Tensor input, SymInt[]? output_size, bool align_corners, "
    "float[]? scale_factors, Tensor? qparams) -> Tensor"
)
_library.define(
    "grid_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float scale, Tensor query_qparams, Tensor key_qparams, Tensor value_qparams, "
    "Tensor? factor=None) -> Tensor"
)
_library.define(
    "key_mask(Tensor keys, Tensor constant, float zero, float other, bool several) -> Tensor"
)
_library.define(
    "recurrence(Tensor products, Tensor weight_packed, Tensor weight_scale, Tensor bias, "
    "float input_scale, int input_zero_point, int input_bits, Tensor? state, Tensor? cell, "
    "str kind, bool reverse, bool cells) -> Tensor"
)
_library.define("exact_softmax(Tensor input) -> Tensor")
_library.define("exact_function(Tensor input, str kind) -> Tensor")
_library.define("exact_linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
_library.define(
    "exact_conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, "
    "int[2] dilation, int groups) -> Tensor"
)
_library.define(
    "exact_conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] output_padding, int groups, int[2] dilation) -> Tensor"
)
for _function, _fake in (
    (norms.grid_batch_norm, norms.norm_fake),
    (norms.grid_layer_norm, norms.norm_fake),
    (norms.grid_group_norm, norms.norm_fake),
    (norms.grid_rms_norm, norms.norm_fake),
    (norms.grid_unit, norms.norm_fake),
    (norms.grid_line, norms.norm_fake),
    (averages.exact_avg_pool2d, averages.fake_avg_pool2d),
    (averages.exact_adaptive_avg_pool2d, averages.fake_adaptive_avg_pool2d),
    (averages.exact_mean, averages.fake_mean),
    (averages.exact_sum, averages.fake_vector_norm),
    (averages.exact_vector_norm, averages.fake_vector_norm),
    (resizing.exact_bilinear, resizing.fake_bilinear),
    (attention.grid_attention, attention.fake_attention),
    (attention.key_mask, attention.fake_key_mask),
    (fused.exact_softmax, fused.fake_softmax),
    (fused.exact_function, fused.fake_function),
    (floats.exact_linear, floats.fake_linear),
    (floats.exact_conv2d, floats.fake_conv2d),
    (transposed.exact_conv_transpose2d, transposed.fake_conv_transpose2d),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_function.__name__, untraced(_function), _device)
    torch.library.register_fake(f"adalayer::{_function.__name__}", _fake, lib=_library)


_library.impl("recurrence", untraced(recurrence.recurrence), "CPU")
torch.library.register_fake("adalayer::recurrence", recurrence.fake_recurrence, lib=_library)


def _layer_kernel(operator: str, run: Callable[[LayerCall], Tensor]) -> Callable[..., Tensor]:
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        return run(call_of(operator, args, kwargs))

    return kernel


for _name in LAYER_OPERATORS:
    for _device, _run in (("CPU", run_cpu), ("CUDA", cuda.run_cuda)):
        _library.impl(_name, untraced(_layer_kernel(_name, _run)), _device)
    _of_shapes = _layer_kernel(_name, fake.run_fake)
    torch.library.register_fake(f"adalayer::{_name}", _of_shapes, lib=_library)

for _name in ("linear_weight_only", "quantize", "fake_quantize"):
    _library.impl(_name, untraced(getattr(cpu, f"{_name}_cpu")), "CPU")
    _library.impl(_name, untraced(getattr(cuda, f"{_name}_cuda")), "CUDA")
    torch.library.register_fake(f"adalayer::{_name}", getattr(fake, f"{_name}_fake"), lib=_library)

conv2d = torch.ops.adalayer.conv2d.default
conv2d_u8 = torch.ops.adalayer.conv2d_u8.default
conv_transpose2d = torch.ops.adalayer.conv_transpose2d.default
linear = torch.ops.adalayer.linear.default
linear_weight_only = torch.ops.adalayer.linear_weight_only.default
quantize = torch.ops.adalayer.quantize.default
fake_quantize = torch.ops.adalayer.fake_quantize.default

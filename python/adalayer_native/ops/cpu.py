"""The operators on CPU tensors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native.ops.checks import (
    FLOATS,
    channels_last,
    check_input,
    check_parameters,
    conv_out_shape,
    conv_transpose_out_shape,
    dense,
    geometry_of,
    weight_only_shape,
)
from adalayer_native.ops.machine import get_num_threads
from adalayer_native.ops.packing import HEADER_BYTES, pack_weight, packed_info, unpack_weight

__all__ = [
    "conv2d_cpu",
    "conv2d_direct",
    "conv2d_u8_cpu",
    "conv_transpose2d_cpu",
    "fake_quantize_cpu",
    "linear_cpu",
    "linear_direct",
    "linear_weight_only_cpu",
    "quantize_cpu",
]

_INF = float("inf")


def conv2d_direct(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    lo: float | None = None,
    hi: float | None = None,
    residual: Tensor | None = None,
    output_scale: float = 0.0,
    output_zero_point: int = 0,
    output_bits: int = 0,
) -> Tensor:
    """The operator without the dispatcher and without checks of the parameters.

    For layers that own their (checked) parameters, where :func:`plain_eager` holds: it saves about
    a third of the overhead of a call, which is what a small layer at batch 1 mostly consists of.
    """
    check_input("conv2d", x, FLOATS, 4)
    dtype = x.dtype
    if dtype != torch.float32:
        x = x.float()
    nhwc = channels_last(x)
    if not nhwc:
        x = x.contiguous()
    n, channels, h, w = x.shape
    out_channels = weight_scale.shape[0]
    geometry = geometry_of(channels, out_channels, kernel_size, stride, padding, dilation, groups)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    shape = conv_out_shape(x, out_channels, kernel_size, stride, padding, dilation)
    out = torch.empty(shape, dtype=torch.float32, memory_format=layout)
    if residual is not None:
        if residual.shape != out.shape:
            raise ValueError(
                f"adalayer::conv2d: expected a residual of shape {list(shape)}, "
                f"got {list(residual.shape)}"
            )
        if residual.dtype != torch.float32:
            residual = residual.float()
        residual = residual.resolve_neg().contiguous(memory_format=layout)
    _C.conv2d(
        x.data_ptr(),
        False,
        nhwc,
        n,
        h,
        w,
        geometry,
        weight_packed.data_ptr(),
        weight_packed.numel(),
        weight_scale.data_ptr(),
        bias.data_ptr(),
        input_scale,
        input_zero_point,
        input_bits,
        out.data_ptr(),
        False,
        nhwc,
        -_INF if lo is None else lo,
        _INF if hi is None else hi,
        0,
        0 if residual is None else residual.data_ptr(),
        output_scale,
        output_zero_point,
        output_bits,
        get_num_threads(),
    )
    return out if dtype == torch.float32 else out.to(dtype)


def conv2d_cpu(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor, *rest: Any
) -> Tensor:
    check_parameters("conv2d", weight_packed, weight_scale, bias)
    return conv2d_direct(x, weight_packed, weight_scale, bias, *rest)


def conv2d_u8_cpu(
    x: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    input_zero_point: int,
    output_zero_point: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    lo: int = 0,
    hi: int = 255,
) -> Tensor:
    check_input("conv2d_u8", x, (torch.uint8,), 4)
    check_parameters("conv2d_u8", weight_packed, scale, bias)
    if not 0 <= lo <= hi <= 255 or not 0 <= output_zero_point <= 255:
        raise ValueError(
            "adalayer::conv2d_u8: expected 0 <= lo <= hi <= 255 and a zero point in 0…255, "
            f"got lo={lo}, hi={hi}, output_zero_point={output_zero_point}"
        )
    nhwc = channels_last(x)
    if not nhwc:
        x = x.contiguous()
    n, channels, h, w = x.shape
    out_channels = scale.shape[0]
    geometry = geometry_of(channels, out_channels, kernel_size, stride, padding, dilation, groups)
    out = torch.empty(
        conv_out_shape(x, out_channels, kernel_size, stride, padding, dilation),
        dtype=torch.uint8,
        memory_format=torch.channels_last if nhwc else torch.contiguous_format,
    )
    _C.conv2d(
        x.data_ptr(),
        True,
        nhwc,
        n,
        h,
        w,
        geometry,
        weight_packed.data_ptr(),
        weight_packed.numel(),
        scale.data_ptr(),
        bias.data_ptr(),
        1.0,
        input_zero_point,
        8,
        out.data_ptr(),
        True,
        nhwc,
        float(lo - output_zero_point),
        float(hi - output_zero_point),
        output_zero_point,
        0,
        0.0,
        0,
        0,
        get_num_threads(),
    )
    return out


# Weights of transposed convolutions with their kernels flipped, by their canonical header, which
# holds a hash of the content. Small next to the layouts that the kernels derive from them.
_FLIPPED_LIMIT = 64
_flipped: OrderedDict[bytes, Tensor] = OrderedDict()
_flipped_lock = threading.Lock()


def _flipped_weight(packed: Tensor) -> Tensor:
    key = packed[:HEADER_BYTES].numpy().tobytes()
    with _flipped_lock:
        found = _flipped.get(key)
        if found is not None:
            _flipped.move_to_end(key)
            return found
    flipped = pack_weight(unpack_weight(packed).flip(2, 3), packed_info(packed)["bits"])
    with _flipped_lock:
        _flipped[key] = flipped
        while len(_flipped) > _FLIPPED_LIMIT:
            _flipped.popitem(last=False)
    return flipped


def _transposed_padding(
    kernel_size: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) around the spread-out input; a negative one cuts off."""
    top, left = (d * (k - 1) - p for d, k, p in zip(dilation, kernel_size, padding, strict=True))
    return top, left, top + output_padding[0], left + output_padding[1]


def conv_transpose2d_cpu(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    lo: float | None = None,
    hi: float | None = None,
    output_scale: float = 0.0,
    output_zero_point: int = 0,
    output_bits: int = 0,
) -> Tensor:
    """A convolution with the flipped kernel over the input, its pixels ``stride`` apart.

    The 0.0 between them is a level of every grid and adds nothing to the integer sums.
    """
    check_parameters("conv_transpose2d", weight_packed, weight_scale, bias)
    shape = conv_transpose_out_shape(
        x, weight_scale.shape[0], kernel_size, stride, padding, output_padding, dilation
    )
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    n, channels, h, w = x.shape
    spread = torch.empty(
        (n, channels, (h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1),
        dtype=x.dtype,
        memory_format=layout,
    ).zero_()
    spread[:, :, :: stride[0], :: stride[1]] = x
    around = _transposed_padding(kernel_size, padding, output_padding, dilation)
    if min(around) < 0:
        top, left, bottom, right = (max(-p, 0) for p in around)
        spread = spread[:, :, top : spread.shape[2] - bottom, left : spread.shape[3] - right]
        spread = spread.contiguous(memory_format=layout)
        around = tuple(max(p, 0) for p in around)  # type: ignore[assignment]
    out = conv2d_direct(
        spread,
        _flipped_weight(weight_packed),
        weight_scale,
        bias,
        input_scale,
        input_zero_point,
        input_bits,
        kernel_size,
        (1, 1),
        around,
        dilation,
        groups,
        lo,
        hi,
        None,
        output_scale,
        output_zero_point,
        output_bits,
    )
    assert tuple(out.shape) == shape
    return out


def linear_direct(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    input_scale: float,
    input_zero_point: int,
    input_bits: int,
    lo: float | None = None,
    hi: float | None = None,
) -> Tensor:
    """The operator without the dispatcher, see :func:`conv2d_direct`."""
    check_input("linear", x, FLOATS, None)
    dtype = x.dtype
    x = x.float().contiguous()
    features, out_features = x.shape[-1], weight_scale.shape[0]
    out = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    geometry = geometry_of(features, out_features, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    _C.conv2d(
        x.data_ptr(),
        False,
        True,
        x.numel() // features,
        1,
        1,
        geometry,
        weight_packed.data_ptr(),
        weight_packed.numel(),
        weight_scale.data_ptr(),
        bias.data_ptr(),
        input_scale,
        input_zero_point,
        input_bits,
        out.data_ptr(),
        False,
        True,
        -_INF if lo is None else lo,
        _INF if hi is None else hi,
        0,
        0,
        0.0,
        0,
        0,
        get_num_threads(),
    )
    return out if dtype == torch.float32 else out.to(dtype)


def linear_cpu(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor, *rest: Any
) -> Tensor:
    if x.dim() == 0:
        raise ValueError("adalayer::linear: expected an input of at least one dimension")
    check_parameters("linear", weight_packed, weight_scale, bias)
    return linear_direct(x, weight_packed, weight_scale, bias, *rest)


def quantize_cpu(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("quantize", x, FLOATS, None)
    x = dense(x.float())
    out = torch.empty_like(x, dtype=torch.uint8)
    _C.quantize(x.data_ptr(), x.numel(), scale, zero_point, bits, out.data_ptr(), get_num_threads())
    return out


def fake_quantize_cpu(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("fake_quantize", x, FLOATS, None)
    dtype = x.dtype
    x = dense(x.float())
    out = torch.empty_like(x)
    _C.fake_quantize(
        x.data_ptr(), x.numel(), scale, zero_point, bits, out.data_ptr(), get_num_threads()
    )
    return out if dtype == torch.float32 else out.to(dtype)


def linear_weight_only_cpu(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """The same function by torch, for comparison; slow."""
    shape = weight_only_shape(x, weight_scale)
    check_parameters("linear_weight_only", weight_packed, weight_scale, bias)
    weight = unpack_weight(weight_packed).flatten(1).float()
    y = (x.float().reshape(-1, x.shape[-1]) @ weight.T) * weight_scale + bias
    return y.to(x.dtype).reshape(shape)

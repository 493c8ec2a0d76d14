"""The operators on GPU tensors. The CUDA library is loaded by the first call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adalayer_native import cuda
from adalayer_native.cuda import LayerGeometry
from adalayer_native.errors import InputError
from adalayer_native.ops.checks import (
    FLOATS,
    channels_last,
    check_input,
    check_parameters,
    conv_out_shape,
    conv_transpose_out_shape,
    dense,
    weight_only_shape,
)

__all__ = [
    "conv2d_cuda",
    "conv2d_u8_cuda",
    "conv_transpose2d_cuda",
    "fake_quantize_cuda",
    "linear_cuda",
    "linear_weight_only_cuda",
    "quantize_cuda",
]


def _same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise InputError(
                f"adalayer::{op}: the input is on {x.device}, but {name} is on {t.device}"
            )


def _ordered(x: Tensor) -> tuple[Tensor, bool]:
    """x in float32 and in memory order, and whether that is channels_last."""
    nhwc = channels_last(x)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return x.float().contiguous(memory_format=layout), nhwc


def _convolve(
    op: str,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    g: LayerGeometry,
    residual: Tensor | None,
) -> Tensor:
    check_parameters(op, packed, scale, bias)
    _same_device(op, x, weight_packed=packed, scale=scale, bias=bias, residual=residual)
    values, nhwc = _ordered(x)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    shape = (x.shape[0], g.out_channels, *g.out_size)
    out = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=layout)
    if residual is not None:
        if tuple(residual.shape) != shape:
            raise ValueError(
                f"adalayer::{op}: expected a residual of shape {list(shape)}, "
                f"got {list(residual.shape)}"
            )
        residual = residual.float().contiguous(memory_format=layout)
    if out.numel() > 0:
        cuda.run_layer(g, values, packed, scale, bias, residual, out, nhwc=nhwc)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def _output_grid(scale: float, zero_point: int, bits: int) -> tuple[float, int, int] | None:
    return (scale, zero_point, bits) if bits else None


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def _four(values: Sequence[int]) -> tuple[int, int, int, int]:
    top, left, bottom, right = values
    return int(top), int(left), int(bottom), int(right)


def conv2d_cuda(
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
    check_input("conv2d", x, FLOATS, 4)
    out_channels = weight_scale.shape[0]
    shape = conv_out_shape(x, out_channels, kernel_size, stride, padding, dilation)
    g = LayerGeometry(
        x.shape[1],
        x.shape[2],
        x.shape[3],
        out_channels,
        shape[2:],
        _pair(kernel_size),
        _pair(stride),
        _four(padding),
        _pair(dilation),
        groups,
        input_scale,
        input_zero_point,
        input_bits,
        lo,
        hi,
        grid=_output_grid(output_scale, output_zero_point, output_bits),
    )
    return _convolve("conv2d", x, weight_packed, weight_scale, bias, g, residual)


def conv2d_u8_cuda(
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
    if not 0 <= lo <= hi <= 255 or not 0 <= output_zero_point <= 255:
        raise ValueError(
            "adalayer::conv2d_u8: expected 0 <= lo <= hi <= 255 and a zero point in 0…255, "
            f"got lo={lo}, hi={hi}, output_zero_point={output_zero_point}"
        )
    shape = conv_out_shape(x, scale.shape[0], kernel_size, stride, padding, dilation)
    g = LayerGeometry(
        x.shape[1],
        x.shape[2],
        x.shape[3],
        scale.shape[0],
        shape[2:],
        _pair(kernel_size),
        _pair(stride),
        _four(padding),
        _pair(dilation),
        groups,
        1.0,
        input_zero_point,
        8,
        float(lo - output_zero_point),
        float(hi - output_zero_point),
        grid=(1.0, output_zero_point, 8),
    )
    # Levels as the numbers that they are on a grid of step 1, and back: whole numbers, exactly.
    relative = x.float() - input_zero_point
    out = _convolve("conv2d_u8", relative, weight_packed, scale, bias, g, None)
    return (out + output_zero_point).to(torch.uint8)


def conv_transpose2d_cuda(
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
    shape = conv_transpose_out_shape(
        x, weight_scale.shape[0], kernel_size, stride, padding, output_padding, dilation
    )
    pad_h, pad_w = padding
    g = LayerGeometry(
        x.shape[1],
        x.shape[2],
        x.shape[3],
        weight_scale.shape[0],
        shape[2:],
        _pair(kernel_size),
        _pair(stride),
        (pad_h, pad_w, pad_h, pad_w),
        _pair(dilation),
        groups,
        input_scale,
        input_zero_point,
        input_bits,
        lo,
        hi,
        transposed=True,
        grid=_output_grid(output_scale, output_zero_point, output_bits),
    )
    return _convolve("conv_transpose2d", x, weight_packed, weight_scale, bias, g, None)


def linear_cuda(
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
    check_input("linear", x, FLOATS, None)
    if x.dim() == 0:
        raise ValueError("adalayer::linear: expected an input of at least one dimension")
    features, out_features = x.shape[-1], weight_scale.shape[0]
    one = (1, 1)
    g = LayerGeometry(
        features,
        1,
        1,
        out_features,
        one,
        one,
        one,
        (0, 0, 0, 0),
        one,
        1,
        input_scale,
        input_zero_point,
        input_bits,
        lo,
        hi,
    )
    rows = x.contiguous().reshape(-1, features, 1, 1)
    out = _convolve("linear", rows, weight_packed, weight_scale, bias, g, None)
    return out.reshape(*x.shape[:-1], out_features)


def quantize_cuda(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("quantize", x, FLOATS, None)
    values = dense(x.float())
    out = torch.empty_like(values, dtype=torch.uint8)
    cuda.on_grid(values, scale, zero_point, bits, out, real=False)
    return out


def fake_quantize_cuda(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("fake_quantize", x, FLOATS, None)
    values = dense(x.float())
    out = torch.empty_like(values)
    cuda.on_grid(values, scale, zero_point, bits, out, real=True)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def linear_weight_only_cuda(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    shape = weight_only_shape(x, weight_scale)
    check_parameters("linear_weight_only", weight_packed, weight_scale, bias)
    _same_device(
        "linear_weight_only", x, weight_packed=weight_packed, scale=weight_scale, bias=bias
    )
    return cuda.linear_float(x.contiguous(), weight_packed, weight_scale, bias, shape)

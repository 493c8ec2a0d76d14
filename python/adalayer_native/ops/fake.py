"""What the operators return, without values: for tracing, exporting and compiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adalayer_native.ops.checks import (
    FLOATS,
    channels_last,
    check_input,
    conv_out_shape,
    conv_transpose_out_shape,
    dense,
    weight_only_shape,
)

__all__ = [
    "conv2d_fake",
    "conv2d_u8_fake",
    "conv_transpose2d_fake",
    "fake_quantize_fake",
    "linear_fake",
    "linear_weight_only_fake",
    "quantize_fake",
]


def conv2d_fake(
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
    *rest: Any,
) -> Tensor:
    check_input("conv2d", x, FLOATS, 4)
    return _empty_like_input(x, weight_scale.shape[0], kernel_size, stride, padding, dilation)


def _empty_like_input(x: Tensor, out_channels: int, *geometry: Sequence[int]) -> Tensor:
    """Output of a convolution: the input's dtype, device and memory format."""
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    shape = conv_out_shape(x, out_channels, *geometry)
    return x.new_empty(shape).contiguous(memory_format=layout)


def conv2d_u8_fake(
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
    *rest: Any,
) -> Tensor:
    check_input("conv2d_u8", x, (torch.uint8,), 4)
    return _empty_like_input(x, scale.shape[0], kernel_size, stride, padding, dilation)


def conv_transpose2d_fake(
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
    *rest: Any,
) -> Tensor:
    shape = conv_transpose_out_shape(
        x, weight_scale.shape[0], kernel_size, stride, padding, output_padding, dilation
    )
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    return x.new_empty(shape).contiguous(memory_format=layout)


def linear_fake(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor, *rest: Any
) -> Tensor:
    check_input("linear", x, FLOATS, None)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


def quantize_fake(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("quantize", x, FLOATS, None)
    return torch.empty_like(dense(x), dtype=torch.uint8)


def fake_quantize_fake(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("fake_quantize", x, FLOATS, None)
    return torch.empty_like(dense(x))


def linear_weight_only_fake(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    return x.new_empty(weight_only_shape(x, weight_scale))

"""Layers and norms that stay in float32, by the engine's own steps (csrc/reference/float_conv.hpp).

torch's float kernels add up in an order that depends on the machine, the batch and the threads.
Here every result has one order, so that modules, simulation and engine have the same bits. On a GPU
the layers are torch's own: what reads them there may differ in its last bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adalayer_native import _C
from adalayer_native.operations import geometry
from adalayer_native.ops.checks import FLOATS, check_input
from adalayer_native.ops.geometry import conv_out_shape
from adalayer_native.ops.machine import get_num_threads

__all__ = [
    "exact_conv2d",
    "exact_linear",
    "fake_conv2d",
    "fake_linear",
    "float_group_norm",
    "float_row_norm",
]


def _weights(op: str, weight: Tensor, bias: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Both as contiguous float32; ``size``: elements of the weight per output."""
    outs = weight.shape[0]
    if weight.numel() != outs * size or (bias is not None and bias.shape != (outs,)):
        got = [list(weight.shape), None if bias is None else list(bias.shape)]
        raise ValueError(f"adalayer::{op}: weight and bias of {got} do not fit its input")
    if bias is None:
        bias = torch.zeros(outs)
    return weight.detach().float().contiguous(), bias.detach().float().contiguous()


def _convolve(
    x: Tensor,
    size: tuple[int, int, int],
    by_name: dict[str, int],
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
) -> None:
    """`size`: channels, height and width of an image of `x`."""
    if out.numel():
        channels, h, w = size
        sizes = x.numel() // (channels * h * w), channels, bias.shape[0], h, w
        parameters = weight.data_ptr(), bias.data_ptr()
        _C.float_conv(sizes, by_name, parameters, x.data_ptr(), out.data_ptr(), get_num_threads())


@torch.no_grad()
def exact_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with sums in the order of the features.

    Args:
        input: float ``[..., in_features]``.
        weight: float ``[out_features, in_features]``.
    """
    check_input("exact_linear", input, FLOATS, None)
    if input.device.type != "cpu":
        return F.linear(input, weight, bias)
    features = input.shape[-1]
    weights, biases = _weights("exact_linear", weight, bias, features)
    x = input.float().resolve_neg().contiguous()
    out = torch.empty(*x.shape[:-1], weights.shape[0])
    _convolve(x, (features, 1, 1), geometry((1, 1)), weights, biases, out)
    return out.to(input)


def fake_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Shape of :func:`exact_linear`."""
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.no_grad()
def exact_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``F.conv2d`` with sums in the order of the weights.

    Args:
        input: float ``[N, C, H, W]``.
        weight: float ``[O, C / groups, KH, KW]``.
        padding: top, left, bottom, right.
    """
    check_input("exact_conv2d", input, FLOATS, 4)
    if input.device.type != "cpu":
        top, left, bottom, right = padding
        padded = F.pad(input, (left, right, top, bottom))
        return F.conv2d(padded, weight, bias, stride, 0, dilation, groups)
    channels, h, w = input.shape[1:]
    outs, kernel = weight.shape[0], list(weight.shape[2:])
    shape = conv_out_shape(input.shape, outs, kernel, stride, padding, dilation)
    size = channels // groups * kernel[0] * kernel[1]
    weights, biases = _weights("exact_conv2d", weight, bias, size)
    x = input.float().resolve_neg().contiguous()
    out = torch.empty(shape)
    by_name = geometry(kernel, stride, padding, dilation, groups)
    _convolve(x, (channels, h, w), by_name, weights, biases, out)
    return out.to(input)


def fake_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Shape of :func:`exact_conv2d`."""
    outs, kernel = weight.shape[0], weight.shape[2:]
    shape = conv_out_shape(input.shape, outs, kernel, stride, padding, dilation)
    return input.new_empty(shape)


def _norm(
    x: Tensor,
    images: int,
    channels: int,
    plane: int,
    groups: int,
    about_zero: bool,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    out = torch.empty_like(x)
    gamma = torch.ones(channels) if weight is None else weight.detach().float().cpu().contiguous()
    beta = torch.zeros(channels) if bias is None else bias.detach().float().cpu().contiguous()
    if x.numel():
        _C.float_norm(
            (images, channels, plane), groups, about_zero, eps,
            (gamma.data_ptr(), beta.data_ptr()), x.data_ptr(), out.data_ptr(), get_num_threads(),
        )  # fmt: skip
    return out


def float_row_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, about_zero: bool
) -> Tensor:
    """Layer norm, or RMS norm (``about_zero``), of floats over the last axis."""
    x = input.float().cpu().resolve_neg().contiguous()
    channels = x.shape[-1]
    if weight is not None:
        weight = weight.reshape(-1)
    rows = x.numel() // max(1, channels)
    return _norm(x, rows, channels, 1, 0, about_zero, eps, weight, bias).to(input)


def float_group_norm(
    input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm of floats ``[N, C, ...]``."""
    x = input.float().cpu().resolve_neg().contiguous()
    n, channels = x.shape[:2]
    plane = x.numel() // max(1, n * channels)
    return _norm(x, n, channels, plane, groups, False, eps, weight, bias).to(input)

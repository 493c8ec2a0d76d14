"""Averages and norms whose bits do not depend on the order of additions, as the engine takes them.

Values on a u8 grid are added up as whole numbers (csrc/reference/image_spec.hpp); others in
float64, where the order shows only beyond what float32 holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adalayer_native.ops.grids import levels

__all__ = [
    "exact_adaptive_avg_pool2d",
    "exact_avg_pool2d",
    "exact_mean",
    "exact_sum",
    "exact_vector_norm",
    "fake_adaptive_avg_pool2d",
    "fake_avg_pool2d",
    "fake_mean",
    "fake_vector_norm",
]


def _average(sums: Tensor, divisor: Tensor, qparams: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Float64 sums, of values or of levels relative to the zero point, by their divisors."""
    if qparams is None:
        return (sums / divisor).to(dtype)
    return (sums.float() * (qparams[0] / divisor.float())).to(dtype)


def _terms(x: Tensor, qparams: Tensor | None) -> Tensor:
    """What is added up, in float64: whole numbers where values lie on a grid."""
    return x.double() if qparams is None else levels(x, qparams).double() - qparams[1].double()


def _along(size: int, out: int, kernel: int, stride: int, pad: int, padded: bool) -> Tensor:
    """Positions that the windows along one axis count: int64 ``[out]``."""
    start = torch.arange(out) * stride - pad
    if padded:
        return (start + kernel).clamp(max=size + pad) - start
    return (start + kernel).clamp(max=size) - start.clamp(min=0)


@torch.no_grad()
def exact_avg_pool2d(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    qparams: Tensor | None,
) -> Tensor:
    """``F.avg_pool2d`` of ``[N, C, H, W]``.

    Args:
        qparams: float32 ``[3]``: scale, zero point and bits of the grid that the input lies on;
            None for any float input.
    """
    kernel, stride, padding = list(kernel_size), list(stride), list(padding)
    terms = _terms(input, qparams)
    sums = F.avg_pool2d(terms, kernel, stride, padding, ceil_mode, divisor_override=1)
    rows, columns = (
        _along(terms.shape[axis], sums.shape[axis], k, s, p, count_include_pad)
        for axis, k, s, p in zip((-2, -1), kernel, stride, padding, strict=True)
    )
    divisor = torch.outer(rows, columns).to(sums)
    return _average(sums, divisor, qparams, input.dtype)


def _shares(size: int, out: int) -> Tensor:
    """Positions of the windows of an adaptive pooling along one axis: int64 ``[out]``."""
    index = torch.arange(out)
    return ((index + 1) * size + out - 1) // out - index * size // out


@torch.no_grad()
def exact_adaptive_avg_pool2d(
    input: Tensor, output_size: Sequence[int], qparams: Tensor | None
) -> Tensor:
    """``F.adaptive_avg_pool2d`` of ``[N, C, H, W]``; see :func:`exact_avg_pool2d`."""
    terms = _terms(input, qparams)
    out_h, out_w = output_size
    divisor = torch.outer(_shares(terms.shape[-2], out_h), _shares(terms.shape[-1], out_w))
    divisor = divisor.to(terms)
    means = F.adaptive_avg_pool2d(terms, (out_h, out_w))
    if qparams is None:
        return means.to(input.dtype)
    # Means of whole numbers give their sums back: they are far below 2^53.
    return _average((means * divisor).round_(), divisor, qparams, input.dtype)


@torch.no_grad()
def exact_mean(input: Tensor, dim: Sequence[int], keepdim: bool, qparams: Tensor | None) -> Tensor:
    """``input.mean(dim, keepdim)``; see :func:`exact_avg_pool2d`."""
    terms = _terms(input, qparams)
    count = math.prod(terms.shape[axis] for axis in dim)
    sums = terms.sum(list(dim), keepdim)
    return _average(sums, torch.full((), count).to(terms), qparams, input.dtype)


@torch.no_grad()
def exact_sum(input: Tensor, dim: Sequence[int], keepdim: bool, qparams: Tensor | None) -> Tensor:
    """``input.sum(dim, keepdim)``: a mean times the number of values, each rounded; see
    :func:`exact_avg_pool2d`."""
    terms = _terms(input, qparams)
    count = math.prod(terms.shape[axis] for axis in dim)
    sums = terms.sum(list(dim), keepdim)
    if qparams is not None:
        sums = sums * qparams[0].double()
    return ((sums / count).float() * float(count)).to(input.dtype)


@torch.no_grad()
def exact_vector_norm(
    input: Tensor, dim: Sequence[int], keepdim: bool, qparams: Tensor | None
) -> Tensor:
    """``torch.linalg.vector_norm(input, 2, dim, keepdim)``; see :func:`exact_avg_pool2d`."""
    root = _terms(input, qparams).square().sum(list(dim), keepdim).sqrt()
    return (root if qparams is None else root * qparams[0].double()).to(input.dtype)


def fake_avg_pool2d(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    qparams: Tensor | None,
) -> Tensor:
    """Shape of :func:`exact_avg_pool2d`."""
    kernel, stride, padding = list(kernel_size), list(stride), list(padding)
    return F.avg_pool2d(input, kernel, stride, padding, ceil_mode, count_include_pad)


def fake_adaptive_avg_pool2d(
    input: Tensor, output_size: Sequence[int], qparams: Tensor | None
) -> Tensor:
    """Shape of :func:`exact_adaptive_avg_pool2d`."""
    out_h, out_w = output_size
    return F.adaptive_avg_pool2d(input, (out_h, out_w))


def fake_mean(input: Tensor, dim: Sequence[int], keepdim: bool, qparams: Tensor | None) -> Tensor:
    """Shape of :func:`exact_mean`."""
    return input.mean(list(dim), keepdim)


def fake_vector_norm(
    input: Tensor, dim: Sequence[int], keepdim: bool, qparams: Tensor | None
) -> Tensor:
    """Shape of :func:`exact_vector_norm` and :func:`exact_sum`."""
    return input.sum(list(dim), keepdim)

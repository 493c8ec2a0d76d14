"""Norms and lines of values on a grid, by the engine's own steps (csrc/reference/image_spec.hpp).

Norms without a grid are of floats, in the order of the engine's sums.

torch adds up floats in an order of its own, which differs between machines; a result that lies half
way between two levels is then rounded up on one and down on another. Here the sums are of whole
numbers, and what follows is a fixed sequence of float32 and float64 operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adalayer_native.ops.floats import float_group_norm, float_row_norm
from adalayer_native.ops.fused import fma
from adalayer_native.ops.grids import levels

__all__ = [
    "grid_batch_norm",
    "grid_group_norm",
    "grid_layer_norm",
    "grid_line",
    "grid_rms_norm",
    "grid_unit",
    "line_of",
    "norm_fake",
    "unit_as_rms",
]


@torch.no_grad()
def grid_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    qparams: Tensor | None,
) -> Tensor:
    """``fma(q, s[c], t[c])`` with ``s = k * scale``, ``t = beta - mean * k - z * s`` in float64.

    Args:
        input: float ``[N, C, ...]`` on a grid.
        qparams: float32 ``[3]``: the grid's scale, zero point and bits; None: ``q`` is the input,
            with scale 1 and zero point 0.
    """
    if qparams is None:
        q, (scale, zero_point) = input.float(), (1.0, 0.0)
    else:
        q, (scale, zero_point) = levels(input, qparams), qparams[:2].tolist()
    gamma = 1.0 if weight is None else weight.double()
    beta = 0.0 if bias is None else bias.double()
    factor = gamma / (running_var.double() + eps).sqrt()
    offset = beta - running_mean.double() * factor
    step = factor * scale
    shape = [1, -1, *[1] * (input.dim() - 2)]
    multiplier, addend = (t.float().view(shape) for t in (step, offset - zero_point * step))
    return fma(q, multiplier, addend).to(input.dtype)


def _normalised(q: Tensor, scale: float, eps: float) -> Tensor:
    """Levels over the last axis without their mean, by their deviation: float32."""
    count = q.shape[-1]
    whole = q.long()
    s1, s2 = whole.sum(-1, keepdim=True), whole.square().sum(-1, keepdim=True)
    variance = (count * s2 - s1 * s1).double() / (float(count) * count)
    # The program holds eps in float32.
    least = float(torch.tensor(eps, dtype=torch.float32))
    factor = (1.0 / (variance * (scale * scale) + least).sqrt() * scale).float()
    return (q.double() - s1.double() / count).float() * factor


@torch.no_grad()
def grid_layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    qparams: Tensor | None,
) -> Tensor:
    """Mean and variance from sums of the levels, over the last axis.

    Args:
        input: float ``[..., C]`` on a grid.
        qparams: float32 ``[3]``: the grid's scale, zero point and bits; None: sums of the floats.
    """
    if qparams is None:
        return float_row_norm(input, weight, bias, eps, False)
    y = _normalised(levels(input, qparams), float(qparams[0]), eps)
    gamma = y.new_ones(()) if weight is None else weight.float()
    beta = y.new_zeros(()) if bias is None else bias.float()
    return fma(y, gamma, beta).to(input.dtype)


@torch.no_grad()
def grid_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    qparams: Tensor | None,
) -> Tensor:
    """Mean and variance from sums of the levels, over all positions and a group's channels.

    Args:
        input: float ``[N, C, ...]`` on a grid.
        num_groups: of neighbouring channels.
        qparams: float32 ``[3]``: the grid's scale, zero point and bits; None: sums of the floats.
    """
    if qparams is None:
        return float_group_norm(input, num_groups, weight, bias, eps)
    flat = levels(input, qparams).reshape(input.shape[0], num_groups, -1)
    y = _normalised(flat, float(qparams[0]), eps).reshape(input.shape)
    shape = [1, -1, *[1] * (input.dim() - 2)]
    gamma = y.new_ones(()) if weight is None else weight.float().view(shape)
    beta = y.new_zeros(()) if bias is None else bias.float().view(shape)
    return fma(y, gamma, beta).to(input.dtype)


@torch.no_grad()
def grid_rms_norm(
    input: Tensor, weight: Tensor | None, eps: float, qparams: Tensor | None
) -> Tensor:
    """The root mean square from a sum of the levels' squares, over the last axis.

    Args:
        input: float ``[..., C]`` on a grid.
        weight: of one axis, whatever axes of size 1 stand before it.
        qparams: float32 ``[3]``: the grid's scale, zero point and bits; None: a sum of the floats'.
    """
    if qparams is None:
        return float_row_norm(input, weight, None, eps, True)
    scale, zero_point = qparams[:2].tolist()
    q = levels(input, qparams).double() - zero_point
    mean = q.square().sum(-1, keepdim=True) / q.shape[-1]
    least = float(torch.tensor(eps, dtype=torch.float32))
    factor = (1.0 / (mean * (scale * scale) + least).sqrt() * scale).float()
    y = q.float() * factor
    gamma = y.new_ones(()) if weight is None else weight.float().reshape(-1)
    # (The sum turns -0 into 0, as the engine's does.)
    return (y * gamma + 0.0).to(input.dtype)


def unit_as_rms(count: int, eps: float) -> tuple[float, float]:
    """Weight and eps of an RMS norm of vectors with so many elements, whose results have length one
    as ``F.normalize`` gives it.

    The largest of a length and eps is the root of the sum of their squares unless they are about as
    large, which levels are not: they are zero, or steps of a grid.
    """
    return 1.0 / math.sqrt(count), max(eps**2 / count, torch.finfo(torch.float32).tiny)


@torch.no_grad()
def grid_unit(input: Tensor, eps: float, qparams: Tensor | None) -> Tensor:
    """``F.normalize(input, dim=-1, eps=eps)``, as :func:`grid_rms_norm` computes it."""
    count = input.shape[-1]
    weight, least = unit_as_rms(count, eps)
    return grid_rms_norm(input, torch.full((count,), weight), least, qparams)


def line_of(kind: str, constant: Tensor, alpha: float, left: bool) -> tuple[Tensor, Tensor]:
    """Factor and offset, float64, of a product, quotient, sum or difference with a constant.

    Args:
        kind: "mul", "div", "add" or "sub"; a constant is never divided.
        alpha: of sums and differences: what torch multiplies their second operand with.
        left: the constant is the first operand.
    """
    c = constant.double()
    one, zero = torch.ones_like(c), torch.zeros_like(c)
    if kind == "mul":
        return c, zero
    if kind == "div":
        return one / c, zero
    sign = alpha if kind == "add" else -alpha
    return (sign * one, c) if left else (one, sign * c)


@torch.no_grad()
def grid_line(
    input: Tensor,
    constant: Tensor,
    kind: str,
    alpha: float,
    left: bool,
    qparams: Tensor,
    addend: Tensor | None = None,
) -> Tensor:
    """``fma(q, s, t)`` with ``s = factor * scale`` and ``t = offset - z * s`` in float64.

    Args:
        input: float, on a grid.
        constant: broadcasts with it.
        kind, alpha, left: see :func:`line_of`.
        qparams: float32 ``[3]``: the grid's scale, zero point and bits.
        addend: what is added to a product or quotient; broadcasts with the input.
    """
    factor, offset = line_of(kind, constant, alpha, left)
    if addend is not None:
        offset = offset + addend.double()
    scale, zero_point = qparams[:2].tolist()
    step = factor * scale
    y = fma(levels(input, qparams), step.float(), (offset - zero_point * step).float())
    return y.to(input.dtype)


def norm_fake(input: Tensor, *rest: object) -> Tensor:
    """What any of them returns, without values."""
    return torch.empty_like(input)

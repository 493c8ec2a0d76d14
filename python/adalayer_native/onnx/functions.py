"""What ONNX operators compute where torch has no function of its own for it.

Graphs of imported networks call these; they are ordinary functions of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adalayer_native.errors import InputError

__all__ = [
    "auto_padding",
    "average_pool",
    "dequantize",
    "dynamic_quantize",
    "integer_convolution",
    "integer_product",
    "integers_of",
    "norm_pool",
    "normalized",
    "pad",
    "quantize",
    "resize",
    "response_norm",
    "size_of",
    "sized",
    "softmax_flat",
    "tensor_of",
    "top_k",
]


def sized(x: Tensor, name: str, sizes: Sequence[int | tuple[int, int, int] | None]) -> Tensor:
    """The tensor itself, if it has these sizes.

    Args:
        name: of the input, for the message.
        sizes: None stands for any, three numbers for the smallest, the largest, and what all are
            multiples of.

    Raises:
        InputError: it has others, for which the file's operators would be other ones.
    """
    fits = x.dim() == len(sizes)
    if not fits or not all(_allowed(x.shape[i], n) for i, n in enumerate(sizes)):
        shown = ", ".join(map(_said, sizes))
        raise InputError(f"input {name!r}: expected sizes [{shown}], got {list(x.shape)}")
    return x


def _allowed(n: int, size: int | tuple[int, int, int] | None) -> bool:
    if isinstance(size, (tuple, list)):
        low, high, step = size
        return bool(low <= n and n <= high and (step == 1 or n % step == 0))
    return size is None or bool(n == size)


def _said(size: int | tuple[int, int, int] | None) -> str:
    if isinstance(size, (tuple, list)):
        low, high, step = size
        return f"{low} to {high}" + (f" by {step}" if step > 1 else "")
    return "any" if size is None else f"{size}"


def size_of(x: Tensor, axis: int) -> int:
    """Elements along an axis."""
    return x.shape[axis]


def tensor_of(sizes: Sequence[int], rank: int) -> Tensor:
    """Whole numbers as int64 of one axis, or none."""
    return torch.tensor(sizes if rank else sizes[0], dtype=torch.int64)


def top_k(x: Tensor, k: int, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The largest or smallest elements and their places; of equal ones the first come first."""
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, k), places.narrow(axis, 0, k)


# -- integers ---------------------------------------------------------------------------------


def integers_of(x: Tensor, scale: float, zero_point: int, lowest: int) -> Tensor:
    """Integers of values on a grid: uint8 where the lowest level is 0, else int8."""
    levels = torch.round(x / scale) + (zero_point + lowest)
    return levels.to(torch.uint8 if lowest == 0 else torch.int8)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """``clamp(rne(x / scale) + zero_point, low, high)``; operands broadcast."""
    levels = torch.round(x / scale) + zero_point.to(x.dtype)
    return levels.clamp(low, high).to(dtype)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``(q - zero_point) * scale``; operands broadcast."""
    return (q.to(torch.int32) - zero_point.to(torch.int32)).to(scale.dtype) * scale


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 levels, scale and zero point of a tensor by its own range, zero included."""
    low = torch.clamp_max(x.amin(), 0.0)
    high = torch.clamp_min(x.amax(), 0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(-low / scale).clamp(0, 255)
    levels = (torch.round(x / scale) + zero_point).clamp(0, 255)
    return levels.to(torch.uint8), scale, zero_point.to(torch.uint8)


def integer_product(a: Tensor, b: Tensor, a_zero: Tensor, b_zero: Tensor) -> Tensor:
    """int32 product of integer matrices; float64 holds all of its sums exactly."""
    left = a.double() - a_zero.double()
    return torch.matmul(left, b.double() - b_zero.double()).to(torch.int32)


def integer_convolution(
    x: Tensor,
    weight: Tensor,
    x_zero: Tensor,
    weight_zero: Tensor,
    stride: Sequence[int],
    around: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """int32 convolution of integers; ``around`` is as ``F.pad`` has it, padding means 0."""
    run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    left = F.pad(x.double() - x_zero.double(), list(around))
    right = weight.double() - weight_zero.double()
    sums = run(left, right, None, stride, 0, dilation, groups)
    return sums.to(torch.int32)


# -- windows ----------------------------------------------------------------------------------


def auto_padding(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    upper: bool,
) -> list[int]:  # fmt: skip
    """Padding in ONNX's order (begins, then ends) with which ``out = ceil(size / stride)``."""
    begins, ends = [], []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
        less = total // 2
        begins.append(less if upper else total - less)
        ends.append(total - less if upper else less)
    return begins + ends


def pad(x: Tensor, pads: Sequence[int], mode: str, value: float) -> Tensor:
    """Padding of all axes in ONNX's order (begins, then ends); negative ones cut off."""
    rank = x.dim()
    begins, ends = list(pads[:rank]), list(pads[rank:])
    for axis in range(rank):
        cut, size = (max(0, -begins[axis]), max(0, -ends[axis])), x.shape[axis]
        if any(cut):
            x = x.narrow(axis, cut[0], size - cut[0] - cut[1])
    begins, ends = [max(0, n) for n in begins], [max(0, n) for n in ends]
    if mode == "constant":
        flat = [n for axis in reversed(range(rank)) for n in (begins[axis], ends[axis])]
        while len(flat) > 2 and not any(flat[-2:]):
            del flat[-2:]
        return F.pad(x, flat, value=value)
    for axis in range(rank):
        if begins[axis] or ends[axis]:
            x = x.index_select(axis, _outside(x, axis, begins[axis], ends[axis], mode))
    return x


def _outside(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Which elements stand in a padded axis."""
    size = x.shape[axis]
    places = torch.arange(-before, size + after, device=x.device)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    if size == 1:
        return torch.zeros_like(places)
    period = 2 * (size - 1)  # reflected at the outer elements, as often as it takes
    places = places % period
    return torch.where(places < size, places, period - places)


# -- resizing -----------------------------------------------------------------------------------


def resize(
    x: Tensor, axes: Sequence[int], tables: Sequence[tuple[Tensor, Tensor]], outside: Any
) -> Tensor:
    """Weighted sums of elements along axes, one axis after the other.

    Args:
        axes: along which.
        tables: for each axis which elements, int64 ``[out, taps]``, and their weights, float32.
            An element -1 is ``outside``.
        outside: value of what lies outside of the image.
    """
    whole = not x.is_floating_point()
    dtype = x.dtype
    if whole:
        x = x.float()
    for axis, (places, weights) in zip(axes, tables, strict=True):
        out, taps = places.shape
        missing = places < 0
        chosen = x.index_select(axis, places.clamp_min(0).flatten())
        chosen = chosen.unflatten(axis, (out, taps))
        shape = [1] * chosen.dim()
        shape[axis], shape[axis + 1] = out, taps
        if outside is not None:
            chosen = torch.where(missing.view(shape), torch.full_like(chosen, outside), chosen)
        # A single tap of weight 1 is an element and no product, which may be infinite.
        x = chosen.squeeze(axis + 1) if taps == 1 else (chosen * weights.view(shape)).sum(axis + 1)
    return x.round().to(dtype) if whole else x


def softmax_flat(x: Tensor, axis: int, log: bool) -> Tensor:
    """The softmax of opsets before 13: over all axes from ``axis`` on, as one."""
    rows = x.reshape(math.prod(x.shape[:axis]), -1)
    rows = torch.log_softmax(rows, 1) if log else torch.softmax(rows, 1)
    return rows.reshape(x.shape)


# -- norms ----------------------------------------------------------------------------------------


def response_norm(x: Tensor, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    """``x / (bias + alpha / size * sum of squares)^beta`` over a window of channels."""
    before = (size - 1) // 2
    squares = F.pad(x.square().flatten(2), (0, 0, before, size - 1 - before))
    sums = squares.unfold(1, size, 1).sum(-1).reshape(x.shape)
    return x / (bias + alpha / size * sums) ** beta


def normalized(x: Tensor, p: int, axis: int) -> Tensor:
    """Along an axis of norm 1; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


# -- pools ----------------------------------------------------------------------------------------


def _sums(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Sums over windows of the axes from 2 on."""
    run: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    flat = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones(1, 1, *kernel, dtype=x.dtype, device=x.device)
    sums: Tensor = run(flat, ones, None, stride, 0, dilation)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pads: Sequence[int],
    beyond: Sequence[int],
    count_padding: bool,
) -> Tensor:
    """Averages over windows with any padding.

    Args:
        pads: begins, then ends.
        beyond: further places behind the padding that windows reach; they never count.
        count_padding: whether the padding counts as elements.
    """
    axes = len(kernel)
    around = [0, 0, *pads[:axes], 0, 0, *pads[axes:]]
    further = [0] * (axes + 2) + [0, 0, *beyond]
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    counted = pad(
        pad(ones, around, "constant", 1.0 if count_padding else 0.0), further, "constant", 0.0
    )
    padded = pad(pad(x, around, "constant", 0.0), further, "constant", 0.0)
    return _sums(padded, kernel, stride, dilation) / _sums(counted, kernel, stride, dilation)


def norm_pool(
    x: Tensor,
    p: float,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pads: Sequence[int],
    beyond: Sequence[int],
) -> Tensor:
    """``(sum |x|^p)^(1/p)`` over windows; arguments as of :func:`average_pool`."""
    axes = len(kernel)
    ends = [a + b for a, b in zip(pads[axes:], beyond, strict=True)]
    padded = pad(x.abs().pow(p), [0, 0, *pads[:axes], 0, 0, *ends], "constant", 0.0)
    return _sums(padded, kernel, stride, dilation).pow(1 / p)

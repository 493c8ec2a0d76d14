"""Grids: of weights, signed integers with one positive float32 scale per output channel, or per
group of input channels of one; of activations, levels from zero up with a scale and a zero point.

Scales of a weight ``[O, I]`` in groups are ``[O, groups]``: ``groups`` says by itself how many
input channels share one (:func:`group_size_of`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adalayer_native.errors import CalibrationError, PlanError
from adalayer_native.plan import GROUP_SIZES, MAX_BITS, MIN_BITS

# Lower end of the searched clipping range, as a fraction of a channel's largest |w|. Few levels
# pay for clipping the tail with a finer step, many levels do not; each bound lies well below the
# optimum of a heavy-tailed (Laplace) channel of several thousand weights at that width.
_LOWEST_RATIO = {2: 0.08, 3: 0.12, 4: 0.18, 5: 0.25, 6: 0.33, 7: 0.4, 8: 0.5}
_CANDIDATES = {2: 40, 3: 36, 4: 32, 5: 32, 6: 28, 7: 24, 8: 24}
_REFINEMENTS = 3
_SMALLEST_SCALE = 2.0**-120
# Of activations: it and its inverse are normal float32 numbers, as the engine wants them.
SMALLEST_STEP = 2.0**-126


def weight_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a ``bits`` wide weight: ``-2^(b-1), 2^(b-1)-1``.

    Raises:
        PlanError: ``bits`` is not an integer from 2 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise PlanError(f"weight bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits}")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def activation_grid(low: float, high: float, bits: int, name: str = "") -> tuple[float, int]:
    """Scale (a float32 value) and zero point of the ``bits`` wide grid over ``low ... high``.

    The range is widened to contain zero, which is a level. Of a range of nothing but zeros the
    scale is 1.

    Raises:
        CalibrationError: a bound is NaN or infinite, or ``low > high``; ``name`` names the tensor.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise CalibrationError(
            f"range of {name or 'an activation'} is ({low}, {high}); expected finite numbers, the "
            "lower one first"
        )
    low, high = min(low, 0.0), max(high, 0.0)
    top = (1 << bits) - 1
    if high == low:
        return 1.0, 0
    # Far below any useful step, far above where 1/scale would overflow.
    scale = float(torch.tensor(max((high - low) / top, 2.0**-100), dtype=torch.float32))
    if not scale <= 1.0 / SMALLEST_STEP:
        raise CalibrationError(f"range of {name or 'an activation'} is ({low}, {high}), too wide")
    return scale, max(0, min(top, round(-low / scale)))


@dataclass(frozen=True)
class Planes:
    """Which bit-planes of a stored weight a level of lower quality reads.

    Attributes:
        bits: of what is read.
        drop: planes below them that are left out. Planes above them say only which end of the range
            a weight beyond it is taken for.
    """

    bits: int
    drop: int


def upper_planes(levels: Tensor, bits: int, planes: Planes) -> Tensor:
    """``clamp((q + 2^(d-1)) >> d, -2^(k-1), 2^(k-1)-1)``: what a level reads of stored integers.

    That is the nearest multiple of ``2^d``, the upper one of two, so that zeros stay zeros. (Planes
    that are only cut off round down, by half a step on average; that is half a step times the sum
    of the inputs of every single output, so that no bias makes up for it.) The same formula is in
    ``csrc/reference/spec.hpp``.

    Args:
        levels: whole numbers of ``bits`` bits, of an integer type.
        bits: 2 to 8.

    Returns:
        A tensor of the same type.

    Raises:
        PlanError: the planes are not among so many.
    """
    low, high = weight_range(planes.bits)
    if planes.drop < 0 or planes.bits + planes.drop > bits:
        raise PlanError(
            f"expected at most {bits} planes, got {planes.bits} above {planes.drop} that are left "
            "out"
        )
    half = (1 << planes.drop) >> 1
    return ((levels.to(torch.int16) + half) >> planes.drop).clamp_(low, high).to(levels.dtype)


def plane_cells(levels: Tensor, bits: int, planes: Planes) -> tuple[Tensor, Tensor]:
    """First and last stored integer, int16, of which :func:`upper_planes` gives ``levels``."""
    low, high = weight_range(planes.bits)
    first, last = weight_range(bits)
    half = (1 << planes.drop) >> 1
    start = (levels.to(torch.int16) << planes.drop) - half
    end = start + ((1 << planes.drop) - 1)
    start.masked_fill_(levels == low, first)
    end.masked_fill_(levels == high, last)
    return start, end


def group_size_of(inputs: int, groups: int) -> int:
    """Input channels per scale where ``inputs`` of them have so many scales.

    Raises:
        ValueError: no group size gives that number.
    """
    if groups == 1:
        return inputs
    for size in GROUP_SIZES:
        if -(-inputs // size) == groups:
            return size
    counts = sorted({-(-inputs // size) for size in GROUP_SIZES} | {1}, reverse=True)
    raise ValueError(
        f"{inputs} input channels have {counts} scales (groups of {GROUP_SIZES}), got {groups}"
    )


def group_count(inputs: int, group_size: int | None) -> int | None:
    """Scales per output channel; None where there is one, which then is no group's."""
    if group_size is None or group_size >= inputs:
        return None
    return -(-inputs // group_size)


def per_channel(scale: Tensor, shape: torch.Size) -> Tensor:
    """A scale as it broadcasts over a weight ``[O, ...]`` of that shape.

    Args:
        scale: ``[O]``; or ``[O, groups]`` of a weight ``[O, I]``.
    """
    if scale.dim() == 1:
        return scale.view(-1, *([1] * (len(shape) - 1)))
    size = group_size_of(shape[1], scale.shape[1])
    return scale.repeat_interleave(size, dim=1)[:, : shape[1]]


def conv_form(layer: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the layer's weight shape, output channels first: ``[O, I/groups, KH, KW]``.

    That is how weights are rounded, packed and stored. Only a transposed convolution differs: its
    ``[I, O/groups, KH, KW]`` is transposed within each group (and not flipped). Differentiable.
    """
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight
    inputs, outputs, *kernel = weight.shape
    groups = layer.groups
    grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
    return grouped.transpose(1, 2).reshape(groups * outputs, inputs // groups, *kernel)


def layer_form(layer: nn.Module, weight: Tensor) -> Tensor:
    """Inverse of :func:`conv_form`."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight
    outputs, inputs, *kernel = weight.shape
    groups = layer.groups
    grouped = weight.reshape(groups, outputs // groups, inputs, *kernel)
    return grouped.transpose(1, 2).reshape(groups * inputs, outputs // groups, *kernel)


def round_weight(weight: Tensor, scale: Tensor, bits: int, mask: Tensor | None = None) -> Tensor:
    """Integers of a weight on a given grid: ``q = mask * clamp(rne(w / scale), qmin, qmax)``.

    The one place where a weight becomes an integer: fake quantization, conversion and the exact
    simulation all call it (or repeat its three operations), so they cannot disagree.

    Args:
        weight: float32 ``[O, ...]``.
        scale: float32 ``[O]``, or ``[O, groups]``, positive.
        bits: 2 to 8.
        mask: optional bool tensor of the weight's shape, true where the weight is kept.

    Returns:
        float32 tensor of whole numbers, same shape as ``weight``.
    """
    low, high = weight_range(bits)
    q = torch.div(weight, per_channel(scale, weight.shape)).round_().clamp_(low, high)
    return q.mul_(mask) if mask is not None else q


@torch.no_grad()
def quantize_weight(
    w: Tensor,
    bits: int,
    mask: Tensor | None = None,
    *,
    group_size: int | None = None,
    chunk: int = 1 << 16,
) -> tuple[Tensor, Tensor]:
    """Quantize a weight with the scale of least squared error in every output channel.

    For a fixed vector of integers ``q`` the best scale is ``<w,q>/<q,q>`` and leaves the error
    ``|w|^2 - <w,q>^2/<q,q>``. A geometric grid of clipping ranges is tried, the ``q`` with the
    smallest such error is kept, and rounding and least squares alternate a few times, neither of
    which can increase the error. The result is deterministic.

    Args:
        w: floating point ``[O, ...]``, at least one axis.
        bits: 2 to 8, the signed range is ``-2^(b-1) ... 2^(b-1)-1``.
        mask: optional bool tensor of the same shape; weights where it is false become 0 and do
            not influence the scale.
        group_size: of a weight ``[O, I]``: every so many input channels get a scale.
        chunk: number of weights handled at once, bounds the working memory.

    Returns:
        ``(q, scale)``: int8 tensor of the shape of ``w``, and float32 ``[O]`` positive scales, or
        ``[O, groups]`` where there is more than one. Where no kept weight is non-zero the scale
        is 1 and weights are zeros.

    Raises:
        PlanError: ``bits`` out of range.
        CalibrationError: a weight is NaN or infinite.
    """
    low, high = weight_range(bits)
    if mask is not None and mask.shape != w.shape:
        raise PlanError(f"mask has shape {tuple(mask.shape)}, expected {tuple(w.shape)}")
    groups = None if group_size is None else group_count(w.shape[1], group_size)
    if group_size is not None and groups is not None:
        parts = (_in_groups(t, group_size) for t in (w, mask) if t is not None)
        q, scale = quantize_weight(next(parts), bits, next(parts, None), chunk=chunk)
        return q.reshape(len(w), -1)[:, : w.shape[1]].contiguous(), scale.reshape(-1, groups)
    channels = w.shape[0]
    flat = w.detach().to(torch.float32).reshape(channels, -1)
    if not bool(torch.isfinite(flat).all()):
        raise CalibrationError(
            f"weight of shape {tuple(w.shape)} contains NaN or infinite values; "
            "expected finite numbers"
        )
    keep = None if mask is None else mask.reshape(channels, -1)
    q = torch.empty(flat.shape, dtype=torch.int8, device=w.device)
    scale = torch.ones(channels, dtype=torch.float32, device=w.device)
    if flat.numel() == 0:
        return q.reshape(w.shape), scale
    # At the upper end not even a positive extreme is clipped: it is qmax times the scale.
    ratios = torch.logspace(0, 1, _CANDIDATES[bits], base=(-low / high) / _LOWEST_RATIO[bits])
    steps = (ratios * (_LOWEST_RATIO[bits] / -low)).tolist()
    rows = max(1, chunk // flat.shape[1])
    for start in range(0, channels, rows):
        part = flat[start : start + rows]
        if keep is not None:
            part = part * keep[start : start + rows]
        largest = part.abs().amax(dim=1, keepdim=True)
        empty = largest == 0
        # Searching on w / max|w| keeps the squares away from overflow and underflow.
        unit = part / torch.where(empty, torch.ones_like(largest), largest)
        step = _search(unit, steps, low, high)
        final = (step * largest).clamp_(min=_SMALLEST_SCALE)
        final.masked_fill_(empty, 1.0)
        # Rounded once more on the stored float32 scale: the integers are exactly those that
        # round_weight gives for it.
        q[start : start + rows] = torch.div(part, final).round_().clamp_(low, high)
        scale[start : start + rows] = final[:, 0]
    return q.reshape(w.shape), scale


def _in_groups(w: Tensor, size: int) -> Tensor:
    """``[O, I]`` as ``[O * groups, size]``; the last group of an output ends with zeros."""
    return torch.nn.functional.pad(w, (0, -w.shape[1] % size)).reshape(-1, size)


def _search(unit: Tensor, steps: list[float], low: int, high: int) -> Tensor:
    """Best step ``[R, 1]`` for rows ``[R, K]`` with ``max|unit| == 1`` (or all zero)."""
    best_gain = torch.full_like(unit[:, :1], -1.0)
    best_step = torch.full_like(unit[:, :1], steps[-1])
    q = torch.empty_like(unit)
    for step in steps:
        torch.mul(unit, 1.0 / step, out=q).round_().clamp_(low, high)
        gain, refined = _gain(unit, q)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_step = torch.where(better, refined, best_step)
    for _ in range(_REFINEMENTS):
        torch.div(unit, best_step, out=q).round_().clamp_(low, high)
        gain, refined = _gain(unit, q)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_step = torch.where(better, refined, best_step)
    return best_step


def _gain(unit: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """``<w,q>^2/<q,q>`` (explained energy) and the least-squares step ``<w,q>/<q,q>``."""
    wq = torch.linalg.vecdot(unit, q).unsqueeze(1)
    qq = torch.linalg.vecdot(q, q).unsqueeze(1).clamp_(min=1e-20)
    step = wq / qq
    # A step that is not positive (all-zero q) explains nothing and must never be chosen.
    return torch.where(step > 0, wq * step, torch.full_like(step, -1.0)), step


def fma_float32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``round_to_float32(a * b + c)`` with a single rounding, for float32 tensors that broadcast.

    The product of two float32 numbers has at most 48 significant bits and is exact in float64;
    adding the third in float64 and rounding to float32 afterwards would round twice, which differs
    from the one rounding of fma when the first lands on a tie of the second. So the float64
    addition is rounded *to odd*: truncated, with the last bit set if anything was cut off. A result
    that was rounded to odd with at least two more bits than the target rounds correctly a second
    time (53 >= 24 + 2). Exact also where the result overflows or is subnormal.
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    # TwoSum: total + error == product + addend exactly.
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    even = (total.contiguous().view(torch.int64) & 1) == 0
    toward = torch.copysign(torch.full_like(total, float("inf")), error)
    # Of the two float64 neighbours around the exact sum, take the one with the odd last bit.
    odd = torch.where((error != 0) & even, torch.nextafter(total, toward), total)
    return odd.float()

"""Transposed convolutions of floats as ordinary ones: every ``stride``-th output belongs to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adalayer_native.ops.checks import FLOATS, check_input
from adalayer_native.ops.floats import exact_conv2d
from adalayer_native.ops.geometry import transposed_out_size

__all__ = [
    "Phase",
    "exact_conv_transpose2d",
    "fake_conv_transpose2d",
    "outputs_first",
    "part_of",
    "phases",
]


@dataclass(frozen=True)
class Phase:
    """Every ``stride``-th output along one axis, as those of an ordinary convolution.

    Attributes:
        taps: of the kernel, in the order of the inputs that they meet; none: no input counts.
        dilation: of these.
        before, after: padding of the input.
    """

    taps: tuple[int, ...]
    dilation: int
    before: int
    after: int


def phases(
    size: int, out: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[int, list[Phase]]:
    """Outputs of each phase, and the phases: output ``m`` of phase ``p`` is ``m * stride + p -
    padding`` of the transposed convolution, if there is such a one.

    Args:
        size: of the input along the axis.
        out: of the result.
    """
    taps = [[k for k in range(kernel) if k * dilation % stride == p] for p in range(stride)]
    # Output m meets input m - shift.
    shifts = [[(k * dilation - p) // stride for k in own] for p, own in enumerate(taps)]
    first = max((own[0] for own in shifts if own), default=0)
    count = max(-(-(out + padding) // stride), size + first)
    found = []
    for own, moved in zip(taps, shifts, strict=True):
        if not own:
            found.append(Phase((), 1, 0, count - size))
            continue
        step = moved[1] - moved[0] if len(moved) > 1 else 1
        found.append(Phase(tuple(own[::-1]), step, moved[-1], count - size - moved[0]))
    return count, found


def part_of(weight: Tensor, row: Phase, column: Phase) -> Tensor:
    """The kernel of two phases; zeros, of one tap along such an axis, where no input counts.

    Args:
        weight: ``[O, I / groups, KH, KW]``, not flipped.
    """
    part = weight[:, :, list(row.taps) or [0]][:, :, :, list(column.taps) or [0]].contiguous()
    return part if row.taps and column.taps else torch.zeros_like(part)


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """``[I, O / groups, KH, KW]``, as torch has it, to ``[O, I / groups, KH, KW]``."""
    split = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return split.flatten(0, 1)


@torch.no_grad()
def exact_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """``F.conv_transpose2d`` with sums in the order of the weights, the kernel turned round.

    Args:
        input: float ``[N, I, H, W]``.
        weight: float ``[I, O / groups, KH, KW]``.
    """
    check_input("exact_conv_transpose2d", input, FLOATS, 4)
    rest = (stride, padding, output_padding, groups, dilation)
    if input.device.type != "cpu":
        return F.conv_transpose2d(input, weight, bias, *rest)
    out = fake_conv_transpose2d(input, weight, bias, *rest)
    kernel, whole = outputs_first(weight.detach(), groups), list(out.shape[2:])
    counts, along = zip(
        *(
            phases(input.shape[2 + k], whole[k], weight.shape[2 + k], stride[k], padding[k],
                   dilation[k])
            for k in range(2)
        ),
        strict=True,
    )  # fmt: skip
    full = input.new_empty(*out.shape[:2], *(n * s for n, s in zip(counts, stride, strict=True)))
    for p, row in enumerate(along[0]):
        for q, column in enumerate(along[1]):
            sides = [row.before, column.before, row.after, column.after]
            part = part_of(kernel, row, column)
            dilations = [row.dilation, column.dilation]
            full[:, :, p :: stride[0], q :: stride[1]] = exact_conv2d(
                input, part, bias, [1, 1], sides, dilations, groups
            )
    top, left = padding
    return full[:, :, top : top + whole[0], left : left + whole[1]].contiguous()


def fake_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """Shape of :func:`exact_conv_transpose2d`."""
    sizes = transposed_out_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    h, w = (size + more for size, more in zip(sizes, output_padding, strict=True))
    return input.new_empty(input.shape[0], weight.shape[1] * groups, h, w)

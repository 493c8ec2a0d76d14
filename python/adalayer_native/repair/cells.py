"""Bounds of a layer's integers: what narrower widths of the same weight leave to wider ones.

A weight is stored once, with all of its bit-planes, and a level of lower quality reads the upper
ones of them (:func:`adalayer_native.rounding.upper_planes`). So where the narrow integers are
chosen first, each of them leaves its weight an interval of the wide ones. :class:`Nest` keeps these
intervals from the narrowest width to the widest, and :class:`Cells` are what they are for the
repair of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adalayer_native.rounding import Planes, per_channel, plane_cells, upper_planes, weight_range

__all__ = ["Cells", "Nest", "planes_for"]


@dataclass(frozen=True)
class Cells:
    """Bounds of every integer of a layer, and the scale that they are for.

    Attributes:
        low, high: float32 whole numbers, both included, ``[O, I/groups, ...]`` or, in the solver,
            ``[G, R, K]``.
        scale: float32 ``[O]`` or ``[G, R]``, positive.
    """

    low: Tensor
    high: Tensor
    scale: Tensor

    def grouped(self, groups: int) -> Cells:
        """As the solver has them."""
        rows = self.low.shape[0] // groups
        low, high = (end.reshape(groups, rows, -1) for end in (self.low, self.high))
        return Cells(low, high, self.scale.reshape(groups, rows))

    def of(self, channels: Tensor) -> Cells:
        """Of some rows of every group."""
        return Cells(self.low[:, channels], self.high[:, channels], self.scale[:, channels])

    def columns(self, part: slice) -> Cells:
        """Of some columns."""
        return replace(self, low=self.low[:, :, part], high=self.high[:, :, part])


class Nest:
    """One layer's stored integers, as far as the widths that are chosen already settle them.

    Attributes:
        bits: of the stored integers.
        low, high: int16, output channels first: what each of them may still be.
    """

    def __init__(self, bits: int, levels: Tensor, scale: Tensor, planes: Planes) -> None:
        """levels, scale: of the narrowest width, int8 ``[O, ...]`` and float32 ``[O]``."""
        self.bits = bits
        low, high = weight_range(bits)
        self.low = torch.full_like(levels, low, dtype=torch.int16)
        self.high = torch.full_like(levels, high, dtype=torch.int16)
        # Of a stored integer, by what was chosen first.
        self.step = scale / 2**planes.drop
        self.settle(levels, planes)

    def settle(self, levels: Tensor, planes: Planes) -> None:
        """Take integers into account that a width has got: within :meth:`cells` of it."""
        low, high = plane_cells(levels, self.bits, planes)
        self.low = torch.maximum(self.low, low)
        self.high = torch.minimum(self.high, high)
        if bool((self.low > self.high).any()):
            raise ValueError("integers of two widths belong to no stored one")

    def cells(self, planes: Planes) -> Cells:
        """What integers of another, wider, width may be."""
        low, high = (upper_planes(end, self.bits, planes).float() for end in (self.low, self.high))
        return Cells(low, high, self.step * 2**planes.drop)


def planes_for(weight: Tensor, scale: Tensor, bits: int, kept: int) -> Planes:
    """Which planes of a stored weight the narrowest width is best made of.

    With all planes above it read, ``2^(bits-kept)`` stored steps are one of the narrow ones, and
    what clipping cuts off at few bits is cut off at many, too. One plane more above them leaves
    the wide integers twice the range, at half the resolution.

    Args:
        weight: float ``[O, ...]``.
        scale: of the narrow integers, ``[O]``.
        bits: of the stored integers. kept: of the narrow ones.
    """
    low, high = weight_range(bits)
    best, least = Planes(kept, bits - kept), float("inf")
    for drop in range(bits - kept, max(-1, bits - kept - 3), -1):
        step = per_channel(scale / 2**drop, weight.shape)
        rounded = torch.div(weight, step).round_().clamp_(low, high).mul_(step)
        error = float((rounded - weight).square().sum())
        if error < least:
            best, least = Planes(kept, drop), error
    return best

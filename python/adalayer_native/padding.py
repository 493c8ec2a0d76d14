"""Zero padding of a convolution: what it is on each of the four sides, whoever asked for it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PaddedConv2d", "Sides", "four_paddings"]

Sides = tuple[int, int, int, int]
"""``(top, bottom, left, right)``"""


class PaddedConv2d(nn.Conv2d):
    """A convolution with a zero padding of its own on every side, which ``nn.Conv2d`` lacks.

    Args:
        sides: ``(top, bottom, left, right)``; all other arguments are those of ``nn.Conv2d``.
    """

    def __init__(self, *args: Any, sides: Sides, **kwargs: Any) -> None:
        top, bottom, left, right = sides
        self.even = (top, left) == (bottom, right)
        kwargs["padding"] = (top, left) if self.even else 0
        super().__init__(*args, **kwargs)
        self.sides = sides

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.weight)

    def convolve(self, input: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation with another weight."""
        if not self.even:
            top, bottom, left, right = self.sides
            input = F.pad(input, (left, right, top, bottom))
        return F.conv2d(
            input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.even else f", sides={self.sides}")


def four_paddings(layer: nn.Conv2d) -> Sides:
    """Zero padding as ``(top, bottom, left, right)``; resolves ``"same"`` and ``"valid"``."""
    if isinstance(layer, PaddedConv2d):
        return layer.sides
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        # The odd element goes to the end, as torch does.
        (top, left) = (total // 2 for total in totals)
        return top, totals[0] - top, left, totals[1] - left
    assert not isinstance(layer.padding, str)
    vertical, horizontal = layer.padding
    return vertical, vertical, horizontal, horizontal

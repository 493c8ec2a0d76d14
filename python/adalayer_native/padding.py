"""Zero padding of a convolution: what it is on each of the four sides, whoever asked for it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PaddedConv2d", "Sides", "four_paddings", "window_of"]

Sides = tuple[int, int, int, int]
"""``(top, left, bottom, right)``, the order of the operators and of the engine"""


class PaddedConv2d(nn.Conv2d):
    """A convolution with a zero padding of its own on every side, which ``nn.Conv2d`` lacks.

    What its own ``padding`` lacks is padded in front of it, as the network did it that had the
    padding by itself: torch's float kernels round otherwise where they pad.

    Args:
        sides: ``(top, left, bottom, right)``, no less than ``padding``; all other arguments are
            those of ``nn.Conv2d``.
    """

    def __init__(self, *args: Any, sides: Sides, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sides = sides
        top, left, bottom, right = (
            all_ - own for all_, own in zip(sides, _own_paddings(self), strict=True)
        )
        self.around = left, right, top, bottom

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.weight)

    def convolve(self, input: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation with another weight."""
        if any(self.around):
            input = F.pad(input, self.around)
        return F.conv2d(
            input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", sides={self.sides}" if any(self.around) else "")


def four_paddings(layer: nn.Conv2d) -> Sides:
    """Zero padding as ``(top, left, bottom, right)``; resolves ``"same"`` and ``"valid"``."""
    return layer.sides if isinstance(layer, PaddedConv2d) else _own_paddings(layer)


def window_of(layer: nn.Module) -> dict[str, Any]:
    """How a float convolution goes over its input, as arguments of native ones; of a linear layer
    nothing."""
    if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return {}
    shared = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    if isinstance(layer, nn.Conv2d):
        return {**shared, "padding": four_paddings(layer)}
    return {**shared, "padding": layer.padding, "output_padding": layer.output_padding}


def _own_paddings(layer: nn.Conv2d) -> Sides:
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        # The odd element goes to the end, as torch does.
        (top, left) = (total // 2 for total in totals)
        return top, left, totals[0] - top, totals[1] - left
    assert not isinstance(layer.padding, str)
    vertical, horizontal = layer.padding
    return vertical, horizontal, vertical, horizontal

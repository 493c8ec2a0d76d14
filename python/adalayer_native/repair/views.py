"""Other views of calibration pictures: mirrored, and a little nearer.

A repair has seen the pictures, and behind it the network's output for them says little about what
it does to others. What the float model makes of a view of a picture can be asked as well as what it
makes of the picture, without a label for either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adalayer_native.capture import Inputs

__all__ = ["has_views", "view"]

NEAREST = 0.75  # of a picture's sides that a view shows, at least
CHANNELS = (1, 3)
SMALLEST = 16  # pixels of a side


def has_views(x: Inputs) -> bool:
    """Whether a batch is pictures and nothing else: float ``[N, 1 or 3, H, W]``."""
    tensors = x.tensors()
    return len(tensors) == 1 and _is_pictures(tensors[0])


def _is_pictures(x: Tensor) -> bool:
    return (
        x.dim() == 4
        and x.is_floating_point()
        and x.shape[1] in CHANNELS
        and min(x.shape[2:]) >= SMALLEST
    )


def view(x: Inputs, generator: torch.Generator) -> Inputs:
    """Every picture cut somewhere to 75 to 100 % of its sides, scaled back, half of them mirrored.

    Args:
        x: pictures, see :func:`has_views`.
        generator: CPU generator of the draw.
    """
    (pictures,) = x.tensors()
    count = len(pictures)
    share = 1 - (1 - NEAREST) * torch.rand(count, generator=generator)
    mirrored = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    middle = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - share)[:, None]
    turned = torch.zeros(count, 2, 3)
    turned[:, 0, 0], turned[:, 1, 1], turned[:, :, 2] = share * mirrored, share, middle
    grid = F.affine_grid(turned.to(pictures), list(pictures.shape), align_corners=False)
    shown = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    if pictures.is_contiguous(memory_format=torch.channels_last):
        shown = shown.contiguous(memory_format=torch.channels_last)
    return x.map(lambda _: shown)

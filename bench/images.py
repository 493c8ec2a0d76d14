"""Images with structure and without a source: what random networks are analysed with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["structured_images"]

BOXES = 6  # rectangles per image


def structured_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth fields with rectangles on them and a little noise, roughly normalised.

    Neighbouring pixels are alike, as in photographs, where those of white noise are not.

    Args:
        count: of images.
        size: of their sides.
        seed: the same images for the same one.

    Returns:
        float32 ``[count, 3, size, size]``.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    images = functional.interpolate(coarse, size=(size, size), mode="bicubic")
    for image in images:
        for _ in range(BOXES):
            top, left = torch.randint(0, max(1, size - 4), (2,), generator=generator).tolist()
            height, width = torch.randint(4, max(5, size // 2), (2,), generator=generator).tolist()
            colour = torch.randn(3, 1, 1, generator=generator)
            image[:, top : top + height, left : left + width] = colour
    return images + 0.05 * torch.randn(images.shape, generator=generator)

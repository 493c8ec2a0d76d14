"""scikit-learn's handwritten digits as 3-channel images: real data that needs no download."""

from __future__ import annotations

import torch

from .datasets import ImageDataset

__all__ = ["digits"]


def digits(size: int = 32) -> tuple[ImageDataset, ImageDataset]:
    """The 1,797 digits (8x8 pixels), enlarged to ``size`` pixels: ``(train, test)``.

    Every fifth image of each class is for testing; the split never changes. Values 0 to 16
    become 0 to 255, enlarged bilinearly and repeated in three channels.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    raw = torch.from_numpy(data.images).to(torch.float32).unsqueeze(1) * (255.0 / 16.0)
    large = torch.nn.functional.interpolate(
        raw, size=(size, size), mode="bilinear", align_corners=False
    )
    pixels = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(data.target).to(torch.int64)
    rank = torch.empty_like(labels)
    for label in labels.unique():
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    held_out = rank % 5 == 4
    classes = [str(name) for name in data.target_names]

    def part(chosen: torch.Tensor, name: str) -> ImageDataset:
        return ImageDataset(
            labels[chosen],
            classes,
            size,
            (0.5, 0.5, 0.5),
            (0.5, 0.5, 0.5),
            name=f"digits {name}",
            pixels=pixels[chosen].contiguous(),
        )

    return part(~held_out, "train"), part(held_out, "test")

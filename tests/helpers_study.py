"""A network and images so small that a whole study takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn


class SmallNet(nn.Module):
    """Two convolutions and a linear layer; ``num_classes`` logits of images of any size."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.classifier(self.flatten(self.pool(x)))


def write_images(folder: Path, *, classes: int = 10, train: int = 6, test: int = 2) -> Path:
    """``train/`` and ``test/`` with noise of 8 x 8 pixels, a mean of its own for every class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label in range(classes):
            place = folder / split / f"{label:03d}"
            place.mkdir(parents=True)
            for index in range(count):
                noise = generator.integers(0, 120, (8, 8, 3))
                pixels = noise + np.array([13 * label % 130, 29 * label % 130, 7 * label % 130])
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    return folder

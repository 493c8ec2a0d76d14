"""Small networks and data that several test files use."""

from __future__ import annotations

import torch
from torch import nn


class TinyNet(nn.Module):
    """Two convolutions and a linear layer; 1,300 weights."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(48, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.fc(self.flatten(x))


def tiny(seed: int = 0) -> TinyNet:
    """A :class:`TinyNet` with seeded weights and running statistics that are not trivial."""
    torch.manual_seed(seed)
    model = TinyNet()
    with torch.no_grad():
        model.bn1.running_mean.uniform_(-0.2, 0.2)
        model.bn1.running_var.uniform_(0.5, 1.5)
    return model.eval()


def uneven() -> TinyNet:
    """A :func:`tiny` whose layers differ clearly in what an error of theirs costs."""
    model = tiny()
    with torch.no_grad():
        model.fc.weight.mul_(6)
    return model


def batches(count: int = 2, size: int = 16, seed: int = 1, labels: bool = True) -> list:
    """Seeded batches of 3x8x8 images, with labels of four classes or without."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn((size, 3, 8, 8), generator=generator)
        y = torch.randint(0, 4, (size,), generator=generator)
        found.append((x, y) if labels else x)
    return found

"""The 8-layer CNN of the AdaLayerNet paper: six convolutions, two hidden linear layers."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["AdaLayerNet", "adalayernet"]


class AdaLayerNet(nn.Module):
    """Six 3x3 convolutions, each followed by BN and ReLU, then fc1, fc2 and the classifier.

    ``forward`` takes float images ``[N, in_channels, H, W]`` (H, W at least 8; the paper uses
    32x32) and returns logits ``[N, num_classes]``.

    Args:
        num_classes: number of classes.
        in_channels: number of input channels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, 32)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = _conv(32, 64)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = _conv(64, 128)
        self.bn3 = nn.BatchNorm2d(128)
        self.conv4 = _conv(128, 128)
        self.bn4 = nn.BatchNorm2d(128)
        self.conv5 = _conv(128, 256)
        self.bn5 = nn.BatchNorm2d(256)
        self.conv6 = _conv(256, 256)
        self.bn6 = nn.BatchNorm2d(256)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(256, 512)
        self.fc2 = nn.Linear(512, 256)
        self.classifier = nn.Linear(256, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.relu(self.bn2(self.conv2(x))))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.pool(self.relu(self.bn4(self.conv4(x))))
        x = self.relu(self.bn5(self.conv5(x)))
        x = self.pool(self.relu(self.bn6(self.conv6(x))))
        x = self.flatten(self.global_pool(x))
        x = self.relu(self.fc1(x))
        x = self.relu(self.fc2(x))
        return self.classifier(x)


def adalayernet(num_classes: int = 10) -> AdaLayerNet:
    """The paper's network with fresh random weights."""
    return AdaLayerNet(num_classes)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)

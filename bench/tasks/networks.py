"""One backbone with three heads: a classifier, a detector and a segmenter.

The backbone is MobileNet's (pairs of a depthwise and a pointwise convolution), the detector's head
that of FCOS and YOLOX (no anchors; two scales, joined top down), the segmenter's a U-Net's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["REACH", "STRIDES", "Backbone", "Classifier", "Detector", "Segmenter"]

STRIDES = (8, 16)  # of the detector's two maps
REACH = 4  # strides from a position to a side of its box, at most


def _norm_relu(layer: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution with batch norm and ReLU."""
    return _norm_relu(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False))


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A depthwise and a pointwise convolution, each with batch norm and ReLU."""
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    return nn.Sequential(_norm_relu(depthwise), conv(inputs, outputs, 1))


class Backbone(nn.Module):
    """Maps of 24, 48, 96 and 192 channels at strides 2, 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 24, stride=2)
        self.stage1 = nn.Sequential(separable(24, 48, 2), separable(48, 48))
        self.stage2 = nn.Sequential(separable(48, 96, 2), separable(96, 96), separable(96, 96))
        self.stage3 = nn.Sequential(separable(96, 192, 2), separable(192, 192), separable(192, 192))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From images ``[N, 3, H, W]`` to four maps."""
        stem = self.stem(x)
        first = self.stage1(stem)
        second = self.stage2(first)
        return stem, first, second, self.stage3(second)


class Classifier(nn.Module):
    """The backbone, the mean of its last map, one linear layer: ``[N, classes]``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.backbone(x)[-1].mean(dim=(2, 3)))
        return logits


class Detector(nn.Module):
    """Scores and boxes at every position of two maps, decoding included.

    A position predicts how far the four sides of a box are from its own middle, as a sigmoid of
    four strides; the box in pixels of the image follows. Scores are sigmoids, too: what the engine
    computes at the end of a program (docs/ada-format.md) is all that decoding needs.

    Args:
        classes: without the background.
        size: height and width of the images; the centres are constants of the network.
    """

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.lateral = conv(96, 64, 1)
        self.top = conv(192, 64, 1)
        self.smooth = nn.ModuleList(separable(64, 64) for _ in STRIDES)
        self.score_towers = nn.ModuleList(separable(64, 64) for _ in STRIDES)
        self.box_towers = nn.ModuleList(separable(64, 64) for _ in STRIDES)
        self.score_heads = nn.ModuleList(nn.Conv2d(64, classes, 1) for _ in STRIDES)
        self.box_heads = nn.ModuleList(nn.Conv2d(64, 4, 1) for _ in STRIDES)
        for name, parameter in self.score_heads.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, -4.0)  # few positions are an object's
        for level, stride in enumerate(STRIDES):
            self.register_buffer(f"centres{level}", _centres(size // stride, stride))
            # Left and top are taken off the centre, right and bottom added.
            reach = REACH * stride * torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(1, 4, 1, 1)
            self.register_buffer(f"reach{level}", reach)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``boxes0``, ``boxes1``: ``[N, 4, h, w]``, corners ``x1 y1 x2 y2`` in pixels;
        ``scores0``, ``scores1``: ``[N, classes, h, w]``, from 0 to 1."""
        _, _, fine, coarse = self.backbone(x)
        top = self.top(coarse)
        up = functional.interpolate(top, scale_factor=2.0, mode="nearest")
        maps = (self.lateral(fine) + up, top)
        found: dict[str, Tensor] = {}
        for level in range(len(STRIDES)):
            shared = self.smooth[level](maps[level])
            scores, boxes = self.score_towers[level](shared), self.box_towers[level](shared)
            sides = torch.sigmoid(self.box_heads[level](boxes)) * getattr(self, f"reach{level}")
            found[f"boxes{level}"] = sides + getattr(self, f"centres{level}")
            found[f"scores{level}"] = torch.sigmoid(self.score_heads[level](scores))
        return found


def _centres(cells: int, stride: int) -> Tensor:
    """``[1, 4, cells, cells]``: x, y, x, y of the middle of every cell."""
    middle = (torch.arange(cells) + 0.5) * stride
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([x, y, x, y]).unsqueeze(0)


class Segmenter(nn.Module):
    """A U-Net on the backbone: logits ``[N, classes, H, W]``.

    Args:
        classes: the background, number 0, among them.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.up = nn.ModuleList(
            (separable(192 + 96, 64), separable(64 + 48, 32), conv(32 + 24, 24, 1))
        )
        self.head = nn.Conv2d(24, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel."""
        *skips, y = self.backbone(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            y = functional.interpolate(y, scale_factor=2.0, mode="nearest")
            y = block(torch.cat([y, skip], dim=1))
        return functional.interpolate(self.head(y), scale_factor=2.0, mode="bilinear")

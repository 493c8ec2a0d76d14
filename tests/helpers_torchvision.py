"""Torchvision's classification and segmentation networks, with random weights and small inputs.

The compiled part of torchvision's wheel is built for one build of torch and does not load beside
another (the CPU build, for one). The Python models need none of it; they only want the names of
its operators to exist when the package is imported, so empty schemas are registered for them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def torchvision_models() -> Any:
    """``torchvision.models``; skips the test where torchvision is not installed."""
    global _library
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision (pip install --no-deps torchvision), which is not installed")
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _OPERATORS:
            if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                _library.define(schema)
    import torchvision.models

    return torchvision.models


@dataclass(frozen=True)
class Architecture:
    """One network, and the image size that it is tested at.

    Attributes:
        name: as in torchvision, or ``"unet"``.
        size: height and width of the test image.
        options: arguments of the constructor.
        slow: whether its tests take more than a few seconds.
        heavy: whether they take minutes, because its layers are many or large.
    """

    name: str
    size: int
    options: tuple[tuple[str, Any], ...] = ()
    slow: bool = False
    heavy: bool = False

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """What its tests are marked with."""
        slow = [pytest.mark.slow] if self.slow or self.heavy else []
        return [*slow, pytest.mark.heavy] if self.heavy else slow


ARCHITECTURES = (
    Architecture("alexnet", 64, heavy=True),
    Architecture("vgg16_bn", 32, heavy=True),
    Architecture("resnet18", 64),
    Architecture("resnet50", 64, slow=True),
    Architecture("resnext50_32x4d", 64, slow=True),
    Architecture("wide_resnet50_2", 64, heavy=True),
    Architecture("densenet121", 64, slow=True),
    Architecture("inception_v3", 96, (("aux_logits", False), ("init_weights", False)), slow=True),
    Architecture("googlenet", 64, (("aux_logits", False), ("init_weights", False)), slow=True),
    Architecture("mobilenet_v2", 64),
    Architecture("mobilenet_v3_small", 64),
    Architecture("mobilenet_v3_large", 64, slow=True),
    Architecture("shufflenet_v2_x1_0", 64),
    Architecture("squeezenet1_1", 64),
    Architecture("mnasnet1_0", 64, slow=True),
    Architecture("efficientnet_b0", 64),
    Architecture("regnet_x_400mf", 64, slow=True),
    Architecture("regnet_y_400mf", 64),
    Architecture("convnext_tiny", 64, slow=True),
    Architecture("fcn_resnet50", 64, (("weights_backbone", None),), heavy=True),
    Architecture("unet", 64),
)


class UNet(nn.Module):
    """Encoder and decoder with skip connections; transposed convolutions enlarge."""

    def __init__(self, channels: int = 3, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.down1 = self.block(channels, width)
        self.down2 = self.block(width, 2 * width)
        self.bottom = self.block(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = self.block(4 * width, 2 * width)
        # Overlapping windows, an odd output size, and a batch norm to fold.
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(
                2 * width, width, 3, stride=2, padding=1, output_padding=1, bias=False
            ),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.join1 = self.block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        """Two 3x3 convolutions, each with batch norm and relu."""
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        y = self.up2(self.bottom(self.pool(second)))
        y = self.join2(torch.cat([y, second], dim=1))
        y = self.join1(torch.cat([self.up1(y), first], dim=1))
        return self.head(y)


def build(architecture: Architecture, *, seed: int = 0) -> nn.Module:
    """The network with seeded random weights and running statistics that fit its activations.

    Freshly initialised batch norms are nearly the identity, and dozens of them in a row let
    activations vanish or explode; one batch of noise in training mode gives them statistics.
    """
    torch.manual_seed(seed)
    make: Callable[..., nn.Module]
    if architecture.name == "unet":
        make = UNet
    else:
        models = torchvision_models()
        make = getattr(models, architecture.name, None) or getattr(
            models.segmentation, architecture.name
        )
    model = make(**dict(architecture.options))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.eval()
    for norm in norms:
        norm.momentum = None
        norm.train()
    if norms:
        with torch.no_grad():
            model(images(architecture, 4, seed=seed + 1))
    return model.eval()


def images(architecture: Architecture, count: int, *, seed: int) -> Tensor:
    """Smooth random images ``[count, 3, size, size]``: noise at three resolutions."""
    generator = torch.Generator().manual_seed(seed)
    size = architecture.size
    total = torch.zeros(count, 3, size, size)
    for cells in (4, 16, size):
        noise = torch.randn((count, 3, cells, cells), generator=generator)
        total += nn.functional.interpolate(noise, size=size, mode="bilinear", align_corners=False)
    return total

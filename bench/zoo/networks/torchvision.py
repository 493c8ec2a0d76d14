"""Networks of torchvision: those of the tests, a segmentation network and a detector."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from bench.zoo.entry import Entry, noise
from bench.zoo.packages import torchvision_models
from tests.helpers_torchvision import ARCHITECTURES, Architecture, UNet


def _make(architecture: Architecture) -> nn.Module:
    options: dict[str, Any] = dict(architecture.options)
    if architecture.name == "unet":
        return UNet(**options)
    models = torchvision_models()
    make = getattr(models, architecture.name, None) or getattr(
        models.segmentation, architecture.name
    )
    model: nn.Module = make(**options)
    return model


def _deeplab() -> nn.Module:
    make = torchvision_models().segmentation.deeplabv3_resnet50
    model: nn.Module = make(weights=None, weights_backbone=None)
    return model


class BackboneAndHead(nn.Module):
    """A detector without what prepares images and chooses boxes.

    Args:
        detector: an ``SSD``.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone: nn.Module = detector.backbone
        self.head: nn.Module = detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def _ssdlite() -> nn.Module:
    make = torchvision_models().detection.ssdlite320_mobilenet_v3_large
    return BackboneAndHead(make(weights=None, weights_backbone=None))


def _entry(architecture: Architecture) -> Entry:
    size = architecture.size
    return Entry(
        f"torchvision/{architecture.name}",
        "torchvision",
        partial(_make, architecture),
        noise(3, size, size),
        noise(3, size + 32, size + 32),
    )


ENTRIES = (
    *(_entry(architecture) for architecture in ARCHITECTURES),
    Entry(
        "torchvision/deeplabv3_resnet50",
        "torchvision",
        _deeplab,
        noise(3, 64, 64),
        noise(3, 96, 96),
    ),
    Entry(
        "torchvision/ssdlite320_mobilenet_v3_large",
        "torchvision",
        _ssdlite,
        noise(3, 160, 160),
        noise(3, 192, 192),
    ),
)

"""The trained networks whose accuracy is measured, and their weight files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from adalayer_native.models import get_model, load_weights

__all__ = ["NAMES", "network"]

# AdaLayerNet's baseline saw each image eleven times; a better trained one has less to gain from
# what repair and fine-tuning do besides making up for the compression.
NAMES = {
    "adalayernet": "AdaLayerNet",
    "adalayernet-long": "AdaLayerNet, trained longer",
    "resnet20": "ResNet-20",
}


def network(name: str, models: Path) -> nn.Module:
    """A float network of :data:`NAMES`, its weights from ``<name>_cifar10.safetensors``."""
    model = get_model(name.removesuffix("-long"), 10)
    load_weights(model, models / f"{name}_cifar10.safetensors")
    return model.eval()

"""A small network as a ``.ada`` file, and a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_models import batches, tiny
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
CLASSES = ["ant", "bee", "cat", "dog"]


def write_model(path: Path, seed: int = 0, **metadata: Any) -> Path:
    """A small network for 3×8×8 images, as a ``.ada`` file."""
    model = tiny(seed)
    layers = {
        name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), 4)
        for name, layer in supported_layers(model).items()
    }
    prepared = ada.prepare(model, Plan(layers, "fixed", {}))
    ada.calibrate(prepared, batches(labels=False), progress=False)
    engine = ada.compile(
        ada.convert(prepared), torch.randn(1, 3, 8, 8), policy="native", strict=True
    )
    engine.save(path, **{"preprocessing": PREPROCESSING, "class_names": CLASSES, **metadata})
    return path


class Head(nn.Module):
    """Boxes and scores at every position of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.trunk(x))
        return {"boxes": 8 * torch.sigmoid(self.boxes(y)), "scores": torch.sigmoid(self.scores(y))}


def detector_engine() -> ada.Engine:
    """:class:`Head` for 3×8×8 images, compiled."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    result = ada.compress(Head().eval(), [x], 8, repair=False, progress=False)
    return ada.compile(result.model, x[:1], policy="native", strict=True)

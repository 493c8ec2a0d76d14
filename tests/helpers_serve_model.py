"""A small network as a ``.ada`` file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_models import batches, tiny

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

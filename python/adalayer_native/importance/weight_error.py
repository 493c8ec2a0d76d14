"""Criterion "weight_error": relative squared error of the weights at few bits. Needs no labels."""

from __future__ import annotations

import torch

from .batches import Batch
from .registry import Probe, criterion

__all__ = ["weight_error"]


@criterion("weight_error", once=True)
@torch.no_grad()
def weight_error(probe: Probe, batch: Batch) -> None:
    """``|W - Q(W)|^2 / |W|^2`` of every layer (0 for an all-zero layer)."""
    for name, quantized in probe.quantized.items():
        weight = probe.layers[name].weight.detach().float()
        energy = float(weight.square().sum())
        error = float((weight - quantized.float()).square().sum())
        probe.report(name, error / energy if energy > 0 else 0.0)

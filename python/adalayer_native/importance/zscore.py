"""Criterion "zscore": how many of a layer's weights are much larger than its average."""

from __future__ import annotations

import torch

from .batches import Batch
from .registry import Probe, criterion

__all__ = ["zscore"]


@criterion("zscore", once=True, increase=False, falling=True)
@torch.no_grad()
def zscore(probe: Probe, batch: Batch) -> None:
    """Share of weights with ``(w - mean) / sd > 1``; the fewer, the more important the layer.

    The z-score distribution of Dumitru et al., "Layer-wise quantization", arXiv 2406.17415. A
    constant layer has none.
    """
    for name, layer in probe.layers.items():
        weight = layer.weight.detach().double()
        deviation = float(weight.std(correction=0)) if weight.numel() else 0.0
        above = (weight - weight.mean() > deviation).double().mean() if deviation > 0 else 0.0
        probe.report(name, float(above))

"""Criterion "kurtosis": how heavy the tails of a layer's weights are."""

from __future__ import annotations

import torch

from .batches import Batch
from .registry import Probe, criterion

__all__ = ["kurtosis"]


@criterion("kurtosis", once=True, increase=False)
@torch.no_grad()
def kurtosis(probe: Probe, batch: Batch) -> None:
    """``mean((w - mean)^4) / variance^2``: 1 at least, 1.8 for uniform, 3 for normal weights.

    KurtBoost in Zhang et al., "Towards superior quantization accuracy: a layer-sensitive
    approach", arXiv 2503.06518: outliers stretch the grid of all other weights. A constant layer
    has 0.
    """
    for name, layer in probe.layers.items():
        weight = layer.weight.detach().double()
        centred = weight - weight.mean()
        spread = float(centred.square().mean()) if weight.numel() else 0.0
        fourth = float(centred.pow(4).mean()) if spread > 0 else 0.0
        probe.report(name, fourth / spread**2 if spread > 0 else 0.0)

"""Criterion "sparsity": how many of a layer's weights hardly differ from zero."""

from __future__ import annotations

import torch

from .batches import Batch
from .registry import Probe, criterion

__all__ = ["sparsity"]


@criterion("sparsity", once=True, increase=False, falling=True)
@torch.no_grad()
def sparsity(probe: Probe, batch: Batch) -> None:
    """Share of weights with ``|w| < max|w| / 254``; the fewer, the more important the layer.

    Shinde, "Adaptive quantization and pruning of deep neural networks via layer importance
    estimation", NeurIPS workshop on Machine Learning and Compression, 2024. A trained layer has
    hardly any exact zeros; those below the bound are what 8 bits, whose step is max|w| / 127,
    round to zero. An all-zero layer has 1.
    """
    for name, layer in probe.layers.items():
        size = layer.weight.detach().double().abs()
        most = float(size.max()) if size.numel() else 0.0
        probe.report(name, float((size < most / 254).double().mean()) if most > 0 else 1.0)
